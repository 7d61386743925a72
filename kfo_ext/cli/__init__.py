"""The command `kfo`: a file for each kind of command, `program` for what they share. No torch before a command runs."""

from .program import app, main

__all__ = ["app", "main"]
