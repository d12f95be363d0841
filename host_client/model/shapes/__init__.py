"""Configs of well-known models, as their makers publish them: shapes to be synthesised."""
