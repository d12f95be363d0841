"""Generated stubs, one package a version."""
