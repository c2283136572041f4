"""Cases of the aggregation operators: fresh random inputs, and states and gradients of one case on either backend."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from oracle import Draw, Results, draw
from xlayer_ext import backend
from xlayer_ext import functional as XF

OPERATORS = ("ema_scan", "depth_gru", "depth_attention")
WIDE = ("gate_logits", "norm_weight", "norm_bias")  # in what is accumulated in


@dataclass(frozen=True)
class AggregateCase:
    """Arguments of one call of ``op``, and the gradient that comes to its states."""

    op: str
    tensors: dict[str, Tensor]
    grad: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> AggregateCase:
        """Converts taps, states and matrices to ``dtype``."""
        wide = torch.promote_types(dtype, torch.float32)
        tensors = {name: t.to(wide if name in WIDE else dtype) for name, t in self.tensors.items()}
        return replace(self, tensors=tensors, grad=self.grad.to(dtype))

    def with_tensors(self, **tensors: Tensor) -> AggregateCase:
        return replace(self, tensors=self.tensors | tensors)


def aggregate_case(
    generator: torch.Generator,
    op: str,
    size: tuple[int, int, int] = (5, 19, 24),
    *,
    inputs: int | None = None,
    device: str = "cpu",
    initial_state: bool = True,
    norm: str = "affine",
    scale: float = 1.0,
    **options: Any,
) -> AggregateCase:
    """Draws a case; ``size`` is (L, N, d), ``inputs`` the width of the taps, d by default; ``norm``: none, weight,
    affine."""
    layers, tokens, width = size
    inputs = width if inputs is None or op == "ema_scan" else inputs
    tensors = {"x": scale * draw(generator, layers, tokens, inputs)}
    if op == "ema_scan":
        tensors["gate_logits"] = draw(generator, layers)
        if norm != "none":
            tensors["norm_weight"] = 1 + draw(generator, width) / 2
        if norm == "affine":
            tensors["norm_bias"] = draw(generator, width)
    elif op == "depth_gru":
        tensors |= {
            "weight_ih": draw(generator, 3 * width, inputs) / max(inputs, 1) ** 0.5,
            "weight_hh": draw(generator, 3 * width, width) / max(width, 1) ** 0.5,
            "bias_ih": draw(generator, 3 * width),
            "bias_hh": draw(generator, 3 * width),
        }
    else:
        options = {"num_heads": 2, "window": 3} | options
        inner = options["num_heads"] * 5
        tensors |= {
            "weight_query": draw(generator, inner, width) / max(width, 1) ** 0.5,
            "weight_key": draw(generator, inner, inputs) / max(inputs, 1) ** 0.5,
            "weight_value": draw(generator, inner, inputs) / max(inputs, 1) ** 0.5,
            "weight_out": draw(generator, width, inner) / inner**0.5,
        }
    if initial_state:
        tensors["initial_state"] = draw(generator, tokens, width)
    shape = (tokens, width) if options.get("last_only") else (layers, tokens, width)
    tensors = {name: t.to(device) for name, t in tensors.items()}
    return AggregateCase(op, tensors, draw(generator, *shape).to(device), options)


def evaluate(case: AggregateCase, choice: str = "native") -> Results:
    """Returns the states and every gradient, by name."""
    leaves = {name: t.detach().requires_grad_() for name, t in case.tensors.items()}
    with backend(choice):
        states = getattr(XF, case.op)(**leaves, **case.options)
        grads = torch.autograd.grad(states, list(leaves.values()), case.grad, materialize_grads=True)
    return {"states": states.detach()} | {f"grad_{name}": g for name, g in zip(leaves, grads, strict=True)}


def draw_of(case: AggregateCase) -> Draw:
    """Evaluates the case on the kernels, in float64 and by the plain formula."""
    return Draw(evaluate(case), evaluate(case.to(torch.float64), "reference"), evaluate(case, "reference"))
