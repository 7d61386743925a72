"""Benchmarks of a repository's checkout: `python bench/NAME.py` or `python -m bench.NAME`, from its root."""
