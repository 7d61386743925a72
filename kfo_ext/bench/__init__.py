"""Microbenchmarks of the transform and of the updates built on it: `kfo bench`, and code that bench/ shares with it."""
