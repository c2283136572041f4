"""One small case for each differentiable operator of the functional API."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from aggregate_tools import aggregate_case
from hyper_tools import hyper_case
from oracle import draw, fresh_generator, hdim_case
from xlayer_ext import functional as XF
from xlayer_ext.functional import Connection

NATIVE_GRADIENTS = (  # under torch.func, too
    "masked_mean",
    "hdim_attention",
    "hyper_pre",
    "hyper_post",
    "hyper_post_pre",
    "ema_scan",
    "depth_gru",
    "depth_attention",
)
OPERATORS = (*NATIVE_GRADIENTS, "fsq")


class Case(NamedTuple):
    """A function of one tensor for each differentiable argument that returns one tensor, and the point to evaluate it
    at."""

    op: str
    function: Callable[..., Tensor]
    arguments: tuple[Tensor, ...]


def make_case(op: str, device: str) -> Case:
    """Draws small float64 arguments away from kinks."""
    generator = fresh_generator()
    if op == "masked_mean":
        mask = torch.tensor([[True, True, False], [True, True, True]], device=device)
        return Case(op, lambda x: XF.masked_mean(x, mask), (draw(generator, 2, 3, 2).to(device),))
    if op == "fsq":
        return Case(op, lambda z: XF.fsq(z, [5, 4])[0], (draw(generator, 3, 2).to(device),))
    if op == "hdim_attention":
        return _hdim(generator, device)
    if op.startswith("hyper"):
        return _hyper(op, generator, device)
    case = aggregate_case(generator, op, (2, 2, 4), device=device)
    names = tuple(case.tensors)

    def states(*tensors: Tensor) -> Tensor:
        result: Tensor = getattr(XF, op)(**dict(zip(names, tensors, strict=True)), **case.options)
        return result

    return Case(op, states, tuple(case.tensors.values()))


def _hdim(generator: torch.Generator, device: str) -> Case:
    case = hdim_case(generator, sizes=(2, 2, 3, 2, 4, 3), device=device, activation="gelu")
    names = ("query", "key", "value", "weight1", "bias1", "weight2")
    floats = case.floats | {"query": case.floats["query"] + 0.3}  # where query and key are equal there is a kink
    key_mask = torch.tensor([[True, True, False], [True, True, True]], device=device)  # one key has no derivatives
    rest = {"bias2": floats["bias2"], "key_mask": key_mask, **case.options}

    def attend(*tensors: Tensor) -> Tensor:
        outputs = XF.hdim_attention(**dict(zip(names, tensors, strict=True)), **rest, return_entropy=True)
        return torch.cat([output.flatten() for output in outputs])

    return Case("hdim_attention", attend, tuple(floats[name] for name in names))


def _hyper(op: str, generator: torch.Generator, device: str) -> Case:
    case = hyper_case(generator, lead=(2, 1), n=2, d=3, device=device)
    post, options = (case.branch_output, case.coefficients), case.connection[4:]
    if op == "hyper_post":
        return Case(op, XF.hyper_post, (case.streams, *post))
    pre = tuple(tensor for tensor in case.connection[:4] if tensor is not None)

    def mix(streams: Tensor, *rest: Tensor) -> Tensor:
        connection = Connection(*rest[-4:], *options)
        outputs = getattr(XF, op)(streams, *rest[:-4], connection)
        return torch.cat([output.flatten() for output in outputs])

    return Case(op, mix, (case.streams, *(post if op == "hyper_post_pre" else ()), *pre))
