"""The aggregation operators among the rest of PyTorch: opcheck, compile, export, autocast; and what bad input gets."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from aggregate_tools import OPERATORS, aggregate_case, evaluate
from oracle import draw, fresh_generator, need_native
from xlayer_ext import backend
from xlayer_ext import functional as XF

pytestmark = pytest.mark.operators

OPS = torch.ops.xlayer
LAYERS, WIDTH = 3, 12


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


def operator_calls(device: str, dtype: torch.dtype, initial_state: bool = True) -> dict[str, tuple[Any, ...]]:
    """Returns valid arguments for each of the six operators."""
    generator, wide = fresh_generator(), torch.promote_types(dtype, torch.float32)

    def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return draw(generator, *shape, dtype=dtype).to(device)

    rows = (LAYERS, 5, WIDTH)
    start = make(*rows[1:]) if initial_state else None
    ema = (make(*rows), make(LAYERS, dtype=wide), start, make(WIDTH, dtype=wide), make(WIDTH, dtype=wide), 1e-5, False)
    square = (3 * WIDTH, WIDTH)
    gru = (make(*rows), make(*square), make(*square))
    taps = (make(*rows), make(*rows), make(WIDTH, WIDTH), make(WIDTH, WIDTH), start, 2, 2, 0.5)
    return {
        "ema_scan": ema,
        "ema_scan_backward": (make(*rows), *ema),
        "depth_gru": (*gru, make(3 * WIDTH), make(3 * WIDTH), start, True),
        "depth_gru_backward": (make(*rows), make(*rows), make(*rows[:2], 4, WIDTH), *gru, start),
        "depth_attention": (*taps, True),
        "depth_attention_backward": (make(*rows), make(*rows), make(*rows), *taps),
    }


def parameters(generator: torch.Generator, device: str, dtype: torch.dtype = torch.float32) -> dict[str, list[Tensor]]:
    shapes = {
        "ema": [(LAYERS,), (WIDTH,), (WIDTH,)],
        "gru": [(3 * WIDTH, WIDTH)] * 2 + [(3 * WIDTH,)] * 2,
        "attention": [(WIDTH, WIDTH)] * 4,
    }
    return {
        name: [(draw(generator, *shape, dtype=dtype) / 4).to(device) for shape in many] for name, many in shapes.items()
    }


def everything(x: Tensor, ema: list[Tensor], gru: list[Tensor], attention: list[Tensor]) -> Tensor:
    """Calls all operators in a row."""
    gates, weight, bias = ema
    states = XF.ema_scan(x, gates, norm_weight=weight, norm_bias=bias)
    states = XF.depth_attention(XF.depth_gru(states, *gru), *attention, num_heads=2, window=2)
    return states * XF.ema_scan(x, gates, last_only=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("initial_state", [True, False])
@pytest.mark.traced
def test_opcheck(native: str, initial_state: bool, dtype: torch.dtype) -> None:
    for name, arguments in operator_calls(native, dtype, initial_state).items():
        given = tuple(
            t.requires_grad_("backward" not in name) if isinstance(t, Tensor) and t.is_floating_point() else t
            for t in arguments
        )
        torch.library.opcheck(getattr(OPS, name), given)


@pytest.mark.traced
def test_compile_makes_one_graph_for_all_lengths(choice: str, device: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend="aot_eager")
    generator = fresh_generator()
    given = parameters(generator, device)
    with backend(choice):
        for tokens in (5, 7, 11, 6):
            x = draw(generator, LAYERS, tokens, WIDTH, dtype=torch.float32).to(device).requires_grad_()
            sides = [call(x, **given) for call in (compiled, everything)]
            grads = [torch.autograd.grad(states.square().sum(), x)[0] for states in sides]
            torch.testing.assert_close(*sides)
            torch.testing.assert_close(*grads)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.traced
def test_compiled_function_follows_the_backend(native: str) -> None:
    torch._dynamo.reset()
    codes: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        codes.append(graph.code)
        return graph

    compiled = torch.compile(XF.ema_scan, fullgraph=True, backend=keep)
    x, gates = torch.randn(LAYERS, 5, WIDTH, device=native), torch.randn(LAYERS, device=native)
    for chosen in ("native", "reference", "native"):
        with backend(chosen):
            compiled(x, gates)
    assert ["xlayer.ema_scan" in code for code in codes] == [True, False]


@pytest.mark.traced
def test_export_with_dynamic_lengths(choice: str, device: str) -> None:
    class Net(torch.nn.Module):
        def forward(self, x: Tensor, ema: list[Tensor], gru: list[Tensor], attention: list[Tensor]) -> Tensor:
            return everything(x, ema, gru, attention)

    generator = fresh_generator()
    given = parameters(generator, device)
    unchanging = {name: [None] * len(many) for name, many in given.items()}
    shapes = ({1: torch.export.Dim("tokens", min=2, max=64)}, *unchanging.values())

    def arguments(tokens: int) -> tuple[Any, ...]:
        return draw(generator, LAYERS, tokens, WIDTH, dtype=torch.float32).to(device), *given.values()

    with backend(choice):
        program = torch.export.export(Net(), arguments(5), dynamic_shapes=shapes)
        other = arguments(11)
        torch.testing.assert_close(program.module()(*other), Net()(*other))
    assert ("xlayer" in program.graph_module.code) == (choice == "native")


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


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit(native: str, op: str, reentrant: bool) -> None:
    case = aggregate_case(fresh_generator(), op, (LAYERS, 5, WIDTH), device=native)
    expected = evaluate(case)
    leaves = {name: t.detach().clone().requires_grad_() for name, t in case.tensors.items()}

    def call(*given: Tensor) -> Tensor:
        states: Tensor = getattr(XF, op)(**dict(zip(leaves, given, strict=True)), **case.options)
        return states

    checkpoint(call, *leaves.values(), use_reentrant=reentrant).backward(case.grad)
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, expected[f"grad_{name}"]), name


@pytest.mark.parametrize("op", OPERATORS)
def test_second_derivative_raises_one_clear_line(native: str, op: str) -> None:
    case = aggregate_case(fresh_generator(), op, (LAYERS, 5, WIDTH), device=native)
    x = case.tensors["x"].requires_grad_()
    states = getattr(XF, op)(**case.tensors, **case.options)
    (grad,) = torch.autograd.grad(states.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative") as raised:
        grad.sum().backward()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("op", OPERATORS)
def test_meta_tensors_have_the_right_shape(op: str) -> None:
    case = aggregate_case(fresh_generator(), op, (LAYERS, 5, WIDTH), inputs=7, device="meta")
    assert getattr(XF, op)(**case.tensors, **case.options).shape == (LAYERS, 5, WIDTH)


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


def test_operators_called_with_nonsense_raise(native: str) -> None:
    for name, arguments in operator_calls(native, torch.float32).items():
        op = getattr(OPS, name)
        op(*arguments)
        tensors = [index for index, value in enumerate(arguments) if isinstance(value, Tensor)]
        for index, wrong in itertools.product(tensors, ("rank", "size", "dtype", "meta")):
            value = arguments[index]
            bad = {
                "rank": value.unsqueeze(0),
                "size": torch.zeros([size + 1 for size in value.shape], dtype=value.dtype, device=native),
                "dtype": value.to(torch.int16),
                "meta": value.to("meta"),
            }[wrong]
            with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
                op(*arguments[:index], bad, *arguments[index + 1 :])


def test_numbers_out_of_range_raise(native: str) -> None:
    calls = operator_calls(native, torch.float32)
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
        *arguments, _ = operator_calls(native, torch.float32)[name]
        states, _ = getattr(OPS, name)(arguments[0].requires_grad_(), *arguments[1:], False)
        with pytest.raises(RuntimeError, match="keep=False: nothing was kept"):
            states.sum().backward()
