"""Tests what every operator promises to the rest of PyTorch: opcheck, compile, export, checkpoint, second derivatives,
meta tensors, and errors for nonsense. The calls come from support/operator_table.py."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from torch.utils.checkpoint import checkpoint

from operator_table import CALLS, DIRECT, OPS, Arguments, Call
from oracle import fresh_generator, need_native
from transform_tools import OPERATORS as DIFFERENTIABLE
from xlayer_ext import _backend, backend

pytestmark = pytest.mark.operators

# Tracing takes seconds, so that not every call of the table is traced.
ONE_GRAPH = (
    "masked_mean",
    "aggregate chain",
    "hdim_attention, masks, entropy",
    "hyper_post_pre, shc",
    "hyper_post_pre, dhc",
    "hyper_post_pre, mhc",
    "quantize chain",
)
EXPORTED = ("masked_mean", "aggregate chain", "hdim_attention, key mask", "hyper chain", "quantize chain")
FOLLOWING = ("masked_mean", "aggregate chain", "hdim_attention", "hyper_pre", "quantize chain")


@pytest.fixture(params=["native", "reference"])
def choice(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


def call_of(name: str, device: str, choice: str = "native") -> Call:
    """Returns a call of the table; skips the test where its kernels are needed and not there."""
    call = CALLS[name]
    for op in sorted(call.operators if choice == "native" else ()):
        need_native(op, device)
    return call


def draw_inputs(
    call: Call, generator: torch.Generator, device: str, sizes: tuple[int, ...], dtype: torch.dtype | None = None
) -> tuple[Any, ...]:
    drawn = call.draw(generator, dtype or call.dtype, *sizes)
    inputs: tuple[Any, ...] = tree_map_only(Tensor, lambda t: t.to(device), drawn)
    return inputs


def differentiable(call: Call, inputs: tuple[Any, ...]) -> list[Tensor]:
    """Lists the inputs that have gradients."""
    floats = [t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.is_floating_point()]
    return [t for position, t in enumerate(floats) if position not in call.constant]


def outputs_of(function: Callable[..., Any], inputs: Iterable[Any]) -> tuple[Tensor, ...]:
    outputs = function(*inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def loss_of(outputs: tuple[Tensor, ...]) -> Tensor:
    """Makes a loss of all outputs that may have a gradient."""
    return torch.stack([t.square().sum() for t in outputs if t.is_floating_point()]).sum()


def arguments_of(name: str, device: str, dtype: torch.dtype) -> Arguments:
    """Returns valid arguments of each operator of a row; skips the test where its kernels are not there."""
    for op in DIRECT[name].operators:
        need_native(op, device)
    return DIRECT[name].arguments(device, dtype)


class Graphs:
    """Keeps, as a backend of torch.compile, which operators of this package each graph runs."""

    def __init__(self) -> None:
        self.operators: list[set[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.operators.append(operators_in(graph))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def operators_in(graph: torch.fx.GraphModule) -> set[str]:
    return set(re.findall(r"\bxlayer\.(\w+)", graph.code))


# ---- graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name, row in DIRECT.items() for dtype in row.dtypes], ids=str
)
@pytest.mark.traced
def test_opcheck(device: str, name: str, dtype: torch.dtype) -> None:
    for op, arguments in arguments_of(name, device, dtype).items():
        given = tuple(
            t.detach().requires_grad_(op in DIFFERENTIABLE) if isinstance(t, Tensor) and t.is_floating_point() else t
            for t in arguments
        )
        tolerance = DIRECT[name].tolerance.get(op)
        torch.library.opcheck(getattr(OPS, op), given, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", ONE_GRAPH)
@pytest.mark.traced
def test_compile_makes_one_graph_for_all_lengths(choice: str, device: str, name: str) -> None:
    call = call_of(name, device, choice)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs, generator = Graphs(), fresh_generator()
    compiled = torch.compile(call.function, fullgraph=True, dynamic=True, backend=graphs)
    bound = {"rtol": 0.0, "atol": 0.0} if choice == "native" else {}
    with backend(choice):
        for sizes in call.sizes:
            inputs = draw_inputs(call, generator, device, sizes)
            leaves = [t.requires_grad_() for t in differentiable(call, inputs)]
            actual, expected = outputs_of(compiled, inputs), outputs_of(call.function, inputs)
            grads, wanted = (torch.autograd.grad(loss_of(outputs), leaves) for outputs in (actual, expected))
            for a, b in zip((*actual, *grads), (*expected, *wanted), strict=True):
                torch.testing.assert_close(a, b, **bound)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert graphs.operators[-1] == (call.operators if choice == "native" else set())


@pytest.mark.parametrize("name", FOLLOWING)
@pytest.mark.traced
def test_compiled_function_follows_the_backend(device: str, name: str) -> None:
    call, graphs = call_of(name, device), Graphs()
    torch._dynamo.reset()
    compiled = torch.compile(call.function, fullgraph=True, backend=graphs)
    inputs = draw_inputs(call, fresh_generator(), device, call.sizes[0])
    for chosen in ("native", "reference", "native"):
        with backend(chosen):
            compiled(*inputs)
    assert graphs.operators == [call.operators, set()]


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.traced
def test_export_with_dynamic_lengths(choice: str, device: str, name: str) -> None:
    call = call_of(name, device, choice)

    class Net(torch.nn.Module):
        def forward(self, *inputs: Tensor | None) -> Any:
            return call.function(*inputs)

    dims: dict[str, Any] = {}
    for layout in call.layouts:
        for axis in (layout or "").split():
            dims.setdefault(axis, None if axis == "_" else torch.export.Dim(axis, min=2, max=64))
    first, *others = (draw_inputs(call, fresh_generator(), device, sizes) for sizes in call.sizes)
    layouts = [*call.layouts, *[None] * (len(first) - len(call.layouts))]
    shapes = tuple(layout and {at: dims[axis] for at, axis in enumerate(layout.split())} for layout in layouts)
    with backend(choice):
        program = torch.export.export(Net(), first, dynamic_shapes=(shapes,))
        for inputs in others:
            actual, expected = outputs_of(program.module(), inputs), outputs_of(call.function, inputs)
            for a, b in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, b)
    assert operators_in(program.graph_module) == (call.operators if choice == "native" else set())


# ---- gradients and shapes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit(device: str, name: str, dtype: torch.dtype, reentrant: bool) -> None:
    call = call_of(name, device)
    inputs = draw_inputs(call, fresh_generator(), device, call.sizes[0], dtype)
    leaves = [t.requires_grad_() for t in differentiable(call, inputs)]
    flat, structure = tree_flatten(inputs)

    def loss(*flat: Any) -> Tensor:
        return loss_of(outputs_of(call.function, tree_unflatten(flat, structure)))

    with backend("native"):
        plain = torch.autograd.grad(loss(*flat), leaves)
        checkpoint(loss, *flat, use_reentrant=reentrant).backward()
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, plain, strict=True))


# fsq raises already where the graph of its first derivative is asked for: test_quantize_torch.py.
@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if "fsq" not in call.operators])
@pytest.mark.parametrize("all_inputs", [False, True])
def test_second_derivative_raises_one_clear_line(device: str, name: str, all_inputs: bool) -> None:
    call = call_of(name, device)
    inputs = draw_inputs(call, fresh_generator(), device, call.sizes[0], torch.float64)
    leaves = [t.requires_grad_() for t in differentiable(call, inputs)[: None if all_inputs else 1]]
    grads = torch.autograd.grad(loss_of(outputs_of(call.function, inputs)), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative") as raised:
        torch.stack([grad.sum() for grad in grads]).sum().backward()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", CALLS)
def test_meta_tensors_have_the_right_shape(device: str, name: str) -> None:
    call = CALLS[name]
    inputs = draw_inputs(call, fresh_generator(), device, call.sizes[0])
    with backend("reference"):
        expected = outputs_of(call.function, inputs)
    outputs = outputs_of(call.function, tree_map_only(Tensor, lambda t: t.to("meta"), inputs))
    assert all(out.is_meta for out in outputs)
    assert [(out.shape, out.dtype) for out in outputs] == [(out.shape, out.dtype) for out in expected]


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIRECT)
def test_operators_called_with_nonsense_raise(device: str, name: str) -> None:
    for op_name, arguments in arguments_of(name, device, torch.float32).items():
        op, accepted = getattr(OPS, op_name), DIRECT[name].accepts.get(op_name, ())
        op(*arguments)
        tensors = [index for index, value in enumerate(arguments) if isinstance(value, Tensor) and value.numel()]
        for index, wrong in itertools.product(tensors, ("rank", "size", "dtype", "meta")):
            value = arguments[index]
            bad = {
                "rank": value.unsqueeze(0),
                "size": torch.zeros([size + 1 for size in value.shape], dtype=value.dtype, device=device),
                "dtype": value.to(torch.int16),
                "meta": value.to("meta"),
            }[wrong]
            if wrong not in accepted:
                with pytest.raises((RuntimeError, ValueError)):
                    op(*arguments[:index], bad, *arguments[index + 1 :])


def test_every_operator_is_in_the_table(device: str) -> None:
    registered = {op for op, kind in _backend._KERNELS if kind == torch.device(device).type}
    assert registered == {op for name in DIRECT for op in arguments_of(name, device, torch.float32)}
    forward = {op for op in registered if not op.endswith("_backward")}
    assert forward == {op for call in CALLS.values() for op in call.operators}
