"""The operators, one folder each, and their shared code: loading, registration, checks, and dispatch to a backend."""
