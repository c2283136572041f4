"""Cases of the hyper operators: fresh random inputs, and outputs and gradients of one case on either backend."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from oracle import Results, draw
from xlayer_ext import backend, reference
from xlayer_ext import functional as XF
from xlayer_ext.functional import Connection

# (norm, form, affine bias) of every way that coefficients come about; None: static
KINDS: dict[str, tuple[str, str, bool] | None] = {
    "shc": None,
    "dhc": ("layer", "tanh", True),
    "dhc-linear": ("layer", "identity", True),
    "dhc-rms": ("rms", "tanh", False),
    "mhc": ("rms_all", "sinkhorn_rows", False),
    "mhc-per-stream": ("rms", "sinkhorn_columns", False),
    "all-tanh": ("rms_all", "tanh", False),
}
PARTS = ("pre", "post", "post_pre")


@dataclass(frozen=True)
class HyperCase:
    """Arguments of one call of ``part``; ``grads`` are the gradients that come to its outputs, in their order."""

    part: str
    streams: Tensor
    connection: Connection
    branch_output: Tensor
    coefficients: Tensor
    grads: dict[str, Tensor]
    use: tuple[str, ...]  # the outputs that a loss depends on
    packed: bool = False

    def to(self, dtype: torch.dtype, branch_dtype: torch.dtype | None = None) -> HyperCase:
        """Converts streams to ``dtype``, parameters and coefficients to the accumulation type."""
        wide = torch.promote_types(dtype, torch.float32)
        tensors = (None if t is None else t.to(wide) for t in self.connection[:4])
        return replace(
            self,
            streams=self.streams.to(dtype),
            branch_output=self.branch_output.to(branch_dtype or dtype),
            coefficients=self.coefficients.to(wide),
            connection=Connection(*tensors, *self.connection[4:]),
            grads={k: g.to(wide if k == "coefficients" else dtype) for k, g in self.grads.items()},
        )


def hyper_case(
    generator: torch.Generator,
    part: str = "post_pre",
    kind: str = "dhc",
    *,
    lead: tuple[int, ...] = (2, 5),
    n: int = 4,
    d: int = 33,
    device: str = "cpu",
    shared: bool = False,
    packed: bool = False,
    use: tuple[str, ...] = ("streams", "branch_input", "coefficients"),
    eps: float = 1e-5,
    offset: float = 0.5,
) -> HyperCase:
    """Draws normal inputs with coefficients that are far from the identity; streams have a mean of ``offset``.

    ``shared``: one set of coefficients for post, for all tokens. ``packed``: n lies in the batch, ``[(b n), s, d]``.
    """

    def normal(*shape: int, gain: float = 1.0) -> Tensor:
        return (gain * draw(generator, *shape)).to(device)

    streams = normal(*lead, n, d) + offset
    base = normal(n, n + 2)
    connection = Connection(base)
    if (chosen := KINDS[kind]) is not None:
        norm, form, affine = chosen
        shape = (n * (n + 2), n * d) if norm == "rms_all" else (n + 2, d)
        weight = normal(*shape, gain=shape[1] ** -0.5)
        bias = normal(n + 2, gain=0.3) if affine else None
        connection = Connection(base, weight, bias, normal(n + 2), norm, form, 20, eps)
    coefficients = normal(n, n + 2) if shared else normal(*lead, n, n + 2)
    static = connection.weight is None
    grads = {
        "streams": normal(*lead, n, d),
        "branch_input": normal(*lead, d),
        "coefficients": normal(n, n + 2) if static else normal(*lead, n, n + 2),
    }
    return HyperCase(part, streams, connection, normal(*lead, d), coefficients, grads, use, packed)


def pack(streams: Tensor) -> Tensor:
    """Moves n outside of S in memory; the shape ``[..., S, n, d]`` stays the same."""
    return streams.transpose(-2, -3).contiguous().transpose(-2, -3)


def evaluate(case: HyperCase, functions: Any) -> Results:
    """Returns the outputs and the gradients of every tensor of the case, from the hyper_* of ``functions``."""
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        leaves[name] = tensor.detach().requires_grad_()
        return leaves[name]

    streams: Any = leaf("streams", pack(case.streams) if case.packed else case.streams)
    outputs: dict[str, Tensor] = {}
    if case.part != "pre":
        branch: Any = leaf("branch_output", case.branch_output)
        mixed: Any = leaf("post_coefficients", case.coefficients)
    if case.part != "post":
        names = ("base", "weight", "bias", "scale")
        tensors: Any = [leaf(name, t) for name, t in zip(names, case.connection[:4], strict=True)]
        connection = Connection(*tensors, *case.connection[4:])
    if case.part == "pre":
        outputs["branch_input"], outputs["coefficients"] = functions.hyper_pre(streams, connection)
    elif case.part == "post":
        outputs["streams"] = functions.hyper_post(streams, branch, mixed)
    else:
        values = functions.hyper_post_pre(streams, branch, mixed, connection)
        outputs = dict(zip(("streams", "branch_input", "coefficients"), values, strict=True))
    used = [name for name in outputs if name in case.use]
    grads = torch.autograd.grad(
        [outputs[name] for name in used],
        list(leaves.values()),
        [case.grads[name] for name in used],
        materialize_grads=True,
    )
    results = {name: tensor.detach() for name, tensor in outputs.items()}
    return results | {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def evaluate_native(case: HyperCase, choice: str = "native") -> Results:
    with backend(choice):
        return evaluate(case, XF)


def evaluate_formula(case: HyperCase) -> Results:
    return evaluate(case, reference)


def all_cases(filter_: Callable[[str, str], bool] = lambda part, kind: True) -> list[tuple[str, str]]:
    """Lists every (part, kind); post alone has no kind of its own."""
    return [(p, k) for p, k in itertools.product(PARTS, KINDS) if (p != "post" or k == "shc") and filter_(p, k)]
