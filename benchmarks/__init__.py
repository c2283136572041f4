"""Benchmarks, run from a checkout: `python -m benchmarks FAMILY [options]` or `python benchmarks/bench_FAMILY.py`."""
