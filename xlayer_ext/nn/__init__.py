"""Modules built from the functional API."""

from xlayer_ext.nn.hdim import HDIMMessage, QKVMessage
from xlayer_ext.nn.hyper import (
    HyperConnection,
    ManifoldHyperConnection,
    expand_streams,
    no_weight_decay,
    reduce_streams,
)
from xlayer_ext.nn.routing import LayerRouter

__all__ = [
    "HDIMMessage",
    "HyperConnection",
    "LayerRouter",
    "ManifoldHyperConnection",
    "QKVMessage",
    "expand_streams",
    "no_weight_decay",
    "reduce_streams",
]
