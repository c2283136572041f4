"""Tests the aggregation operators under autocast, what they keep for the backward, and errors for bad arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from aggregate_tools import OPERATORS, aggregate_case
from operator_table import LAYERS, WIDTH, aggregate_arguments
from oracle import fresh_generator, need_native
from xlayer_ext import backend
from xlayer_ext import functional as XF

pytestmark = pytest.mark.operators

OPS = torch.ops.xlayer


@pytest.fixture
def native(device: str) -> str:
    for op in OPERATORS:
        need_native(op, device)
    return device


@pytest.fixture(params=["native", "reference"])
def choice(request: pytest.FixtureRequest, device: str) -> str:
    if request.param == "native":
        for op in OPERATORS:
            need_native(op, device)
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ema_scan_computes_in_float32_under_autocast(choice: str, device: str, dtype: torch.dtype) -> None:
    case = aggregate_case(fresh_generator(), "ema_scan", (LAYERS, 5, WIDTH), device=device).to(torch.float32)
    rounded = {name: t.to(dtype) for name, t in case.tensors.items()}
    widened = {name: t.float() for name, t in rounded.items()}
    with backend(choice):
        expected = XF.ema_scan(**widened)
        with torch.autocast(torch.device(device).type, dtype):
            actual = XF.ema_scan(**rounded)
    assert actual.dtype == torch.float32 and torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", ["depth_gru", "depth_attention"])
def test_recurrences_compute_in_autocasts_dtype(choice: str, device: str, op: str, dtype: torch.dtype) -> None:
    case = aggregate_case(fresh_generator(), op, (LAYERS, 5, WIDTH), device=device).to(torch.float32)
    with torch.autocast(torch.device(device).type, dtype):
        inside = _states(case, choice)
    outside = _states(case.to(dtype), choice)
    assert inside.dtype == dtype and torch.equal(inside, outside)


def _states(case: Any, choice: str) -> Tensor:
    with backend(choice):
        states: Tensor = getattr(XF, case.op)(**case.tensors, **case.options)
    return states


def test_what_is_kept_for_the_backward(native: str) -> None:
    def kept(op: str, grad: bool) -> int:
        """Counts the numbers per token and layer that the operator itself saves beyond its arguments."""
        case = aggregate_case(fresh_generator(), op, (LAYERS, 5, WIDTH), device=native)
        if grad:
            case.tensors["x"].requires_grad_()
        found: list[Tensor] = []
        given = {t.data_ptr() for t in case.tensors.values()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t), backend("native"):
            getattr(XF, op)(**case.tensors, **case.options)
        new = {t.data_ptr(): t.numel() for t in found if t.data_ptr() not in given and t.numel() >= LAYERS * 5}
        return sum(new.values()) // (LAYERS * 5)

    assert [kept(op, grad=False) for op in OPERATORS] == [0, 0, 0]
    assert kept("ema_scan", grad=True) == 0
    assert kept("depth_gru", grad=True) == WIDTH + 4 * WIDTH  # states; r, z, n and W_hn h
    assert kept("depth_attention", grad=True) == WIDTH + 3 * 10  # states; keys, values and what was attended to


# ---- bad input -------------------------------------------------------------------------------------------------------

X, GATES, D = torch.ones(3, 4, 8), torch.zeros(3), torch.ones(8)
W = torch.ones(24, 8)
K = torch.ones(6, 8)


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda: XF.ema_scan(X.long(), GATES), TypeError, "x must be a floating-point tensor, got torch.int64"),
        (lambda: XF.ema_scan(X, [0.0]), TypeError, "gate_logits must be a torch.Tensor, got list"),
        (lambda: XF.ema_scan(X[0, 0], GATES), ValueError, r"x must have shape \[L, ..., d\], got \[8\]"),
        (lambda: XF.ema_scan(X, GATES[:2]), ValueError, r"gate_logits must have shape \[3\].* got \[2\]"),
        (lambda: XF.ema_scan(X, GATES, X), ValueError, r"initial_state must have shape \[4, 8\]"),
        (lambda: XF.ema_scan(X, GATES, X[0].double()), TypeError, "initial_state must have the dtype of x"),
        (lambda: XF.ema_scan(X, GATES.to("meta")), ValueError, "gate_logits must be on the device of x"),
        (lambda: XF.ema_scan(X, GATES, norm_weight=D[:3]), ValueError, r"norm_weight must have shape \[8\]"),
        (lambda: XF.ema_scan(X, GATES, norm_bias=D), ValueError, "norm_bias needs norm_weight"),
        (lambda: XF.depth_gru(X, W, torch.ones(24, 7)), ValueError, r"weight_hh must have shape \[3d, d\]"),
        (lambda: XF.depth_gru(X, torch.ones(24, 5), W), ValueError, r"weight_ih must have shape \[3d, 8\]"),
        (lambda: XF.depth_gru(X, torch.ones(21, 8), W), ValueError, "weight_ih must have shape"),
        (lambda: XF.depth_gru(X, W, W, torch.ones(8)), ValueError, "bias_ih must have shape"),
        (lambda: XF.depth_gru(X, W, W.double()), TypeError, "weight_hh must have the dtype of x"),
        (lambda: XF.depth_gru(X, W, W, initial_state=X), ValueError, r"initial_state must have shape \[4, 8\]"),
        (lambda: XF.depth_attention(X, K, K, K, K), ValueError, "weight_out must have shape"),
        (lambda: XF.depth_attention(X, K, K[:, :5], K[:, :5], K.T), ValueError, r"weight_key must have shape \[e, 8\]"),
        (lambda: XF.depth_attention(X, K, K, K, K.T, num_heads=4), ValueError, "num_heads must divide e = 6, got 4"),
        (lambda: XF.depth_attention(X, K, K, K, K.T, num_heads=0), ValueError, "num_heads must divide e = 6, got 0"),
        (lambda: XF.depth_attention(X, K, K, K, K.T, window=0), ValueError, "window must be at least 1, got 0"),
        (lambda: XF.depth_attention(X, K, K, K, K.T, X), ValueError, r"initial_state must have shape \[4, 8\]"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_numbers_out_of_range_raise(native: str) -> None:
    calls = aggregate_arguments(native, torch.float32)
    *attention, num_heads, window, scale, keep = calls["depth_attention"]
    for wrong, told in (
        ((0, window), "num_heads must divide"),
        ((5, window), "num_heads must"),
        ((num_heads, 0), "window must"),
    ):
        with pytest.raises(RuntimeError, match=told):
            OPS.depth_attention(*attention, *wrong, scale, keep)
    x, gates, start, _, bias, eps, last = calls["ema_scan"]
    with pytest.raises(RuntimeError, match="norm_bias needs norm_weight"):
        OPS.ema_scan(x, gates, start, None, bias, eps, last)


def test_no_gradient_without_what_is_kept(native: str) -> None:
    for name in ("depth_gru", "depth_attention"):
        *arguments, _ = aggregate_arguments(native, torch.float32)[name]
        states, _ = getattr(OPS, name)(arguments[0].requires_grad_(), *arguments[1:], False)
        with pytest.raises(RuntimeError, match="keep=False: nothing was kept"):
            states.sum().backward()
