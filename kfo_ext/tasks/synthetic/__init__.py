"""Task families drawn from a formula, without data."""
