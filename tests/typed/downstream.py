"""Uses the choices of modules and functions as a program does, for a strict type check; wrong lines say so."""

from __future__ import annotations

import torch
from torch import Tensor

from xlayer_ext import functional, nn
from xlayer_ext.types import Activation, Metric


def messages(activation: Activation) -> list[torch.nn.Module]:
    return [
        nn.HDIMMessage(64, scorer="4term", activation=activation, value_activation="gelu", fusion="concat_only"),
        nn.HDIMMessage(64, scorer="bilinear", device="meta", dtype=torch.bfloat16),
        nn.HDIMMessage(64, scorer="dot"),  # wrong
        nn.HDIMMessage(64, activation="silu"),  # wrong
        nn.HDIMMessage(64, value_activation="silu"),  # wrong
        nn.HDIMMessage(64, fusion="concat"),  # wrong
        nn.QKVMessage(4, 16, extra_value_projection=True, device=torch.device("cpu")),
    ]


def routers() -> list[nn.LayerRouter]:
    return [
        nn.LayerRouter(64, route_dim=16, weighting="full_softmax", pooling="cls"),
        nn.LayerRouter(64, weighting="softmax"),  # wrong
        nn.LayerRouter(64, pooling="max"),  # wrong
    ]


def connections(streams: Tensor) -> Tensor:
    nn.HyperConnection(64, expansion_rate=2, norm="rms")
    nn.HyperConnection(64, norm="rms_all")  # wrong
    nn.ManifoldHyperConnection(64, coefficients="per_stream")
    nn.ManifoldHyperConnection(64, coefficients="static")  # wrong
    functional.Connection(streams[0], norm="rms_all", form="sinkhorn_rows")
    functional.Connection(streams[0], norm="batch")  # wrong
    functional.Connection(streams[0], form="sinkhorn")  # wrong
    nn.hyper_connections(4, hidden_size=64, kind="manifold")
    nn.hyper_connections(4, hidden_size=64, kind="plain")  # wrong
    nn.reduce_streams(streams, reduce="max")  # wrong
    return nn.reduce_streams(streams, reduce="mean")


def quantizers(metric: Metric) -> list[torch.nn.Module]:
    return [
        nn.VectorQuantizer(64, 512, metric=metric),
        nn.VectorQuantizer(64, 512, metric="dot"),  # wrong
        nn.FSQ([8, 5, 5], hidden_size=64, bound="offset", variant="paper"),
        nn.FSQ([8, 5, 5], bound="sigmoid"),  # wrong
        nn.FSQ([8, 5, 5], variant="listing"),  # wrong
    ]


def aggregators() -> list[torch.nn.Module]:
    return [
        nn.TapProjector(12, 64, 16, pooling="attention"),
        nn.TapProjector(12, 64, 16, pooling=None),
        nn.TapProjector(12, 64, 16, pooling="cls"),  # wrong
        nn.EMAAggregator(12, 16, tree_checkpoint=4),
        nn.GRUAggregator(12, 16, dtype=torch.float64),
        nn.DepthAttentionAggregator(12, 16, num_heads=2, window=3),
    ]


def operators(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    functional.vq_nearest(x, codebook, metric="dot")  # wrong
    functional.fsq(x, [8, 5, 5], bound="tan")  # wrong
    functional.value_fusion(x, x, codebook, None, "concat")  # wrong
    functional.value_fusion(x, x, codebook, None, "concat_hadam")
    return functional.vq_nearest(x, codebook, metric="cosine")
