"""Benchmarks: `python -m bench AREA`. A file per area; rows as harness.Row; peers in baselines/."""
