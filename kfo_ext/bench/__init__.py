"""Microbenchmarks of the transform and of the updates made of it: `kfo bench`, and what bench/ shares with it."""
