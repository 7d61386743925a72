"""Batch norm by the statistics of each task's own batch, then ReLU, and its derivatives."""
