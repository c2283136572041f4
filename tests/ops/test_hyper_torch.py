"""The hyper operators among the rest of PyTorch: opcheck, compile, export, autocast; and what bad input gets."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hyper_tools import HyperCase, hyper_case, pack
from oracle import fresh_generator, need_native
from xlayer_ext import backend, reference
from xlayer_ext import functional as XF
from xlayer_ext.functional import Connection
from xlayer_ext.functional.hyper import _operator_arguments, _post_arguments

pytestmark = pytest.mark.operators

OPS = torch.ops.xlayer
SOME = ("shc", "dhc", "mhc")


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


def operator_calls(case: HyperCase) -> dict[str, tuple[Any, ...]]:
    """Returns valid arguments for each of the six operators."""
    post = _post_arguments(case.streams, case.branch_output, case.coefficients)
    connection = _operator_arguments(case.connection)
    streams = post[0]
    dynamic = case.connection.weight is not None
    _, *pre = OPS.hyper_pre(streams, *connection)
    out, x, *both = OPS.hyper_post_pre(*post, *connection)
    grad_out, grad_x = torch.ones_like(out), torch.ones_like(x)
    return {
        "hyper_pre": (streams, *connection),
        "hyper_post": post,
        "hyper_post_pre": (*post, *connection),
        "hyper_pre_backward": (grad_x, torch.ones_like(pre[0]) if dynamic else None, streams, *pre, *connection),
        "hyper_post_backward": (grad_out, *post),
        "hyper_post_pre_backward": (grad_out, grad_x, None, *post, *both, *connection),
    }


# ---- PyTorch around it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.traced
def test_opcheck(native: str, kind: str, dtype: torch.dtype, packed: bool) -> None:
    case = hyper_case(fresh_generator(), kind=kind, lead=(2, 3), n=2, d=5, device=native).to(dtype)
    if packed:
        case = HyperCase(**(vars(case) | {"streams": pack(case.streams)}))
    for name, arguments in operator_calls(case).items():
        differentiable = not name.endswith("backward")
        arguments = tuple(t.detach().requires_grad_(differentiable) if isinstance(t, Tensor) else t for t in arguments)
        # Its rule of comparing with a float32 run is too strict for bfloat16; the oracle rule covers the values.
        torch.library.opcheck(getattr(OPS, name), arguments, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.traced
def test_compile_makes_one_graph_for_all_lengths(choice: str, device: str, kind: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(XF.hyper_post_pre, fullgraph=True, dynamic=True, backend="aot_eager")
    generator = fresh_generator()
    with backend(choice):
        for lead in [(2, 5), (3, 7), (4, 11), (2, 6)]:
            case = hyper_case(generator, kind=kind, lead=lead, d=12, device=device)
            inputs = leaves(case)
            actual = compiled(case.streams, case.branch_output, case.coefficients, case.connection)
            expected = boundary(case)
            grads, wanted = (
                torch.autograd.grad(sum(t.square().sum() for t in out[:2]), inputs) for out in (actual, expected)
            )
            for a, b in zip((*actual, *grads), (*expected, *wanted), strict=True):
                torch.testing.assert_close(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.traced
def test_compiled_function_follows_the_backend(native: str) -> None:
    torch._dynamo.reset()
    codes: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        codes.append(graph.code)
        return graph

    compiled = torch.compile(XF.hyper_pre, fullgraph=True, backend=keep)
    case = hyper_case(fresh_generator(), device=native)
    for chosen in ("native", "reference", "native"):
        with backend(chosen):
            compiled(case.streams, case.connection)
    assert ["xlayer.hyper_pre" in code for code in codes] == [True, False]


@pytest.mark.traced
def test_export_with_dynamic_lengths(choice: str, device: str) -> None:
    class Net(torch.nn.Module):
        def forward(self, streams: Tensor, y: Tensor, base: Tensor, weight: Tensor, scale: Tensor) -> Any:
            connection = Connection(base, weight, None, scale, "rms", "tanh")
            x, c = XF.hyper_pre(streams, connection)
            return XF.hyper_post_pre(streams, y + x, c, connection)[:2]

    def arguments(*lead: int) -> tuple[Any, ...]:
        case = hyper_case(generator, kind="dhc-rms", lead=lead, d=12, device=device)
        base, weight, _, scale = case.connection[:4]
        return case.streams, case.branch_output, base, weight, scale

    generator = fresh_generator()
    batch, tokens = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "tokens"))
    shapes = ({0: batch, 1: tokens}, {0: batch, 1: tokens}, None, None, None)
    with backend(choice):
        program = torch.export.export(Net(), arguments(2, 5), dynamic_shapes=shapes)
        other = arguments(3, 11)
        for actual, expected in zip(program.module()(*other), Net()(*other), strict=True):
            torch.testing.assert_close(actual, expected)
    assert ("xlayer" in program.graph_module.code) == (choice == "native")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing_but_takes_its_branch_outputs(choice: str, device: str, dtype: torch.dtype) -> None:
    case = hyper_case(fresh_generator(), device=device).to(torch.float32, dtype)
    with backend(choice), torch.autocast(torch.device(device).type, dtype):
        inside = boundary(case)
    with backend(choice):
        outside = boundary(case)
    for a, b in zip(inside, outside, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit(native: str, reentrant: bool) -> None:
    case = hyper_case(fresh_generator(), device=native).to(torch.float32)
    inputs = leaves(case)

    def function(streams: Tensor, y: Tensor, c: Tensor, base: Tensor, *rest: Tensor) -> Tensor:
        out = XF.hyper_post_pre(streams, y, c, Connection(base, *rest, *case.connection[4:]))
        return torch.stack([t.square().sum() for t in out]).sum()

    plain = torch.autograd.grad(function(*inputs), inputs)
    checkpoint(function, *inputs, use_reentrant=reentrant).backward()
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(inputs, plain, strict=True))


@pytest.mark.parametrize("part", ["pre", "post", "post_pre"])
def test_second_derivative_raises_one_clear_line(native: str, part: str) -> None:
    case = hyper_case(fresh_generator(), device=native)
    streams = case.streams.requires_grad_()
    out = {
        "pre": lambda: XF.hyper_pre(streams, case.connection)[0],
        "post": lambda: XF.hyper_post(streams, case.branch_output, case.coefficients.requires_grad_()),
        "post_pre": lambda: boundary(case)[1],
    }[part]()
    (grad,) = torch.autograd.grad(out.square().sum(), streams, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative") as raised:
        grad.sum().backward()
    assert "\n" not in str(raised.value)


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


def test_meta_tensors_have_the_right_shape() -> None:
    case = hyper_case(fresh_generator())
    connection = Connection(*(t if t is None else t.to("meta") for t in case.connection[:4]), *case.connection[4:])
    meta = (t.to("meta") for t in (case.streams, case.branch_output, case.coefficients))
    out, x, c = XF.hyper_post_pre(*meta, connection)
    assert (
        out.shape == case.streams.shape and x.shape == case.branch_output.shape and c.shape == case.coefficients.shape
    )


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


@pytest.mark.parametrize("kind", SOME)
def test_operators_called_with_nonsense_raise(native: str, kind: str) -> None:
    case = hyper_case(fresh_generator(), kind=kind, lead=(2, 3), n=4, d=8, device=native).to(torch.float32)
    for name, arguments in operator_calls(case).items():
        op = getattr(OPS, name)
        op(*arguments)
        tensors = [index for index, value in enumerate(arguments) if isinstance(value, Tensor) and value.numel()]
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


@pytest.mark.parametrize(
    ("offset", "value"), [(0, 7), (0, -1), (1, 9), (2, 0), (3, -1.0)], ids=["norm", "norm < 0", "form", "steps", "eps"]
)
def test_options_out_of_range_raise(native: str, offset: int, value: Any) -> None:
    case = hyper_case(fresh_generator(), kind="mhc", lead=(2, 3), device=native).to(torch.float32)
    arguments = list(operator_calls(case)["hyper_pre"])
    arguments[5 + offset] = value
    with pytest.raises(RuntimeError):
        OPS.hyper_pre(*arguments)


def test_more_streams_than_16_are_refused_by_the_operators(native: str) -> None:
    with pytest.raises(RuntimeError, match="streams must number 1 to 16"):
        OPS.hyper_post(torch.zeros(1, 1, 17, 4), torch.zeros(1, 1, 4), torch.zeros(17, 19))
