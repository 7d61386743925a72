"""The paper's tables and figures from one registry: `python -m experiments list | run NAME... | report`."""
