"""Modules built from the functional API."""

from xlayer_ext.nn.hdim import HDIMMessage, QKVMessage
from xlayer_ext.nn.routing import LayerRouter

__all__ = ["HDIMMessage", "LayerRouter", "QKVMessage"]
