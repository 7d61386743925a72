"""Task families that are drawn from a formula and need no data."""
