"""The Kronecker-factored transform Y = R^T G L and its derivatives."""
