"""The training loop that every system shares, and the run directories that it writes."""
