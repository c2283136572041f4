"""Modules built from the functional API."""

from xlayer_ext.nn.hdim import HDIMMessage, QKVMessage
from xlayer_ext.nn.hyper import HyperConnection, ManifoldHyperConnection, expand_streams, reduce_streams
from xlayer_ext.nn.routing import LayerRouter

__all__ = [
    "HDIMMessage",
    "HyperConnection",
    "LayerRouter",
    "ManifoldHyperConnection",
    "QKVMessage",
    "expand_streams",
    "reduce_streams",
]
