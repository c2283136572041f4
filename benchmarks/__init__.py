"""Measures the kernels, modules and systems: `python -m benchmarks [FAMILY] [options]`, run from a checkout.

Imports point one way: report → cases → harness; `gpu` holds what only a machine with a GPU, or the emulator, needs.
"""
