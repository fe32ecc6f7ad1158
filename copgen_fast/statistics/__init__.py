"""Statistics of repeated runs: paired differences, intervals, exact tests, and tables of them."""
