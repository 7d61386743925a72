"""The command `kfo`: one file per group of commands; `program` joins them. Importing it does not load torch."""

from .program import app, main

__all__ = ["app", "main"]
