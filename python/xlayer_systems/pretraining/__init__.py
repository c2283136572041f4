"""Pretraining of the small backbones that the systems start from."""
