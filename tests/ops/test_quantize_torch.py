"""The quantize operators among the rest of PyTorch: opcheck, compile, export, autocast; and what bad input gets."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from oracle import draw, fresh_generator, need_native
from xlayer_ext import backend
from xlayer_ext import functional as XF
from xlayer_ext.functional.quantize import _operator_levels
from xlayer_ext.nn import FSQ, VectorQuantizer

pytestmark = pytest.mark.operators

OPS = torch.ops.xlayer
LEVELS = [8, 5, 5]
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


def operator_calls(device: str, dtype: torch.dtype, bound: str = "offset") -> dict[str, tuple[Any, ...]]:
    """Returns valid arguments for each of the three operators."""
    generator = fresh_generator()
    x, codebook = (draw(generator, 2, rows, 12, dtype=dtype).to(device) for rows in (9, 7))
    z = draw(generator, 4, 6, len(LEVELS), dtype=dtype).to(device)
    levels = _operator_levels(LEVELS, bound, "package")
    indices = torch.randint(-1, 7, (2, 9), generator=generator).to(device)
    return {
        "vq_nearest": (x, codebook, False, False),
        "vq_statistics": (x, indices, 7),
        "fsq": (z, *levels, True),
    }


def everything(x: Tensor, codebook: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    """Calls all operators in one function, with a gradient to z."""
    indices, distance = XF.vq_nearest(x, codebook)
    counts, sums = XF.vq_statistics(x, indices, codebook.shape[-2])
    codes, numbers = XF.fsq(z, LEVELS, bound="offset")
    return indices, distance, counts, sums, codes * codes, numbers


def inputs(
    generator: torch.Generator, device: str, rows: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    x, codebook, z = (draw(generator, *shape, dtype=dtype) for shape in ((rows, 12), (rows + 3, 12), (2, rows, 3)))
    return x.to(device), codebook.to(device), z.to(device).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.traced
def test_opcheck(native: str, bound: str, dtype: torch.dtype) -> None:
    for name, arguments in operator_calls(native, dtype, bound).items():
        arguments = tuple(
            t.requires_grad_(name == "fsq") if isinstance(t, Tensor) and t.is_floating_point() else t for t in arguments
        )
        torch.library.opcheck(getattr(OPS, name), arguments)


@pytest.mark.traced
def test_compile_makes_one_graph_for_all_lengths(choice: str, device: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend="aot_eager")
    generator = fresh_generator()
    with backend(choice):
        for rows in (5, 7, 11, 6):
            arguments = inputs(generator, device, rows)
            actual, expected = compiled(*arguments), everything(*arguments)
            grads = (torch.autograd.grad(out[4].sum(), arguments[2])[0] for out in (actual, expected))
            for a, b in zip((*actual, next(grads)), (*expected, next(grads)), strict=True):
                torch.testing.assert_close(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.traced
def test_compiled_function_follows_the_backend(native: str) -> None:
    torch._dynamo.reset()
    codes: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        codes.append(graph.code)
        return graph

    compiled = torch.compile(XF.vq_nearest, fullgraph=True, backend=keep)
    x, codebook, _ = inputs(fresh_generator(), native, 5)
    for chosen in ("native", "reference", "native"):
        with backend(chosen):
            compiled(x, codebook)
    assert ["xlayer.vq_nearest" in code for code in codes] == [True, False]


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


@pytest.mark.traced
def test_export_with_dynamic_lengths(choice: str, device: str) -> None:
    class Net(torch.nn.Module):
        def forward(self, x: Tensor, codebook: Tensor, z: Tensor) -> Any:
            return everything(x, codebook, z)

    generator = fresh_generator()
    rows, codes, tokens = (torch.export.Dim(name, min=2, max=64) for name in ("rows", "codes", "tokens"))
    shapes = ({0: rows}, {0: codes}, {1: tokens})

    def arguments(count: int) -> tuple[Tensor, ...]:
        return tuple(t.detach() for t in inputs(generator, device, count))

    with backend(choice):
        program = torch.export.export(Net(), arguments(5), dynamic_shapes=shapes)
        other = arguments(11)
        for actual, expected in zip(program.module()(*other), Net()(*other), strict=True):
            torch.testing.assert_close(actual, expected)
    assert ("xlayer" in program.graph_module.code) == (choice == "native")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_float32(choice: str, device: str, dtype: torch.dtype) -> None:
    x, codebook, z = inputs(fresh_generator(), device, 20)
    with backend(choice), torch.autocast(torch.device(device).type, dtype):
        inside = everything(x, codebook.to(dtype), z)
        rounded = everything(x.to(dtype), codebook.to(dtype), z.to(dtype))
    with backend(choice):
        outside = everything(x, codebook.to(dtype).float(), z)
        widened = everything(x.to(dtype).float(), codebook.to(dtype).float(), z.to(dtype).float())
    for actual, expected in ((inside, outside), (rounded, widened)):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(actual, expected, strict=True))


def test_searches_and_statistics_have_no_gradient(choice: str, device: str) -> None:
    x, codebook, _ = inputs(fresh_generator(), device, 5)
    with backend(choice):
        outputs = everything(x.requires_grad_(), codebook.requires_grad_(), torch.zeros(1, 3, device=device))
    assert not any(out.requires_grad for out in outputs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit(native: str, reentrant: bool) -> None:
    x, codebook, z = inputs(fresh_generator(), native, 8)
    (plain,) = torch.autograd.grad(everything(x, codebook, z)[4].sum(), z)
    checkpoint(lambda z: everything(x, codebook, z)[4], z, use_reentrant=reentrant).sum().backward()
    assert torch.equal(z.grad, plain)


def test_second_derivative_raises_one_clear_line(native: str) -> None:
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


def test_meta_tensors_have_the_right_shape() -> None:
    outputs = everything(*(t.detach().to("meta") for t in inputs(fresh_generator(), "cpu", 5)))
    shapes = [(5,), (5,), (8,), (8, 12), (2, 5, 3), (2, 5)]
    assert [tuple(out.shape) for out in outputs] == shapes


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


def test_operators_called_with_nonsense_raise(native: str) -> None:
    for name, arguments in operator_calls(native, torch.float32).items():
        op = getattr(OPS, name)
        op(*arguments)
        tensors = [index for index, value in enumerate(arguments) if isinstance(value, Tensor)]
        for index, wrong in itertools.product(tensors, ("rank", "size", "dtype", "meta")):
            if name == "fsq" and wrong in ("rank", "meta"):
                continue  # it takes any rank, and one tensor alone may be on any device
            value = arguments[index]
            bad = {
                "rank": value.unsqueeze(0),
                "size": torch.zeros([size + 1 for size in value.shape], dtype=value.dtype, device=native),
                "dtype": value.to(torch.int16),
                "meta": value.to("meta"),
            }[wrong]
            with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
                op(*arguments[:index], bad, *arguments[index + 1 :])


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
