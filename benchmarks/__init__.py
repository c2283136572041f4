"""Benchmarks, run from a checkout: `python -m benchmarks FAMILY [options]`, or all but systems by the script's path."""
