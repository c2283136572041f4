"""Measuring: fair timing, peak memory, the limits of the machine, rows, and the command line of a family."""
