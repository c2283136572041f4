"""Runs: their description, their execution, and sweeps of many."""
