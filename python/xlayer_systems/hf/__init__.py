"""Hugging Face models by name, and the access of all systems to their layers, weights and files."""
