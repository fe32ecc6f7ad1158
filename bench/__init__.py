"""Benchmarks: `python -m bench AREA` runs bench/areas/AREA.py, beside the peers of bench/baselines/."""
