"""hdim_attention: exactness, masks, determinism, memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.harness.measure import peak_memory
from oracle import (
    DTYPES,
    FLOATS,
    Draw,
    HdimCase,
    assert_near,
    assert_same_bits,
    check_oracle_rule,
    evaluate_formula,
    evaluate_functional,
    fresh_generator,
    hdim_case,
    need_native,
    without_kinks,
)
from xlayer_ext import backend
from xlayer_ext import functional as XF
from xlayer_ext.reference.hdim import pair_features

pytestmark = pytest.mark.operators

MASKS = {
    "no mask": {},
    "key mask": {"key_mask": True},
    "pair mask": {"attn_mask": True},
    "both masks": {"key_mask": True, "attn_mask": True},
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


# ---- exactness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_oracle_rule(native: str, dtype: torch.dtype, masks: dict[str, bool], activation: str) -> None:
    options = {"activation": activation, "temperature": 0.8, **masks}
    generator = fresh_generator()

    def make() -> Draw:
        case = without_kinks(hdim_case(generator, dtype=dtype, device=native, grad_entropy=0.7, **options))
        actual = evaluate_functional(case, "native")
        assert torch.equal(actual.pop("grad_bias2"), torch.zeros_like(case.floats["bias2"]))
        return Draw(actual, evaluate_formula(case.to(torch.float64)), evaluate_formula(case))

    check_oracle_rule(make, dtype, draws=6)


# Cases of sharp softmaxes, and the number of draws that their errors are pooled over. The sharper a softmax is, the
# fewer rows most of the error comes from, and the more draws the pool needs: resampled from 160 draws, the rule fails
# by chance with a probability below 0.004. With one column it takes no more sharpness than 1, and at 3 a handful of
# rows hold the error of hundreds of draws. The rule was seen to hold with these settings. "few keys" with weights x 10,
# the entropy alone, has 1.2 to 1.3 times the formula's error in grad_bias1 and grad_weight2, for a reason not yet
# found.
SHARP: dict[str, tuple[int, dict[str, Any]]] = {
    "weights x 3": (16, {"sharpness": 3.0}),
    "weights x 10": (24, {"sharpness": 10.0}),
    "weights x 30": (64, {"sharpness": 30.0}),
    "temperature 0.05": (
        24,
        {"temperature": 0.05, "sharpness": 0.3, "activation": "gelu", "key_mask": True, "attn_mask": True},
    ),
    "one column": (24, {"sizes": (2, 40, 37, 1, 33, 20)}),
    "few keys": (24, {"sharpness": 3.0, "sizes": (2, 40, 3, 24, 33, 20)}),
    "many keys": (24, {"sharpness": 5.0, "sizes": (1, 24, 130, 24, 33, 20)}),
}


@pytest.mark.parametrize("alone", [False, True], ids=["both", "entropy alone"])
@pytest.mark.parametrize("name", SHARP)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_oracle_rule_where_the_softmax_is_sharp(
    native: str, kernels: str, dtype: torch.dtype, name: str, alone: bool
) -> None:
    """Gradients of context and entropy, and of the entropy alone, which a shift of all log-probabilities spoils."""
    draws, options = SHARP[name]
    if kernels == "emulated":  # a draw takes a second there
        if name not in ("weights x 3", "few keys"):
            pytest.skip("takes minutes on the emulator")
        draws = 8
    generator = fresh_generator()

    def make() -> Draw:
        case = without_kinks(hdim_case(generator, dtype=dtype, device=native, grad_entropy=1.0, **options))
        if alone:
            case = replace(case, grad_context=torch.zeros_like(case.grad_context))
        actual = evaluate_functional(case, "native")
        if alone:
            assert not actual.pop("grad_value").any()
        return Draw(actual, evaluate_formula(case.to(torch.float64)), evaluate_formula(case))

    # At 16 bits the formula's own roundings are far larger than the kernels': a few draws show it.
    check_oracle_rule(make, dtype, draws=draws if dtype == torch.float32 else 3)


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1, 1, 1), (1, 64, 64, 64, 256, 17), (3, 1, 130, 16, 96, 5), (2, 65, 1, 3, 7, 1)]
)
def test_odd_sizes(native: str, sizes: tuple[int, ...]) -> None:
    case = hdim_case(fresh_generator(), sizes=sizes, device=native)
    assert_near(evaluate_functional(case), evaluate_functional(case, "reference"), 1e-12)


def smooth_case(generator: torch.Generator, **options: Any) -> HdimCase:
    """Draws a case no nearer than 1e-3 to the kinks of |a − b| and ReLU, since finite differences straddle such
    points."""
    while True:
        case = hdim_case(generator, sizes=(2, 2, 3, 3, 4, 2), **options)
        case.floats["query"].add_(0.1)  # unties
        features = pair_features(case.floats["query"], case.floats["key"])
        hidden = features @ case.floats["weight1"].mT + case.floats["bias1"]
        if min(features[..., -3:].abs().min(), hidden.abs().min()) > 1e-3:
            return case


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_gradcheck(native: str, masks: dict[str, bool], activation: str) -> None:
    case = smooth_case(fresh_generator(), device=native, activation=activation, temperature=1.3, **masks)
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
    """The temperature multiplies gradients by a thousand: those of the outputs are small, since float16 ends at 65504,
    which gradients of 1 have been seen to go beyond by a factor of 3."""
    scale = 2.0**-6
    case = hdim_case(fresh_generator(), device=native, scale=30.0, temperature=1e-3, grad_entropy=scale)
    case = replace(case, grad_context=scale * case.grad_context).to(dtype)
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
    case = hdim_case(fresh_generator(), dtype=torch.float32, device=device, attn_mask=True, grad_entropy=0.5)
    case.masks["attn_mask"][:, :, 3] = False
    dirty = {name: case.floats[name].clone() for name in ("key", "value")}
    for tensor in dirty.values():
        tensor[:, 3] = poison
    assert_same_bits(evaluate_functional(case.with_floats(**dirty), choice), evaluate_functional(case, choice))


@pytest.mark.parametrize("spoiled", ["key", "value"])
def test_a_row_is_untouched_by_what_it_may_not_use(choice: str, device: str, spoiled: str) -> None:
    case = hdim_case(fresh_generator(), dtype=torch.float32, device=device, attn_mask=True)
    case.masks["attn_mask"][:, :, 3] = False
    case.masks["attn_mask"][:, 5, 3] = True  # row 5 may use the bad key, no other
    dirty = case.floats[spoiled].clone()
    dirty[:, 3] = float("nan")
    actual = evaluate_functional(case.with_floats(**{spoiled: dirty}), choice)
    clean = evaluate_functional(case, choice)
    assert actual["context"][:, 5].isnan().all()
    others = torch.arange(case.floats["query"].shape[1]) != 5
    for name in ("context", "grad_query"):
        assert torch.equal(actual[name][:, others], clean[name][:, others]), name


def test_rows_without_a_pair_are_zero(choice: str, device: str) -> None:
    case = hdim_case(fresh_generator(), device=device, attn_mask=True, grad_entropy=0.5)
    case.masks["attn_mask"][:, 4] = False
    bad_query = case.floats["query"].clone()
    bad_query[:, 4] = float("nan")
    actual = evaluate_functional(case.with_floats(query=bad_query), choice)
    assert not actual["context"][:, 4].any() and not actual["grad_query"][:, 4].any()
    assert_same_bits(actual, evaluate_functional(case, choice))


def test_entropy_counts_only_rows_with_a_pair(choice: str, device: str) -> None:
    case = hdim_case(fresh_generator(), device=device, sizes=(1, 3, 8, 4, 5, 2), attn_mask=True, grad_entropy=1.0)
    case = case.with_floats(weight2=torch.zeros_like(case.floats["weight2"]))  # uniform over what is allowed
    pairs = torch.zeros(1, 3, 8, dtype=torch.bool, device=device)
    pairs[0, 1, :2] = pairs[0, 2, :4] = True
    case.masks["attn_mask"] = pairs
    expected = (torch.tensor(2.0).log() + torch.tensor(4.0).log()) / 2
    torch.testing.assert_close(evaluate_functional(case, choice)["entropy"].cpu().float(), expected)
    case.masks["attn_mask"] = torch.zeros_like(pairs)
    empty = evaluate_functional(case, choice)
    assert empty["entropy"] == 0 and not any(tensor.any() for tensor in empty.values())


@pytest.mark.parametrize(
    "sizes", [(0, 3, 4, 2, 3, 2), (2, 0, 4, 2, 3, 2), (2, 3, 0, 2, 3, 2), (2, 3, 4, 2, 3, 0)], ids=str
)
@pytest.mark.parametrize("masks", [{}, {"key_mask": True, "attn_mask": True}], ids=["no mask", "both masks"])
def test_empty_dimensions(choice: str, device: str, sizes: tuple[int, ...], masks: dict[str, bool]) -> None:
    case = hdim_case(fresh_generator(), sizes=sizes, device=device, grad_entropy=1.0 if sizes[-1] else 0.0, **masks)
    actual = evaluate_functional(case, choice)
    for name in FLOATS:
        assert actual[f"grad_{name}"].shape == case.floats[name].shape
    assert actual["context"].shape == case.grad_context.shape
    if sizes[-1]:
        assert not any(tensor.any() for tensor in actual.values())


def test_no_hidden_units_weigh_all_keys_alike(choice: str, device: str) -> None:
    case = hdim_case(fresh_generator(), sizes=(2, 3, 4, 2, 0, 2), device=device, key_mask=True)
    actual = evaluate_functional(case, choice)
    assert_near(actual, evaluate_functional(case, "reference"), 1e-12)
    assert actual["context"].any() and not actual["grad_query"].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_minus_infinity(choice: str, device: str, dtype: torch.dtype) -> None:
    """One of them takes its key out of a row; a row of nothing else is NaN, as in PyTorch's softmax."""
    case = hdim_case(fresh_generator(), sizes=(1, 2, 3, 4, 5, 2), dtype=dtype, device=device)
    all_of_them = case.with_floats(bias1=torch.ones_like(case.floats["bias1"]))
    zero = {name: torch.zeros_like(case.floats[name]) for name in ("weight1", "query", "key")}
    endless = torch.full_like(case.floats["weight2"], -torch.inf)
    context = evaluate_functional(all_of_them.with_floats(**zero, weight2=endless), choice)["context"]
    assert context.isnan().all()
    key = zero["key"].clone()
    key[0, 1, 0] = 1
    weight1 = zero["weight1"].clone()
    weight1[:, 4] = 1  # reads the key's first column
    one = {"bias1": torch.zeros_like(case.floats["bias1"]), "weight1": weight1, "query": zero["query"], "key": key}
    huge = torch.full_like(endless, -torch.finfo(dtype).max)
    context = evaluate_functional(case.with_floats(**one, weight2=huge), choice)["context"]
    torch.testing.assert_close(context, case.floats["value"][:, ::2].mean(1, keepdim=True).expand_as(context))


# ---- fuzz ----------------------------------------------------------------------------------------------------------


def restride(tensor: Tensor, how: str) -> Tensor:
    """Copies the tensor to other strides."""
    if how == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "sliced" and tensor.dim():
        padded = tensor.new_full(
            (*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), float("nan") if tensor.is_floating_point() else 1
        )
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
        attn_mask=data.draw(st.booleans()),
        grad_entropy=data.draw(st.sampled_from([None, 0.0, 1.0])),
        scale=data.draw(st.sampled_from([0.0, 1e-3, 1.0, 10.0])),
        temperature=data.draw(st.sampled_from([0.3, 1.0, 50.0])),
        activation=data.draw(st.sampled_from(["relu", "gelu"])),
    )
    strides = st.sampled_from(["contiguous", "transposed", "sliced"])
    case = case.with_floats(**{name: restride(case.floats[name], data.draw(strides)) for name in FLOATS[:6]})
    masks = {n: None if m is None else restride(m, data.draw(strides)) for n, m in case.masks.items()}
    case = HdimCase(
        case.floats, masks, restride(case.grad_context, data.draw(strides)), case.options, case.grad_entropy
    )
    assert_near(evaluate_functional(case), evaluate_functional(case, "reference"), 1e-10)


def test_expanded_inputs(native: str) -> None:
    generator = fresh_generator()
    case = hdim_case(generator, device=native, sizes=(3, 5, 5, 8, 12, 4), key_mask=True)
    one = hdim_case(generator, device=native, sizes=(1, 5, 5, 8, 12, 4), attn_mask=True)
    floats = {name: one.floats[name].expand_as(case.floats[name]) for name in ("query", "key", "value")}
    masks = {"key_mask": case.masks["key_mask"], "attn_mask": one.masks["attn_mask"].expand(3, 5, 5)}
    grad = torch.ones((), dtype=torch.float64, device=native).expand(3, 5, 4)
    case = HdimCase(case.floats | floats, masks, grad)
    assert_near(evaluate_functional(case), evaluate_functional(case, "reference"), 1e-12)


# ---- determinism, memory, instruction sets ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_in_any_order(native: str, kernels: str, schedule: Callable[[int], None], dtype: torch.dtype) -> None:
    sizes = (2, 34, 70, 24, 40, 48) if kernels == "emulated" else (3, 70, 90, 24, 96, 48)
    case = hdim_case(fresh_generator(), sizes=sizes, dtype=dtype, device=native, key_mask=True, grad_entropy=1.0)
    expected = evaluate_functional(case)
    for order in (1, 2, 3):
        schedule(order)
        assert_same_bits(evaluate_functional(case), expected)


def memory_work(tokens: int) -> Callable[[], object]:
    """Makes the work that `peak_memory` measures in a fresh process: forward and backward on the native kernel."""
    case = hdim_case(fresh_generator(0), sizes=(1, tokens, tokens, 24, 96, 16), dtype=torch.float32)
    return lambda: evaluate_functional(case)


@pytest.mark.cpu_kernels
def test_no_buffer_of_pair_features() -> None:
    need_native("hdim_attention")
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("reads the resident size of a Linux process")
    tokens = 512
    pairs = 4 * tokens * tokens  # [B, Sq, Sk] in float32; [B, Sq, Sk, 4D] and [B, Sq, Sk, M] are 96 times as large
    assert peak_memory(memory_work, {"tokens": tokens}) < 6 * pairs


@pytest.mark.slow
@pytest.mark.cpu_kernels
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    need_native("hdim_attention")
    from xlayer_ext import _native

    environment = os.environ | {"XLAYER_CPU_ISA": isa}
    ask = [sys.executable, "-c", "from xlayer_ext import _native; print(_native.isa())"]
    if subprocess.run(ask, env=environment, capture_output=True, text=True, check=True).stdout.strip() != isa:
        pytest.skip(f"this processor has no {isa}")
    if _native.isa() == isa:
        pytest.skip(f"{isa} is what this process uses: the other tests cover it")
    tests = "(oracle_rule and relu and both) or odd_sizes or same_bits"
    program = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", tests]
    child = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-2000:]
