"""Tests hdim_attention under autocast, errors for bad arguments, and the choice of the backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from operator_table import hdim_forward_arguments
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
    expected = torch.ops.xlayer.hdim_attention(*hdim_forward_arguments(case))
    with torch.autocast(torch.device(native).type, torch.bfloat16):
        actual = torch.ops.xlayer.hdim_attention(*hdim_forward_arguments(case))
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_reference_has_second_derivatives(device: str) -> None:
    case = hdim_case(fresh_generator(), sizes=(1, 3, 4, 4, 5, 2), device=device, activation="gelu")
    query = case.floats["query"].requires_grad_()
    with backend("reference"):
        (grad,) = torch.autograd.grad(call(case).square().sum(), query, create_graph=True)
    grad.sum().backward()
    assert query.grad.isfinite().all() and query.grad.any()


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
    arguments = list(hdim_forward_arguments(case))
    for position, value in nonsense()[name].items():
        arguments[position] = value
    with pytest.raises((RuntimeError, TypeError, ValueError)) as raised:
        torch.ops.xlayer.hdim_attention(*arguments)
    assert "\n" not in str(raised.value) or name == "none"  # that one is torch's own schema check


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
