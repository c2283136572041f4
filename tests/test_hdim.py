"""hdim_attention: exactness, masks, memory, and how it lives with the rest of PyTorch."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from oracle import (
    DTYPES,
    FLOATS,
    HdimCase,
    assert_near,
    assert_same_bits,
    check_cases,
    evaluate_functional,
    fresh_generator,
    hdim_case,
    need_native,
)
from xlayer_ext import _backend, backend, reference
from xlayer_ext import functional as XF
from xlayer_ext.bench import peak_memory

OPS = ("hdim_attention", "hdim_attention_backward")
MASKS = {
    "no mask": {},
    "key mask": {"key_mask": True},
    "pair mask": {"pair_mask": True},
    "both masks": {"key_mask": True, "pair_mask": True},
}


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


# ---- exactness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_oracle_rule(native: str, dtype: torch.dtype, masks: dict[str, bool], activation: str) -> None:
    options = {"activation": activation, "temperature": 0.8, **masks}
    generator = fresh_generator()
    check_cases([hdim_case(generator, dtype=dtype, device=native, grad_entropy=0.7, **options) for _ in range(4)])


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1), (1, 64, 64, 64, 256, 17), (3, 1, 130, 16, 96, 5), (2, 65, 1, 3, 7, 1)])
def test_oracle_rule_at_odd_sizes(native: str, sizes: tuple[int, ...]) -> None:
    case = hdim_case(fresh_generator(), sizes=sizes, device=native)
    assert_near(evaluate_functional(case), evaluate_functional(case, "reference"), 1e-12)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_gradcheck(native: str, masks: dict[str, bool], activation: str) -> None:
    case = hdim_case(
        fresh_generator(), sizes=(2, 3, 5, 4, 6, 3), device=native, activation=activation, temperature=1.3, **masks
    )
    # No ties: finite differences do not see the derivative 0 that |a − b| has there by convention.
    case.floats["query"].add_(0.05 * torch.randn_like(case.floats["query"]))
    inputs = [case.floats[name].requires_grad_() for name in FLOATS]

    def function(*floats: Tensor) -> Any:
        with backend("native"):
            return XF.hdim_attention(*floats, **case.masks, **case.options, return_entropy=True)

    assert torch.autograd.gradcheck(function, inputs)


def test_two_dimensional_weight2(choice: str, device: str) -> None:
    case = hdim_case(fresh_generator(), device=device)
    wide = case.with_floats(weight2=case.floats["weight2"].unsqueeze(0))
    flat, actual = evaluate_functional(case, choice), evaluate_functional(wide, choice)
    assert actual["grad_weight2"].shape == wide.floats["weight2"].shape
    actual["grad_weight2"] = actual["grad_weight2"].squeeze(0)
    assert_same_bits(actual, flat)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_derivative_of_distance_is_zero_at_ties(choice: str, device: str, dtype: torch.dtype) -> None:
    case = hdim_case(fresh_generator(), sizes=(2, 6, 6, 8, 12, 4), dtype=dtype, device=device)
    d = case.floats["query"].shape[-1]
    only_distance = case.floats["weight1"].clone()
    only_distance[:, : 3 * d] = 0
    same = case.floats["query"][:, :1].expand_as(case.floats["query"]).contiguous()
    case = case.with_floats(query=same, key=same.clone(), weight1=only_distance)
    actual = evaluate_functional(case, choice)
    for name in ("grad_query", "grad_key"):
        assert torch.equal(actual[name], torch.zeros_like(actual[name]))


@pytest.mark.parametrize("value", [0.0, 1e4, float("inf"), float("nan")])
def test_bias2_cannot_act(choice: str, device: str, value: float) -> None:
    case = hdim_case(fresh_generator(), device=device, dtype=torch.float32)
    plain = evaluate_functional(case.with_floats(bias2=torch.zeros(1, device=device)), choice)
    actual = evaluate_functional(case.with_floats(bias2=torch.full((1,), value, device=device)), choice)
    assert torch.equal(actual["grad_bias2"], torch.zeros(1, device=device))
    assert_same_bits(actual, plain)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_saturated_softmax_stays_finite(native: str, dtype: torch.dtype) -> None:
    case = hdim_case(fresh_generator(), device=native, scale=30.0, temperature=1e-3, grad_entropy=1.0).to(dtype)
    actual = evaluate_functional(case)
    assert all(tensor.isfinite().all() for tensor in actual.values())
    lowest, highest = case.floats["value"].amin(1, keepdim=True), case.floats["value"].amax(1, keepdim=True)
    slack = 2 * torch.finfo(dtype).eps * case.floats["value"].abs().max()
    assert ((actual["context"] >= lowest - slack) & (actual["context"] <= highest + slack)).all()


# ---- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_keys_change_nothing(choice: str, device: str, dtype: torch.dtype, poison: float) -> None:
    case = hdim_case(fresh_generator(), dtype=dtype, device=device, key_mask=True, grad_entropy=0.5)
    masked = ~case.masks["key_mask"].unsqueeze(-1)
    dirty = case.with_floats(**{name: case.floats[name].masked_fill(masked, poison) for name in ("key", "value")})
    actual = evaluate_functional(dirty, choice)
    assert_same_bits(actual, evaluate_functional(case, choice))
    for name in ("grad_key", "grad_value"):
        assert not actual[name].masked_select(masked).any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_keys_that_the_pair_mask_forbids_to_all_change_nothing(choice: str, device: str, poison: float) -> None:
    case = hdim_case(fresh_generator(), dtype=torch.float32, device=device, pair_mask=True, grad_entropy=0.5)
    case.masks["pair_mask"][:, :, 3] = False
    dirty = {name: case.floats[name].clone() for name in ("key", "value")}
    for tensor in dirty.values():
        tensor[:, 3] = poison
    assert_same_bits(evaluate_functional(case.with_floats(**dirty), choice), evaluate_functional(case, choice))


@pytest.mark.parametrize("spoiled", ["key", "value"])
def test_a_row_is_untouched_by_what_it_may_not_use(choice: str, device: str, spoiled: str) -> None:
    case = hdim_case(fresh_generator(), dtype=torch.float32, device=device, pair_mask=True)
    case.masks["pair_mask"][:, :, 3] = False
    case.masks["pair_mask"][:, 5, 3] = True  # row 5 may use the bad key, no other
    dirty = case.floats[spoiled].clone()
    dirty[:, 3] = float("nan")
    actual = evaluate_functional(case.with_floats(**{spoiled: dirty}), choice)
    clean = evaluate_functional(case, choice)
    assert actual["context"][:, 5].isnan().all()
    others = torch.arange(case.floats["query"].shape[1]) != 5
    for name in ("context", "grad_query"):
        assert torch.equal(actual[name][:, others], clean[name][:, others]), name


def test_rows_without_a_pair_are_zero(choice: str, device: str) -> None:
    case = hdim_case(fresh_generator(), device=device, pair_mask=True, grad_entropy=0.5)
    case.masks["pair_mask"][:, 4] = False
    bad_query = case.floats["query"].clone()
    bad_query[:, 4] = float("nan")
    actual = evaluate_functional(case.with_floats(query=bad_query), choice)
    assert not actual["context"][:, 4].any() and not actual["grad_query"][:, 4].any()
    assert_same_bits(actual, evaluate_functional(case, choice))


def test_entropy_counts_only_rows_with_a_pair(choice: str, device: str) -> None:
    case = hdim_case(fresh_generator(), device=device, sizes=(1, 3, 8, 4, 5, 2), pair_mask=True, grad_entropy=1.0)
    case = case.with_floats(weight2=torch.zeros_like(case.floats["weight2"]))  # uniform over what is allowed
    pairs = torch.zeros(1, 3, 8, dtype=torch.bool, device=device)
    pairs[0, 1, :2] = pairs[0, 2, :4] = True
    case.masks["pair_mask"] = pairs
    expected = (torch.tensor(2.0).log() + torch.tensor(4.0).log()) / 2
    torch.testing.assert_close(evaluate_functional(case, choice)["entropy"].cpu().float(), expected)
    case.masks["pair_mask"] = torch.zeros_like(pairs)
    empty = evaluate_functional(case, choice)
    assert empty["entropy"] == 0 and not any(tensor.any() for tensor in empty.values())


@pytest.mark.parametrize("sizes", [(0, 3, 4, 2, 3, 2), (2, 0, 4, 2, 3, 2), (2, 3, 0, 2, 3, 2), (2, 3, 4, 2, 3, 0)], ids=str)
@pytest.mark.parametrize("masks", [{}, {"key_mask": True, "pair_mask": True}], ids=["no mask", "both masks"])
def test_empty_dimensions(choice: str, device: str, sizes: tuple[int, ...], masks: dict[str, bool]) -> None:
    case = hdim_case(fresh_generator(), sizes=sizes, device=device, grad_entropy=1.0 if sizes[-1] else 0.0, **masks)
    actual = evaluate_functional(case, choice)
    for name in FLOATS:
        assert actual[f"grad_{name}"].shape == case.floats[name].shape
    assert actual["context"].shape == case.grad_context.shape
    if sizes[-1]:
        assert not any(tensor.any() for tensor in actual.values())


# ---- fuzz ----------------------------------------------------------------------------------------------------------


def restride(tensor: Tensor, how: str) -> Tensor:
    """The same values under other strides."""
    if how == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "sliced" and tensor.dim():
        padded = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), float("nan") if tensor.is_floating_point() else 1)
        padded[..., 3::2] = tensor
        return padded[..., 3::2]
    return tensor


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzz(native: str, data: st.DataObject) -> None:
    def size(largest: int) -> int:
        return data.draw(st.integers(1, largest))

    case = hdim_case(
        fresh_generator(data.draw(st.integers(0, 2**31 - 1))),
        sizes=(size(3), size(40), size(70), size(40), size(70), size(40)),
        device=native,
        key_mask=data.draw(st.booleans()),
        pair_mask=data.draw(st.booleans()),
        grad_entropy=data.draw(st.sampled_from([None, 0.0, 1.0])),
        scale=data.draw(st.sampled_from([0.0, 1e-3, 1.0, 10.0])),
        temperature=data.draw(st.sampled_from([0.3, 1.0, 50.0])),
        activation=data.draw(st.sampled_from(["relu", "gelu"])),
    )
    strides = st.sampled_from(["contiguous", "transposed", "sliced"])
    case = case.with_floats(**{name: restride(case.floats[name], data.draw(strides)) for name in FLOATS[:6]})
    masks = {n: None if m is None else restride(m, data.draw(strides)) for n, m in case.masks.items()}
    case = HdimCase(case.floats, masks, restride(case.grad_context, data.draw(strides)), case.options, case.grad_entropy)
    assert_near(evaluate_functional(case), evaluate_functional(case, "reference"), 1e-10)


def test_expanded_inputs(native: str) -> None:
    generator = fresh_generator()
    case = hdim_case(generator, device=native, sizes=(3, 5, 5, 8, 12, 4), key_mask=True)
    one = hdim_case(generator, device=native, sizes=(1, 5, 5, 8, 12, 4), pair_mask=True)
    floats = {name: one.floats[name].expand_as(case.floats[name]) for name in ("query", "key", "value")}
    masks = {"key_mask": case.masks["key_mask"], "pair_mask": one.masks["pair_mask"].expand(3, 5, 5)}
    grad = torch.ones((), dtype=torch.float64, device=native).expand(3, 5, 4)
    case = HdimCase(case.floats | floats, masks, grad)
    assert_near(evaluate_functional(case), evaluate_functional(case, "reference"), 1e-12)


# ---- determinism, memory, instruction sets ---------------------------------------------------------------------------


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_at_any_thread_count(native: str, threads: Callable[[int], None], dtype: torch.dtype) -> None:
    case = hdim_case(
        fresh_generator(), sizes=(3, 70, 90, 24, 96, 48), dtype=dtype, device=native, key_mask=True, grad_entropy=1.0
    )
    expected = evaluate_functional(case)
    for count in (1, 2, 3, 1):
        threads(count)
        assert_same_bits(evaluate_functional(case), expected)


def memory_work(tokens: int) -> Callable[[], object]:
    """For `peak_memory`, in its fresh process: forward and backward on the native kernel."""
    case = hdim_case(fresh_generator(0), sizes=(1, tokens, tokens, 24, 96, 16), dtype=torch.float32)
    return lambda: evaluate_functional(case)


def test_no_buffer_of_pair_features(device: str) -> None:
    need_native("hdim_attention")
    if device != "cpu" or not Path("/proc/self/clear_refs").exists():
        pytest.skip("reads the resident size of a Linux process")
    tokens = 512
    pairs = 4 * tokens * tokens  # [B, Sq, Sk] in float32; [B, Sq, Sk, 4D] and [B, Sq, Sk, M] are 96 times as large
    assert peak_memory(memory_work, {"tokens": tokens}) < 6 * pairs


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(device: str, isa: str) -> None:
    need_native("hdim_attention")
    if device != "cpu":
        pytest.skip("about CPU kernels")
    if "XLAYER_CPU_ISA" in os.environ:
        pytest.skip("already in a process with a chosen instruction set")
    program = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "oracle_rule or same_bits"]
    child = subprocess.run(program, env=os.environ | {"XLAYER_CPU_ISA": isa}, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-2000:]


# ---- PyTorch around it -----------------------------------------------------------------------------------------------


def operator_arguments(case: HdimCase) -> tuple[Any, ...]:
    floats = [case.floats[name] for name in FLOATS[:6]]
    return (*floats, case.masks["key_mask"], case.masks["pair_mask"], 0.9, case.options.get("activation") == "gelu")


def backward_arguments(case: HdimCase, entropy: bool) -> tuple[Any, ...]:
    *inputs, temperature, gelu = operator_arguments(case)
    outputs = torch.ops.xlayer.hdim_attention(*inputs, temperature, gelu)
    grad_entropy = torch.ones_like(outputs[2]) if entropy else None
    return (case.grad_context, grad_entropy, *inputs, *outputs, temperature, gelu)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masks", [{}, {"key_mask": True, "pair_mask": True}], ids=["no mask", "both masks"])
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


def test_compile_makes_one_graph_for_all_lengths(native: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter, generator = CountingBackend(), fresh_generator()
    compiled = torch.compile(XF.hdim_attention, fullgraph=True, dynamic=True, backend=counter)
    for b, sq, sk in [(2, 5, 7), (3, 9, 4), (4, 12, 31), (2, 6, 6)]:
        case = hdim_case(generator, sizes=(b, sq, sk, 8, 12, 6), device=native, key_mask=True, pair_mask=True)
        for name in FLOATS:
            case.floats[name].requires_grad_()
        context, entropy = compiled(**case.floats, **case.masks, return_entropy=True)
        expected, expected_entropy = call(case, return_entropy=True)
        grads = torch.autograd.grad(context.square().sum() + entropy, list(case.floats.values()))
        wanted = torch.autograd.grad(expected.square().sum() + expected_entropy, list(case.floats.values()))
        assert torch.equal(context, expected) and torch.equal(entropy, expected_entropy)
        assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 and counter.uses_kernel(-1)


def test_compiled_function_follows_the_backend(native: str) -> None:
    torch._dynamo.reset()
    counter = CountingBackend()
    compiled = torch.compile(XF.hdim_attention, fullgraph=True, backend=counter)
    case = hdim_case(fresh_generator(), device=native)
    for choice in ("native", "reference", "native"):
        with backend(choice):
            compiled(**case.floats)
    assert [counter.uses_kernel(index) for index in range(len(counter.graphs))] == [True, False]


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

CASE = dict(b=2, sq=3, sk=5, d=4, m=6, h=7)
BAD_SHAPES = {
    "query": [(3, 4), (1, 3, 4), (2, 3, 5)],
    "key": [(2, 5), (3, 5, 4), (2, 5, 3)],
    "value": [(2, 4, 7), (5, 7)],
    "weight1": [(6, 15), (5, 16), (96,)],
    "bias1": [(5,), (6, 1)],
    "weight2": [(5,), (2, 6), (1, 5), ()],
    "bias2": [(2,), (0,)],
    "key_mask": [(2, 4), (5,), (3, 5), (2, 5, 1)],
    "pair_mask": [(2, 3, 4), (3, 5), (2, 5, 3)],
}


def good_arguments() -> dict[str, Any]:
    case = hdim_case(fresh_generator(), sizes=(2, 3, 5, 4, 6, 7), dtype=torch.float32, key_mask=True, pair_mask=True)
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
        ({"pair_mask": torch.ones(2, 3, 5, dtype=torch.uint8)}, TypeError, "pair_mask must be a bool tensor"),
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
    """Position → replacement, for the forward operator's arguments."""
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
    case = hdim_case(fresh_generator(), sizes=(2, 3, 5, 4, 6, 7), dtype=torch.float32, key_mask=True, pair_mask=True)
    arguments = list(operator_arguments(case))
    for position, value in nonsense()[name].items():
        arguments[position] = value
    with pytest.raises((RuntimeError, TypeError, ValueError)) as raised:
        torch.ops.xlayer.hdim_attention(*arguments)
    assert "\n" not in str(raised.value) or name == "none"  # that one is torch's own schema check


def test_backward_operator_called_with_nonsense_raises() -> None:
    need_native("hdim_attention")
    case = hdim_case(fresh_generator(), sizes=(2, 3, 5, 4, 6, 7), dtype=torch.float32, key_mask=True, pair_mask=True)
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
    before = _backend._choice
    with pytest.raises(KeyError), backend("reference"):
        assert _backend.current_backend() == "reference"
        raise KeyError
    assert _backend._choice == before
    with pytest.raises(ValueError, match="backend must be one of auto, native, reference; got 'cuda'"):
        backend("cuda")


def test_native_by_name_raises_where_there_is_none() -> None:
    case = hdim_case(fresh_generator())
    floats = {name: tensor.to("meta") for name, tensor in case.floats.items()}
    with backend("native"), pytest.raises(RuntimeError, match="no native hdim_attention for torch.float64 on meta"):
        XF.hdim_attention(**floats)


def test_backends_are_really_different(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the reference was called")

    monkeypatch.setattr(reference, "hdim_attention", never)
    case = hdim_case(fresh_generator(), device=native)
    with backend("native"):
        call(case)
    with backend("reference"), pytest.raises(AssertionError, match="the reference was called"):
        call(case)
