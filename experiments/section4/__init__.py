"""Section 4 of the paper by computer algebra: its formulas derived and checked, its figures computed."""
