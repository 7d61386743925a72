"""Section 4 of the paper by machine: its formulas derived and checked, its figures computed."""
