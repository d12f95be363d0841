"""Faults: decorators over clean media, each with a name and a seeded generator."""
