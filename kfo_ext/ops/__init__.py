"""The operators: one folder each, and what they share: loading, registration, checks, and the choice of a backend."""
