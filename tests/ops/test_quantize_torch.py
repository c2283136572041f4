"""Tests the quantize operators under autocast, what they keep for the backward, and errors for bad arguments."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from operator_table import LEVELS, draw_quantize, quantize_chain
from oracle import draw, fresh_generator, need_native
from xlayer_ext import backend
from xlayer_ext import functional as XF
from xlayer_ext.functional.quantize import _operator_levels
from xlayer_ext.nn import FSQ, VectorQuantizer

pytestmark = pytest.mark.operators

OPS = torch.ops.xlayer
BOUNDS = ("tanh", "offset")


@pytest.fixture
def native(device: str) -> str:
    need_native("vq_nearest", device)
    return device


@pytest.fixture(params=["native", "reference"])
def choice(request: pytest.FixtureRequest, device: str) -> str:
    if request.param == "native":
        need_native("vq_nearest", device)
    return request.param


@pytest.mark.parametrize(
    "module", [FSQ([5, 4, 3], hidden_size=8), VectorQuantizer(8, 6, num_codebooks=2).eval()], ids=type
)
@pytest.mark.traced
def test_exported_modules_are_saved_and_loaded(device: str, module: torch.nn.Module) -> None:
    module, x = module.to(device), draw(fresh_generator(), 2, 5, 8, dtype=torch.float32).to(device)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(module, (x,), dynamic_shapes=({1: tokens},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    longer = torch.cat([x, -x], 1)
    actual, expected = torch.export.load(file).module()(longer), module(longer)
    assert type(actual) is type(expected)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_float32(choice: str, device: str, dtype: torch.dtype) -> None:
    x, codebook, z = (t.to(device) for t in draw_quantize(fresh_generator(), torch.float32, 20, 23, 20))
    z.requires_grad_()
    with backend(choice), torch.autocast(torch.device(device).type, dtype):
        inside = quantize_chain(x, codebook.to(dtype), z)
        rounded = quantize_chain(x.to(dtype), codebook.to(dtype), z.to(dtype))
    with backend(choice):
        outside = quantize_chain(x, codebook.to(dtype).float(), z)
        widened = quantize_chain(x.to(dtype).float(), codebook.to(dtype).float(), z.to(dtype).float())
    for actual, expected in ((inside, outside), (rounded, widened)):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(actual, expected, strict=True))


def test_searches_and_statistics_have_no_gradient(choice: str, device: str) -> None:
    x, codebook, _ = (t.to(device) for t in draw_quantize(fresh_generator(), torch.float32, 5, 8, 5))
    with backend(choice):
        outputs = quantize_chain(x.requires_grad_(), codebook.requires_grad_(), torch.zeros(1, 3, device=device))
    assert not any(out.requires_grad for out in outputs)


def test_second_derivative_of_fsq_raises_one_clear_line(native: str) -> None:
    """Asking for the graph of the first raises."""
    z = torch.randn(4, 3, device=native, requires_grad=True)
    loss = XF.fsq(z, LEVELS)[0].square().sum()
    with pytest.raises(RuntimeError, match="second derivative") as raised:
        torch.autograd.grad(loss, z, create_graph=True)
    assert "\n" not in str(raised.value)


def test_gradient_of_what_kept_nothing_raises_one_clear_line(native: str) -> None:
    z, levels = torch.randn(4, 3, device=native, requires_grad=True), _operator_levels(LEVELS, "tanh", "package")
    codes, _, slope = OPS.fsq(z, *levels, False)
    assert slope.shape == (0,)
    with pytest.raises(RuntimeError, match="keep=False") as raised:
        codes.sum().backward()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("width", [3, 8])
def test_keeping_the_slope_changes_no_code(native: str, width: int, bound: str, dtype: torch.dtype) -> None:
    z = draw(fresh_generator(), 700, width, dtype=dtype).to(native)
    levels = _operator_levels([7] * width, bound, "package")
    (*kept, slope), (*plain, _) = (OPS.fsq(z, *levels, keep) for keep in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(kept, plain, strict=True))
    assert slope.shape == z.shape and slope.dtype == dtype and (slope >= 0).all()


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_slope_of_extremes(choice: str, device: str, dtype: torch.dtype, bound: str) -> None:
    """The gradient of saturated numbers is 0, not inf·0; that of a NaN is NaN."""
    infinity = float("inf")
    z = torch.tensor([[float("nan"), infinity], [-infinity, 1e30], [-1e30, -100.0], [100.0, 0.0]], dtype=dtype)
    z = z.to(device).requires_grad_()
    with backend(choice):
        (grad,) = torch.autograd.grad(XF.fsq(z, [5, 5], bound=bound)[0].sum(), z)
    assert grad[0, 0].isnan() and grad[3, 1] > 0.9
    assert grad.flatten()[1:-1].abs().amax() < 1e-30


def test_what_is_kept_for_the_backward_of_fsq(native: str) -> None:
    kept: list[Tensor] = []
    z = torch.randn(10, 3, device=native, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), backend("native"):
        codes, _ = XF.fsq(z, LEVELS)
        assert [t.shape for t in kept] == [z.shape]
        codes.sum().backward()
        assert torch.equal(kept[0], z.grad)  # the slope alone, not z
        with torch.no_grad():
            XF.fsq(z, LEVELS)
        XF.fsq(z.detach(), LEVELS)
    assert len(kept) == 1


# ---- bad input -------------------------------------------------------------------------------------------------------

X, BOOK, INDICES = torch.ones(4, 3), torch.ones(5, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda: XF.vq_nearest(X.long(), BOOK), TypeError, "x must be a floating-point tensor, got torch.int64"),
        (lambda: XF.vq_nearest(X, [1.0]), TypeError, "codebook must be a torch.Tensor, got list"),
        (lambda: XF.vq_nearest(X, BOOK.double()), TypeError, "codebook must have the dtype of x"),
        (lambda: XF.vq_nearest(X, BOOK.to("meta")), ValueError, "codebook must be on the device of x"),
        (lambda: XF.vq_nearest(X, torch.ones(5, 2)), ValueError, r"width of x, 3; got \[5, 2\]"),
        (lambda: XF.vq_nearest(X, torch.ones(0, 3)), ValueError, "at least one code"),
        (lambda: XF.vq_nearest(torch.ones(4, 0), torch.ones(5, 0)), ValueError, "one column"),
        (lambda: XF.vq_nearest(X[0], BOOK), ValueError, r"must have shapes \[N, D\] and \[K, D\]"),
        (lambda: XF.vq_nearest(X[None], BOOK), ValueError, r"got \[1, 4, 3\] and \[5, 3\]"),
        (lambda: XF.vq_nearest(torch.ones(2, 4, 3), BOOK[None]), ValueError, "must have shapes"),
        (lambda: XF.vq_nearest(X, BOOK, metric="dot"), ValueError, "metric must be one of euclidean, cosine; got"),
        (lambda: XF.vq_statistics(X.long(), INDICES, 5), TypeError, "x must be a floating-point tensor"),
        (lambda: XF.vq_statistics(X, INDICES.int(), 5), TypeError, "indices must be an int64 tensor, got torch.int32"),
        (lambda: XF.vq_statistics(X, [0], 5), TypeError, "indices must be an int64 tensor, got list"),
        (lambda: XF.vq_statistics(X, INDICES[:3], 5), ValueError, r"got \[4, 3\] and \[3\]"),
        (lambda: XF.vq_statistics(X, INDICES.to("meta"), 5), ValueError, "indices must be on the device of x"),
        (lambda: XF.vq_statistics(X, INDICES, 0), ValueError, "codebook_size must be at least 1, got 0"),
        (lambda: XF.fsq(X.long(), LEVELS), TypeError, "z must be a floating-point tensor"),
        (lambda: XF.fsq(X, [8, 5]), ValueError, r"z must have shape \[..., 2\]"),
        (lambda: XF.fsq(X, []), ValueError, "levels must name at least one dimension"),
        (lambda: XF.fsq(X, [8, 5, 1]), ValueError, "levels must be between 2 and 1048576 for bound tanh, got 1"),
        (lambda: XF.fsq(X, [8, 5, 2], bound="offset"), ValueError, "between 3 and 1048576 for bound offset, got 2"),
        (lambda: XF.fsq(X, [8, 5, 2.0]), TypeError, "levels must be whole numbers, got 2.0"),
        (lambda: XF.fsq(X, LEVELS, bound="sine"), ValueError, "bound must be one of tanh, offset"),
        (lambda: XF.fsq(X, LEVELS, variant="old"), ValueError, "variant must be one of package, paper"),
        (lambda: XF.fsq_codes_to_indices(X, [8, 5]), ValueError, r"codes must have shape \[..., 2\]"),
        (lambda: XF.fsq_indices_to_codes(X, LEVELS), TypeError, "indices must be an int64 tensor"),
        (lambda: XF.fsq_indices_to_codes(INDICES, [2] * 64), ValueError, r"indices must be digits, \[..., 64\]"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told) as raised:
        call()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("levels", "told"),
    [
        (([8, 5, 1], [], [], [], False), "levels must be between 2"),
        (([8, 5, 2**20 + 1], [], [], [], False), "levels must be between 2"),
        (([8, 5, 2], [0.0] * 3, [1.0] * 3, [0.0] * 3, True), "levels must be between 3"),
        (([8, 5, 5], [0.0] * 2, [1.0] * 3, [0.0] * 3, True), "must have 3 entries, got 2"),
        (([8, 5, 5], [0.0] * 3, [], [], False), "must have 0 entries, got 3"),
        (([8, 5], [], [], [], False), "a column for each of the 2 levels, got 3"),
        (([], [], [], [], False), "levels must have 1 to 64 entries, got 0"),
        (([2] * 65, [], [], [], False), "levels must have 1 to 64 entries, got 65"),
    ],
)
def test_levels_out_of_range_raise(native: str, levels: tuple[Any, ...], told: str) -> None:
    z = torch.ones(2, 3, device=native)
    for keep in (False, True):
        with pytest.raises(RuntimeError, match=told):
            OPS.fsq(z, *levels, keep)


def test_codes_below_one_are_refused_by_the_operators(native: str) -> None:
    with pytest.raises(RuntimeError, match="codebook_size must be at least 1"):
        OPS.vq_statistics(torch.ones(1, 4, 3, device=native), torch.zeros(1, 4, dtype=torch.int64, device=native), 0)
    with pytest.raises(RuntimeError, match="at least one code"):
        OPS.vq_nearest(torch.ones(1, 4, 3, device=native), torch.ones(1, 0, 3, device=native), False, False)
