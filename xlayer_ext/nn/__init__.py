"""Modules built from the functional API.

All of them may be made on the meta device; ``to_empty(device=...)`` and ``reset_parameters()`` then give them their
start, the same as the constructor's after the same seed. ``reset_parameters()`` resets a module whole, with the parts
that it made, but not a ``branch`` that it was given; calling it on every submodule, as FSDP does, serves too.
"""

from xlayer_ext.nn.aggregate import DepthAttentionAggregator, EMAAggregator, GRUAggregator, TapProjector
from xlayer_ext.nn.fsq import FSQ, FSQOutput
from xlayer_ext.nn.hdim import HDIMMessage, QKVMessage
from xlayer_ext.nn.hyper import HyperConnection, ManifoldHyperConnection, no_weight_decay
from xlayer_ext.nn.quantize import VectorQuantizer, VQOutput
from xlayer_ext.nn.routing import LayerRouter
from xlayer_ext.nn.streams import HyperConnections, expand_streams, hyper_connections, reduce_streams

__all__ = [
    "FSQ",
    "DepthAttentionAggregator",
    "EMAAggregator",
    "FSQOutput",
    "GRUAggregator",
    "HDIMMessage",
    "HyperConnection",
    "HyperConnections",
    "LayerRouter",
    "ManifoldHyperConnection",
    "QKVMessage",
    "TapProjector",
    "VQOutput",
    "VectorQuantizer",
    "expand_streams",
    "hyper_connections",
    "no_weight_decay",
    "reduce_streams",
]
