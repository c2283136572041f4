"""The operators under torch.func, forward-mode differentiation, torch.compile of both, and with fake tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from aggregate_tools import aggregate_case
from oracle import draw, fresh_generator, hdim_case, need_native
from hyper_tools import hyper_case
from xlayer_ext import backend
from xlayer_ext import functional as XF
from xlayer_ext.functional import Connection
from xlayer_ext.nn import FSQ, LayerRouter, VectorQuantizer

NATIVE_GRADIENTS = (
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
    """A function of one tensor per differentiable argument that returns one tensor, and where to take it."""

    function: Callable[..., Tensor]
    arguments: tuple[Tensor, ...]


def make(op: str, device: str) -> Case:
    """Small, float64, and away from kinks."""
    generator = fresh_generator()
    if op == "masked_mean":
        mask = torch.tensor([[True, True, False], [True, True, True]], device=device)
        return Case(lambda x: XF.masked_mean(x, mask), (draw(generator, 2, 3, 2).to(device),))
    if op == "fsq":
        return Case(lambda z: XF.fsq(z, [5, 4])[0], (draw(generator, 3, 2).to(device),))
    if op == "hdim_attention":
        case = hdim_case(generator, sizes=(2, 2, 3, 2, 4, 3), device=device, key_mask=True, activation="gelu")
        # The last one has the derivative 0 in the formula, too.
        names = ("query", "key", "value", "weight1", "bias1", "weight2")
        rest = {"bias2": case.floats["bias2"], **case.masks, **case.options}
        query = case.floats["query"] + 0.3  # ties are kinks
        return Case(
            lambda *floats: XF.hdim_attention(**dict(zip(names, floats, strict=True)), **rest),
            (query, *(case.floats[name] for name in names[1:])),
        )
    if op.startswith("hyper"):
        case = hyper_case(generator, lead=(2, 1), n=2, d=3, device=device)
        post = (case.branch_output, case.coefficients)
        options = case.connection[4:]
        if op == "hyper_post":
            return Case(XF.hyper_post, (case.streams, *post))

        def with_pre(streams: Tensor, *rest: Tensor) -> Tensor:
            connection = Connection(*rest[-4:], *options)
            function = XF.hyper_pre if op == "hyper_pre" else XF.hyper_post_pre
            outputs = function(streams, *rest[:-4], connection)
            return torch.cat([output.flatten() for output in outputs])

        return Case(with_pre, (case.streams, *(post if op == "hyper_post_pre" else ()), *case.connection[:4]))
    case = aggregate_case(generator, op, (3, 2, 4), device=device)
    names = tuple(case.tensors)
    return Case(
        lambda *tensors: getattr(XF, op)(**dict(zip(names, tensors, strict=True)), **case.options),
        tuple(case.tensors.values()),
    )


@pytest.fixture(params=OPERATORS)
def case(request: pytest.FixtureRequest, device: str) -> Case:
    need_native(request.param, device)
    return make(request.param, device)


def same(transform: Callable[[Case], Any], case: Case) -> None:
    """The transform gives the reference's numbers with the backend left alone."""
    actual = transform(case)
    with backend("reference"):
        expected = transform(case)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert any(tensor.abs().max() > 1e-3 for tensor in torch.utils._pytree.tree_leaves(expected))


def loss(case: Case) -> Callable[..., Tensor]:
    return lambda *arguments: case.function(*arguments).square().sum()


def positions(case: Case) -> tuple[int, ...]:
    return tuple(range(len(case.arguments)))


def batch(case: Case, size: int = 3) -> tuple[Tensor, ...]:
    return tuple(torch.stack([argument * (1 + k / 10) for k in range(size)]) for argument in case.arguments)


def tangents(case: Case) -> tuple[Tensor, ...]:
    return tuple((1 + torch.arange(t.numel(), dtype=t.dtype, device=t.device)).reshape(t.shape) for t in case.arguments)


# ---- forward mode ----------------------------------------------------------------------------------------------------


def dual_tangent(function: Callable[..., Tensor], case: Case) -> Tensor:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(case.arguments, tangents(case), strict=True)]
        tangent = forward_ad.unpack_dual(function(*duals)).tangent
    assert tangent is not None
    return tangent


FORWARD = {
    "jvp": lambda case: jvp(case.function, case.arguments, tangents(case)),
    "jacfwd": lambda case: jacfwd(case.function, positions(case))(*case.arguments),
    "make_dual": lambda case: dual_tangent(case.function, case),
    "compiled make_dual": lambda case: dual_tangent(
        torch.compile(case.function, fullgraph=True, backend="aot_eager"), case
    ),
    "compiled jvp": lambda case: torch.compile(
        lambda *arguments: jvp(case.function, arguments, tangents(case)), fullgraph=True, backend="aot_eager"
    )(*case.arguments),
}
BACKWARD = {
    "grad": lambda case: grad(loss(case), positions(case))(*case.arguments),
    "vjp": lambda case: vjp(case.function, *case.arguments)[1](case.function(*case.arguments)),
    "jacrev": lambda case: jacrev(case.function, positions(case))(*case.arguments),
    "vmap": lambda case: vmap(case.function)(*batch(case)),
    "vmap(grad)": lambda case: vmap(grad(loss(case), positions(case)))(*batch(case)),
    "grad(vmap)": lambda case: grad(lambda *a: vmap(case.function)(*a).square().sum(), positions(case))(*batch(case)),
    "vmap(jacrev)": lambda case: vmap(jacrev(case.function))(*batch(case, 2)),
    "compiled grad": lambda case: torch.compile(grad(loss(case), positions(case)), fullgraph=True, backend="aot_eager")(
        *case.arguments
    ),
    "compiled vmap": lambda case: torch.compile(vmap(case.function), fullgraph=True, backend="aot_eager")(*batch(case)),
}
SECOND = {
    "hessian": lambda case: hessian(loss(case))(*case.arguments),
    "jacrev(jacrev)": lambda case: jacrev(jacrev(loss(case)))(*case.arguments),
    "grad(grad)": lambda case: grad(lambda *a: grad(loss(case))(*a).square().sum())(*case.arguments),
    "jvp(grad)": lambda case: jvp(grad(loss(case)), case.arguments, tangents(case)),
}


@pytest.mark.parametrize("name", (FORWARD | BACKWARD | SECOND).keys())
def test_transforms_give_the_reference(case: Case, name: str) -> None:
    torch._dynamo.reset()
    same((FORWARD | BACKWARD | SECOND)[name], case)
