"""hdim_attention among the rest of PyTorch: opcheck, compile, export, autocast; and what bad input gets."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from oracle import FLOATS, HdimCase, fresh_generator, hdim_case, need_native
from xlayer_ext import _backend, backend, reference
from xlayer_ext import functional as XF

pytestmark = pytest.mark.operators


@pytest.fixture
def native(device: str) -> str:
    need_native("hdim_attention", device)
    return device


@pytest.fixture(params=["native", "reference"])
def choice(request: pytest.FixtureRequest, device: str) -> str:
    if request.param == "native":
        need_native("hdim_attention", device)
    return request.param


def call(case: HdimCase, **extra: Any) -> Any:
    return XF.hdim_attention(**case.floats, **case.masks, **(case.options | extra))


# ---- PyTorch around it -----------------------------------------------------------------------------------------------


def operator_arguments(case: HdimCase) -> tuple[Any, ...]:
    floats = [case.floats[name] for name in FLOATS[:6]]
    return (
        *floats,
        case.masks["key_mask"],
        case.masks["attn_mask"],
        0.9,
        case.options.get("activation") == "gelu",
        False,
    )


def backward_arguments(case: HdimCase, entropy: bool) -> tuple[Any, ...]:
    arguments = operator_arguments(case)
    outputs = torch.ops.xlayer.hdim_attention(*arguments)
    grad_entropy = torch.ones_like(outputs[2]) if entropy else None
    return (case.grad_context, grad_entropy, *arguments[:8], *outputs[:2], *arguments[8:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masks", [{}, {"key_mask": True, "attn_mask": True}], ids=["no mask", "both masks"])
@pytest.mark.traced
def test_opcheck(native: str, dtype: torch.dtype, masks: dict[str, bool]) -> None:
    case = hdim_case(fresh_generator(), sizes=(2, 3, 5, 4, 6, 3), dtype=dtype, device=native, **masks)
    torch.library.opcheck(torch.ops.xlayer.hdim_attention_backward, backward_arguments(case, entropy=bool(masks)))
    for name in FLOATS[:6]:
        case.floats[name].requires_grad_()
    # Its rule of comparing with a float32 run is too strict for bfloat16; the oracle rule covers the values.
    torch.library.opcheck(torch.ops.xlayer.hdim_attention, operator_arguments(case), atol=1e-2, rtol=1e-2)


class CountingBackend:
    """A torch.compile backend that keeps the graphs."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def uses_kernel(self, index: int) -> bool:
        return "xlayer.hdim_attention" in self.graphs[index].code


@pytest.mark.traced
def test_compile_makes_one_graph_for_all_lengths(native: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter, generator = CountingBackend(), fresh_generator()
    compiled = torch.compile(XF.hdim_attention, fullgraph=True, dynamic=True, backend=counter)
    for b, sq, sk in [(2, 5, 7), (3, 9, 4), (4, 12, 31), (2, 6, 6)]:
        case = hdim_case(generator, sizes=(b, sq, sk, 8, 12, 6), device=native, key_mask=True, attn_mask=True)
        for name in FLOATS:
            case.floats[name].requires_grad_()
        context, entropy = compiled(**case.floats, **case.masks, return_entropy=True)
        expected, expected_entropy = call(case, return_entropy=True)
        grads = torch.autograd.grad(context.square().sum() + entropy, list(case.floats.values()))
        wanted = torch.autograd.grad(expected.square().sum() + expected_entropy, list(case.floats.values()))
        assert torch.equal(context, expected) and torch.equal(entropy, expected_entropy)
        assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 and counter.uses_kernel(-1)


@pytest.mark.traced
def test_compiled_function_follows_the_backend(native: str) -> None:
    torch._dynamo.reset()
    counter = CountingBackend()
    compiled = torch.compile(XF.hdim_attention, fullgraph=True, backend=counter)
    case = hdim_case(fresh_generator(), device=native)
    for choice in ("native", "reference", "native"):
        with backend(choice):
            compiled(**case.floats)
    assert [counter.uses_kernel(index) for index in range(len(counter.graphs))] == [True, False]


@pytest.mark.traced
def test_export_with_dynamic_lengths(choice: str, device: str) -> None:
    class Net(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, rest: list[Tensor]) -> Tensor:
            return XF.hdim_attention(query, key, value, *rest, key_mask=mask)

    def arguments(b: int, sq: int, sk: int) -> tuple[Any, ...]:
        case = hdim_case(generator, sizes=(b, sq, sk, 8, 12, 6), device=device, key_mask=True)
        floats = [case.floats[name] for name in FLOATS]
        return (*floats[:3], case.masks["key_mask"], floats[3:])

    generator = fresh_generator()
    batch, queries, keys = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "queries", "keys"))
    shapes = ({0: batch, 1: queries}, {0: batch, 1: keys}, {0: batch, 1: keys}, {0: batch, 1: keys}, [None] * 4)
    with backend(choice):
        program = torch.export.export(Net(), arguments(2, 5, 7), dynamic_shapes=shapes)
        other = arguments(3, 11, 4)
        torch.testing.assert_close(program.module()(*other), Net()(*other))
    assert ("xlayer" in program.graph_module.code) == (choice == "native")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(choice: str, device: str, dtype: torch.dtype) -> None:
    case = hdim_case(fresh_generator(), device=device, dtype=torch.float32)
    cast = case.to(dtype)
    with backend(choice), torch.autocast(torch.device(device).type, dtype):
        context, entropy = call(case, return_entropy=True)
    with backend(choice):
        expected, expected_entropy = call(cast, return_entropy=True)
    assert context.dtype == dtype and entropy.dtype == torch.float32
    assert torch.equal(context, expected) and torch.equal(entropy, expected_entropy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_under_autocast_have_the_parameters_dtype(native: str, dtype: torch.dtype) -> None:
    case = hdim_case(fresh_generator(), device=native, dtype=torch.float32)
    leaves = {name: tensor.requires_grad_() for name, tensor in case.floats.items()}
    with torch.autocast(torch.device(native).type, dtype):
        loss = XF.hdim_attention(**leaves).float().square().sum()
    loss.backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in leaves.values())


def test_operator_keeps_its_dtype_under_autocast(native: str) -> None:
    """Casting is the functional API's business; inside, an operator is left alone."""
    case = hdim_case(fresh_generator(), device=native, dtype=torch.float32, key_mask=True)
    expected = torch.ops.xlayer.hdim_attention(*operator_arguments(case))
    with torch.autocast(torch.device(native).type, torch.bfloat16):
        actual = torch.ops.xlayer.hdim_attention(*operator_arguments(case))
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit(native: str, reentrant: bool) -> None:
    case = hdim_case(fresh_generator(), device=native, dtype=torch.float32, key_mask=True)
    leaves = [case.floats[name].requires_grad_() for name in FLOATS]

    def function(*floats: Tensor) -> Tensor:
        return XF.hdim_attention(*floats, **case.masks)

    plain = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    checkpoint(function, *leaves, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, plain, strict=True))


def test_second_derivative_raises_one_clear_line(native: str) -> None:
    case = hdim_case(fresh_generator(), device=native)
    query = case.floats["query"].requires_grad_()
    (grad,) = torch.autograd.grad(call(case).square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative") as raised:
        grad.sum().backward()
    assert "\n" not in str(raised.value)


def test_reference_has_second_derivatives(device: str) -> None:
    case = hdim_case(fresh_generator(), sizes=(1, 3, 4, 4, 5, 2), device=device, activation="gelu")
    query = case.floats["query"].requires_grad_()
    with backend("reference"):
        (grad,) = torch.autograd.grad(call(case).square().sum(), query, create_graph=True)
    grad.sum().backward()
    assert query.grad.isfinite().all() and query.grad.any()


def test_meta_tensors_have_the_right_shape() -> None:
    case = hdim_case(fresh_generator())
    floats = {name: tensor.to("meta") for name, tensor in case.floats.items()}
    assert XF.hdim_attention(**floats).shape == case.grad_context.shape


# ---- bad input -------------------------------------------------------------------------------------------------------

BAD_SHAPES = {
    "query": [(3, 4), (1, 3, 4), (2, 3, 5)],
    "key": [(2, 5), (3, 5, 4), (2, 5, 3)],
    "value": [(2, 4, 7), (5, 7)],
    "weight1": [(6, 15), (5, 16), (96,)],
    "bias1": [(5,), (6, 1)],
    "weight2": [(5,), (2, 6), (1, 5), ()],
    "bias2": [(2,), (0,)],
    "key_mask": [(2, 4), (5,), (3, 5), (2, 5, 1)],
    "attn_mask": [(2, 3, 4), (3, 5), (2, 5, 3)],
}


def good_arguments() -> dict[str, Any]:
    case = hdim_case(fresh_generator(), sizes=(2, 3, 5, 4, 6, 7), dtype=torch.float32, key_mask=True, attn_mask=True)
    return case.floats | case.masks


@pytest.mark.parametrize(("name", "shape"), [(n, s) for n, shapes in BAD_SHAPES.items() for s in shapes], ids=str)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...]) -> None:
    arguments = good_arguments()
    arguments[name] = torch.zeros(shape, dtype=arguments[name].dtype)
    # A wrong size in query shows where the next argument disagrees with it.
    told = "query|key|weight1" if name == "query" else name
    with pytest.raises(ValueError, match=told) as raised:
        XF.hdim_attention(**arguments)
    assert "\n" not in str(raised.value) and "got" in str(raised.value)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bool, torch.complex64], ids=str)
def test_wrong_dtypes_are_named(name: str, dtype: torch.dtype) -> None:
    arguments = good_arguments()
    arguments[name] = arguments[name].to(dtype)
    told = "key" if name == "query" and dtype == torch.float64 else name
    with pytest.raises(TypeError, match=told):
        XF.hdim_attention(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"key_mask": torch.ones(2, 5)}, TypeError, "key_mask must be a bool tensor"),
        ({"attn_mask": torch.ones(2, 3, 5, dtype=torch.uint8)}, TypeError, "attn_mask must be a bool tensor"),
        ({"key_mask": [True] * 5}, TypeError, "key_mask must be a torch.Tensor"),
        ({"value": None}, TypeError, "value must be a torch.Tensor"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"temperature": -1.0}, ValueError, "temperature must be positive"),
        ({"temperature": float("nan")}, ValueError, "temperature must be positive"),
        ({"temperature": float("inf")}, ValueError, "temperature must be positive"),
        ({"temperature": "1"}, TypeError, "temperature must be a float"),
        ({"activation": "tanh"}, ValueError, "activation must be one of relu, gelu; got 'tanh'"),
        ({"key": torch.zeros(2, 5, 4, device="meta")}, ValueError, "key must be on the device of query"),
    ],
)
def test_other_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        XF.hdim_attention(**(good_arguments() | change))


def nonsense() -> dict[str, dict[int, Any]]:
    """Returns invalid replacements by position for the forward operator's arguments."""
    return {
        "query rank": {0: torch.zeros(3, 4)},
        "query batch": {0: torch.zeros(9, 3, 4)},
        "query integers": {0: torch.zeros(2, 3, 4, dtype=torch.int32)},
        "key width": {1: torch.zeros(2, 5, 400)},
        "value length": {2: torch.zeros(2, 1, 7)},
        "value dtype": {2: torch.zeros(2, 5, 7, dtype=torch.float64)},
        "weight1 columns": {3: torch.zeros(6, 4)},
        "weight1 rank": {3: torch.zeros(96)},
        "bias1 length": {4: torch.zeros(1)},
        "weight2 length": {5: torch.zeros(2)},
        "weight2 rank": {5: torch.zeros(1, 6)},
        "weight2 meta": {5: torch.zeros(6, device="meta")},
        "key mask length": {6: torch.ones(2, 1, dtype=torch.bool)},
        "key mask dtype": {6: torch.ones(2, 5)},
        "key mask rank": {6: torch.ones(5, dtype=torch.bool)},
        "pair mask shape": {7: torch.ones(2, 3, 1, dtype=torch.bool)},
        "pair mask dtype": {7: torch.ones(2, 3, 5, dtype=torch.uint8)},
        "temperature zero": {8: 0.0},
        "temperature NaN": {8: float("nan")},
        "none": {0: None},
    }


@pytest.mark.parametrize("name", nonsense())
def test_operator_called_with_nonsense_raises(name: str) -> None:
    need_native("hdim_attention")
    case = hdim_case(fresh_generator(), sizes=(2, 3, 5, 4, 6, 7), dtype=torch.float32, key_mask=True, attn_mask=True)
    arguments = list(operator_arguments(case))
    for position, value in nonsense()[name].items():
        arguments[position] = value
    with pytest.raises((RuntimeError, TypeError, ValueError)) as raised:
        torch.ops.xlayer.hdim_attention(*arguments)
    assert "\n" not in str(raised.value) or name == "none"  # that one is torch's own schema check


def test_backward_operator_called_with_nonsense_raises() -> None:
    need_native("hdim_attention")
    case = hdim_case(fresh_generator(), sizes=(2, 3, 5, 4, 6, 7), dtype=torch.float32, key_mask=True, attn_mask=True)
    good = backward_arguments(case, entropy=True)
    torch.ops.xlayer.hdim_attention_backward(*good)
    tensors = [index for index, value in enumerate(good) if isinstance(value, Tensor)]
    for index, wrong in itertools.product(tensors, ("rank", "size", "dtype", "meta")):
        value = good[index]
        bad = {
            "rank": value.unsqueeze(0),
            "size": torch.zeros([n + 1 for n in value.shape], dtype=value.dtype),
            "dtype": value.to(torch.int16),
            "meta": value.to("meta"),
        }[wrong]
        with pytest.raises((RuntimeError, ValueError)):
            torch.ops.xlayer.hdim_attention_backward(*good[:index], bad, *good[index + 1 :])


# ---- choice of the backend -------------------------------------------------------------------------------------------


def test_backend_context_restores_the_choice() -> None:
    before = _backend.choice()
    with pytest.raises(KeyError), backend("reference"):
        assert _backend.current_backend() == "reference"
        raise KeyError
    assert _backend.choice() == before
    with pytest.raises(ValueError, match="backend must be one of auto, native, reference; got 'cuda'"):
        backend("cuda")


def test_native_by_name_raises_where_there_is_none() -> None:
    need_native("hdim_attention")
    whole = torch.ones(1, dtype=torch.int32)
    with backend("native"), pytest.raises(RuntimeError, match=r"no native hdim_attention for torch\.int32 on cpu"):
        _backend.use_native("hdim_attention", whole)
    assert not _backend.use_native("hdim_attention", whole)


def test_backends_are_really_different(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the reference was called")

    monkeypatch.setattr(reference, "hdim_attention", never)
    case = hdim_case(fresh_generator(), device=native)
    with backend("native"):
        call(case)
    with backend("reference"), pytest.raises(AssertionError, match="the reference was called"):
        call(case)
