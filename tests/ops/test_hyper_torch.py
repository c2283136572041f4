"""Tests the hyper operators under autocast, what they keep for the backward, and errors for bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hyper_tools import HyperCase, hyper_case
from operator_table import hyper_arguments
from oracle import fresh_generator, need_native
from xlayer_ext import backend, reference
from xlayer_ext import functional as XF

pytestmark = pytest.mark.operators

OPS = torch.ops.xlayer


@pytest.fixture
def native(device: str) -> str:
    need_native("hyper_post_pre", device)
    return device


@pytest.fixture(params=["native", "reference"])
def choice(request: pytest.FixtureRequest, device: str) -> str:
    if request.param == "native":
        need_native("hyper_post_pre", device)
    return request.param


def boundary(case: HyperCase) -> tuple[Tensor, Tensor, Tensor]:
    return XF.hyper_post_pre(case.streams, case.branch_output, case.coefficients, case.connection)


def leaves(case: HyperCase) -> list[Tensor]:
    tensors = (case.streams, case.branch_output, case.coefficients, *case.connection[:4])
    return [tensor.requires_grad_() for tensor in tensors if tensor is not None]


# ---- PyTorch around it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing_but_takes_its_branch_outputs(choice: str, device: str, dtype: torch.dtype) -> None:
    case = hyper_case(fresh_generator(), device=device).to(torch.float32, dtype)
    with backend(choice), torch.autocast(torch.device(device).type, dtype):
        inside = boundary(case)
    with backend(choice):
        outside = boundary(case)
    for a, b in zip(inside, outside, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_what_is_kept_for_the_backward(native: str) -> None:
    """The forward saves (n+1)·d and O(n²) numbers per token, beside the parameters."""
    n, d, tokens = 4, 256, 32
    case = hyper_case(fresh_generator(), lead=(tokens,), n=n, d=d, device=native).to(torch.float32)
    parameters = {t.data_ptr() for t in leaves(case)[3:]}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), backend("native"):
        boundary(case)
    per_token = sum(kept.values()) / tokens
    assert (n + 1) * d <= per_token <= (n + 1) * d + 4 * n * (n + 2)


def test_more_streams_than_the_kernels_take_run_the_reference(device: str) -> None:
    case = hyper_case(fresh_generator(), kind="dhc", n=17, d=8, lead=(3,), device=device)
    with backend("auto"):
        actual = boundary(case)
    for a, b in zip(actual, reference.hyper_post_pre(*case_arguments(case)), strict=True):
        torch.testing.assert_close(a, b)
    with backend("native"), pytest.raises(RuntimeError, match="n > 16"):
        boundary(case)


def case_arguments(case: HyperCase) -> tuple[Any, ...]:
    return case.streams, case.branch_output, case.coefficients, case.connection


# ---- bad input -------------------------------------------------------------------------------------------------------


def good() -> HyperCase:
    return hyper_case(fresh_generator(), lead=(2, 3), n=4, d=8)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"base": torch.ones(4, 5)}, ValueError, r"base must have shape \[4, 6\] for n = 4, d = 8; got \[4, 5\]"),
        ({"weight": torch.ones(6, 9)}, ValueError, "weight must have shape"),
        ({"bias": torch.ones(4)}, ValueError, "bias must have shape"),
        ({"scale": torch.ones(1)}, ValueError, "scale must have shape"),
        ({"scale": None}, ValueError, "scale must be a tensor"),
        ({"weight": None}, ValueError, "bias and scale belong to a weight"),
        ({"base": torch.ones(4, 6).long()}, TypeError, "base must be a floating-point tensor"),
        ({"base": [1.0]}, TypeError, "base must be a torch.Tensor"),
        ({"base": torch.ones(4, 6, device="meta")}, ValueError, "base must be on the device of streams"),
        ({"norm": "batch"}, ValueError, "norm must be one of layer, rms, rms_all; got 'batch'"),
        ({"form": "relu"}, ValueError, "form must be one of"),
        ({"form": "sinkhorn_rows"}, ValueError, "bias must be None for form sinkhorn_rows"),
        ({"form": "sinkhorn_rows", "bias": None, "sinkhorn_iters": 0}, ValueError, "sinkhorn_iters must be at least 1"),
        ({"eps": -1.0}, ValueError, "eps must not be negative"),
    ],
)
def test_bad_connections_are_named(change: dict[str, Any], error: type[Exception], told: str) -> None:
    case = good()
    with pytest.raises(error, match=told) as raised:
        XF.hyper_pre(case.streams, case.connection._replace(**change))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("position", "value", "error", "told"),
    [
        (0, torch.ones(8), ValueError, r"streams must have shape \[..., n, d\]"),
        (0, torch.ones(2, 3, 0, 8), ValueError, "streams must have shape"),
        (0, torch.ones(2, 3, 4, 8).long(), TypeError, "streams must be a floating-point tensor"),
        (1, torch.ones(2, 3, 9), ValueError, r"branch_output must have shape \[2, 3, 8\]"),
        (1, torch.ones(2, 8), ValueError, "branch_output must have shape"),
        (1, torch.ones(2, 3, 8).int(), TypeError, "branch_output must be a floating-point tensor"),
        (2, torch.ones(4, 5), ValueError, r"coefficients must have shape \[4, 6\]"),
        (2, torch.ones(2, 4, 4, 6), ValueError, r"coefficients must have shape \[2, 3, 4, 6\]"),
        (2, None, TypeError, "coefficients must be a torch.Tensor"),
    ],
)
def test_bad_arguments_are_named(position: int, value: Any, error: type[Exception], told: str) -> None:
    arguments = list(case_arguments(good()))
    arguments[position] = value
    with pytest.raises(error, match=told) as raised:
        XF.hyper_post(*arguments[:3])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("offset", "value"), [(0, 7), (0, -1), (1, 9), (2, 0), (3, -1.0)], ids=["norm", "norm < 0", "form", "steps", "eps"]
)
def test_options_out_of_range_raise(native: str, offset: int, value: Any) -> None:
    case = hyper_case(fresh_generator(), kind="mhc", lead=(2, 3), device=native).to(torch.float32)
    arguments = list(hyper_arguments(case)["hyper_pre"])
    arguments[5 + offset] = value
    with pytest.raises(RuntimeError):
        OPS.hyper_pre(*arguments)


def test_more_streams_than_16_are_refused_by_the_operators(native: str) -> None:
    with pytest.raises(RuntimeError, match="streams must number 1 to 16"):
        OPS.hyper_post(torch.zeros(1, 1, 17, 4), torch.zeros(1, 1, 4), torch.zeros(17, 19))
