"""Hugging Face models by name, and what every system asks of one: its layers, its weights, its files."""
