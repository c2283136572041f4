"""Runs: what one is made of, how it is carried out, and many of them in one table."""
