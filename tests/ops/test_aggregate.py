"""The aggregation operators against their float64 formula: values, gradients, extremes, layouts, the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregate_tools import OPERATORS, aggregate_case, draw_of, evaluate
from oracle import (
    DTYPES,
    Draw,
    Results,
    assert_near,
    assert_same_bits,
    check_oracle_rule,
    draw,
    fresh_generator,
    need_native,
)
from xlayer_ext import backend
from xlayer_ext import functional as XF
from xlayer_ext.testing import relative_error

pytestmark = pytest.mark.operators

NORMS = ("none", "weight", "affine")


@pytest.fixture
def native(device: str) -> str:
    for op in OPERATORS:
        need_native(op, device)
    return device


# ---- the oracle rule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last_only", [False, True], ids=["all", "last"])
@pytest.mark.parametrize("norm", NORMS)
def test_oracle_rule_of_ema_scan(native: str, norm: str, last_only: bool, dtype: torch.dtype) -> None:
    generator = fresh_generator()

    def make() -> Draw:
        size = (7, 19, 65)
        case = aggregate_case(generator, "ema_scan", size, device=native, norm=norm, last_only=last_only)
        return draw_of(case.to(dtype))

    check_oracle_rule(make, dtype, draws=8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["depth_gru", "depth_attention"])
def test_oracle_rule_of_recurrences(native: str, op: str, dtype: torch.dtype) -> None:
    generator = fresh_generator()

    def make() -> Draw:
        case = aggregate_case(generator, op, (5, 19, 33), inputs=21, device=native)
        return draw_of(case.to(dtype))

    check_oracle_rule(make, dtype, draws=6)


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 1, 7), (2, 70, 3), (4, 5, 130), (1, 9, 16), (13, 2, 48)], ids=str)
def test_any_size(native: str, op: str, size: tuple[int, int, int]) -> None:
    for initial_state in (False, True):
        # A single element has no variance: eps keeps its norm finite.
        options: dict[str, Any] = {"eps": 0.1} if op == "ema_scan" else {}
        case = aggregate_case(fresh_generator(), op, size, device=native, initial_state=initial_state, **options)
        assert_near(evaluate(case), evaluate(case, "reference"), 1e-11)


@pytest.mark.parametrize("window", [1, 2, 4, 9])
@pytest.mark.parametrize("num_heads", [1, 3])
def test_any_memory_and_heads(native: str, num_heads: int, window: int) -> None:
    size = (6, 7, 20)
    case = aggregate_case(fresh_generator(), "depth_attention", size, device=native, num_heads=num_heads, window=window)
    assert_near(evaluate(case), evaluate(case, "reference"), 1e-12)


@given(
    op=st.sampled_from(OPERATORS),
    size=st.tuples(st.integers(0, 6), st.integers(0, 40), st.integers(1, 70)),
    inputs=st.integers(1, 40),
    norm=st.sampled_from(NORMS),
    initial_state=st.booleans(),
    last_only=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(
    native: str,
    op: str,
    size: tuple[int, int, int],
    inputs: int,
    norm: str,
    initial_state: bool,
    last_only: bool,
    seed: int,
) -> None:
    options: dict[str, Any] = {"last_only": last_only, "eps": 0.1} if op == "ema_scan" else {}
    case = aggregate_case(
        fresh_generator(seed), op, size, inputs=inputs, device=native, norm=norm, initial_state=initial_state, **options
    )
    assert_near(evaluate(case), evaluate(case, "reference"), 1e-10)


# ---- against other implementations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["native", "reference"])
def test_ema_scan_is_the_written_out_loop(device: str, choice: str) -> None:
    if choice == "native":
        need_native("ema_scan", device)
    case = aggregate_case(fresh_generator(), "ema_scan", (4, 3, 6), device=device)
    t = case.tensors
    gate = 1 / (1 + torch.exp(-t["gate_logits"]))
    state, states = t["initial_state"], []
    for layer in range(4):
        x = t["x"][layer]
        centered = x - x.mean(-1, keepdim=True)
        unit = centered / torch.sqrt((centered**2).mean(-1, keepdim=True) + 1e-5)
        state = (1 - gate[layer]) * state + gate[layer] * (unit * t["norm_weight"] + t["norm_bias"])
        states.append(state)
    with backend(choice):
        torch.testing.assert_close(XF.ema_scan(**t), torch.stack(states), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(XF.ema_scan(**t, last_only=True), state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("choice", ["native", "reference"])
@pytest.mark.parametrize("bias", [True, False])
def test_depth_gru_is_a_stepped_cell(device: str, choice: str, bias: bool) -> None:
    if choice == "native":
        need_native("depth_gru", device)
    generator = fresh_generator()
    cell = torch.nn.GRUCell(9, 13, bias=bias, dtype=torch.float64).to(device)
    x = draw(generator, 6, 2, 5, 9).to(device).requires_grad_()  # two batches of five tokens
    parameters = dict(cell.named_parameters())
    grad = draw(generator, 6, 2, 5, 13).to(device)
    state, states = None, []
    for tap in x.flatten(1, 2):
        state = cell(tap, state)
        states.append(state)
    expected = torch.stack(states).unflatten(1, (2, 5))
    wanted = torch.autograd.grad(expected, [x, *parameters.values()], grad)
    with backend(choice):
        actual = XF.depth_gru(x, **parameters)
        found = torch.autograd.grad(actual, [x, *parameters.values()], grad)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("choice", ["native", "reference"])
def test_depth_attention_is_scaled_dot_product_attention(device: str, choice: str) -> None:
    if choice == "native":
        need_native("depth_attention", device)
    case = aggregate_case(fresh_generator(), "depth_attention", (5, 4, 12), device=device)
    t, num_heads, window = case.tensors, case.options["num_heads"], case.options["window"]

    def by_head(rows: torch.Tensor) -> torch.Tensor:  # [..., N, e] -> [N, heads, ..., e/heads]
        return rows.unflatten(-1, (num_heads, -1)).movedim((-3, -2), (0, 1))

    state, states = t["initial_state"], []
    for layer in range(5):
        last = t["x"][max(0, layer - window + 1) : layer + 1]
        query = by_head((state @ t["weight_query"].T)[None])
        key, value = by_head(last @ t["weight_key"].T), by_head(last @ t["weight_value"].T)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        state = state + out.flatten(1) @ t["weight_out"].T
        states.append(state)
    with backend(choice):
        actual = XF.depth_attention(**t, **case.options)
    torch.testing.assert_close(actual, torch.stack(states), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("op", OPERATORS)
def test_gradcheck(native: str, op: str) -> None:
    case = aggregate_case(fresh_generator(), op, (3, 4, 6), inputs=5, device=native)
    names, tensors = list(case.tensors), [t.requires_grad_() for t in case.tensors.values()]

    def call(*given: torch.Tensor) -> torch.Tensor:
        return getattr(XF, op)(**dict(zip(names, given, strict=True)), **case.options)

    with backend("native"):
        assert torch.autograd.gradcheck(call, tensors)


# ---- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPERATORS)
def test_strided_taps_and_gradients(native: str, op: str) -> None:
    generator = fresh_generator()
    case = aggregate_case(generator, op, (4, 6, 20), device=native)
    expected = evaluate(case)
    x, grad = case.tensors["x"], case.grad
    layouts: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),  # tokens before layers
        lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],  # rows further apart
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),  # no unit stride
        lambda t: torch.stack([t, t], -1)[..., 0],  # every other element
    ]
    for layout in layouts:
        strided = case.with_tensors(x=layout(x))
        assert_same_bits(evaluate(strided), expected)
        assert_same_bits(evaluate(type(case)(op, case.tensors, layout(grad), case.options)), expected)


@pytest.mark.parametrize("op", OPERATORS)
def test_more_leading_dimensions(native: str, op: str) -> None:
    case = aggregate_case(fresh_generator(), op, (3, 12, 10), device=native)
    expected = getattr(XF, op)(**case.tensors, **case.options)
    folded = {
        name: t.unflatten(-2, (3, 4)) if name in ("x", "initial_state") else t for name, t in case.tensors.items()
    }
    assert torch.equal(getattr(XF, op)(**folded, **case.options), expected.unflatten(1, (3, 4)))
    single = {name: t[..., 0, :] if name in ("x", "initial_state") else t for name, t in case.tensors.items()}
    actual = getattr(XF, op)(**single, **case.options)
    torch.testing.assert_close(actual, expected[:, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", OPERATORS)
def test_expanded_gradient(native: str, op: str) -> None:
    case = aggregate_case(fresh_generator(), op, (3, 5, 8), device=native)
    x = case.tensors["x"].requires_grad_()
    sides = []
    for choice in ("native", "reference"):
        with backend(choice):
            sides.append(torch.autograd.grad(getattr(XF, op)(**case.tensors, **case.options).sum(), x)[0])
    torch.testing.assert_close(*sides, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("choice", ["native", "reference"])
@pytest.mark.parametrize("op", OPERATORS)
def test_no_layers_no_tokens(device: str, op: str, choice: str) -> None:
    if choice == "native":
        need_native(op, device)
    for size in ((0, 3, 8), (3, 0, 8), (0, 0, 8)):
        results = evaluate(aggregate_case(fresh_generator(), op, size, device=device), choice)
        assert results["states"].shape == size
        for name, grad in results.items():
            if name.startswith("grad_") and name not in ("grad_x", "grad_initial_state"):
                assert torch.equal(grad, torch.zeros_like(grad)), name
    case = aggregate_case(fresh_generator(), "ema_scan", (0, 3, 8), device=device, last_only=True)
    results = evaluate(case, choice)
    assert torch.equal(results["states"], case.tensors["initial_state"])
    assert torch.equal(results["grad_initial_state"], case.grad)


@pytest.mark.cpu_kernels
def test_results_that_are_written_past_the_caches(native: str) -> None:
    case = aggregate_case(fresh_generator(), "ema_scan", (4, 8200, 256), device=native).to(torch.float32)
    whole = evaluate(case)
    assert whole["states"].nbytes >= 32 << 20
    for half in (slice(0, 4100), slice(4100, None)):  # each is small enough for plain stores
        given = {name: t[..., half, :] if name in ("x", "initial_state") else t for name, t in case.tensors.items()}
        part = evaluate(type(case)(case.op, given, case.grad[:, half], case.options))
        for name in ("states", "grad_x", "grad_initial_state"):
            assert torch.equal(part[name], whole[name][..., half, :]), name


# ---- extremes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_with_its_token(native: str, op: str, value: float) -> None:
    case = aggregate_case(fresh_generator(), op, (4, 6, 20), device=native).to(torch.float32)
    clean = evaluate(case)
    x = case.tensors["x"].clone()
    x[1, 2, 3] = value
    results = evaluate(case.with_tensors(x=x))
    others = torch.tensor([0, 1, 3, 4, 5], device=native)
    for name in ("states", "grad_x"):
        assert torch.equal(results[name][:, others], clean[name][:, others])
    assert torch.equal(results["states"][0], clean["states"][0])  # nor does it go back in depth
    with backend("reference"):
        expected = getattr(XF, op)(**case.with_tensors(x=x).tensors, **case.options)
    assert torch.equal(results["states"].isnan(), expected.isnan())


@pytest.mark.parametrize("sizes", [(4, 30, 96), (2, 3, 4104)], ids=str)
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_large_means_do_not_drown_the_norm(
    native: str, kernels: str, sizes: tuple[int, int, int], shift: float
) -> None:
    """A mean rounded to float32 would put x̂ off by shift · 3e-8, 2000 eps. As it is, x̂ and what is made of it element
    by element are some 10 roundings of eps/2, which add up to less than 5 eps, whatever d is: sums over d are short
    sums of short sums."""
    generator = fresh_generator()

    def make() -> Draw:
        case = aggregate_case(generator, "ema_scan", sizes, device=native)
        drawn = draw_of(case.with_tensors(x=case.tensors["x"] + shift).to(torch.float32))
        for name in ("states", "grad_x", "grad_norm_weight"):
            assert relative_error(drawn.actual[name], drawn.exact[name]) < 5 * 2**-23, name
        return drawn

    # grad_gate_logits has a number per layer, which may cancel: only many draws separate chance from a fault.
    check_oracle_rule(make, torch.float32, draws=4 if kernels == "emulated" else 24)


def test_sums_over_long_rows_keep_their_digits(native: str, kernels: str) -> None:
    """Adding n numbers of one sign in one chain errs by about eps/2 · √(1/3) · √(n/3) of the result, over 10 eps in
    vectors of 16 columns, 20 in vectors of 4; chains of some dozens, whose sums are then added, err by less than 3
    eps."""
    columns = 8192 if kernels == "emulated" else 65536
    case = aggregate_case(fresh_generator(), "ema_scan", (2, 3, columns), device=native, norm="none", last_only=True)
    larger = torch.tensor([1.0, 9.0], device=native).view(2, 1, 1)  # than the state before, so that x_l − S_{l−1} > 0
    positive = case.with_tensors(
        x=(1 + case.tensors["x"].abs()) * larger, initial_state=0 * case.tensors["initial_state"]
    )
    case = type(case)(case.op, positive.tensors, torch.ones_like(case.grad), case.options).to(torch.float32)
    actual, exact = evaluate(case), evaluate(case.to(torch.float64), "reference")
    assert relative_error(actual["grad_gate_logits"], exact["grad_gate_logits"]) < 3 * 2**-23


def test_constant_rows_normalize_to_the_bias(native: str) -> None:
    x = torch.full((2, 3, 16), 5.0, device=native)
    bias = torch.randn(16, device=native)
    states = XF.ema_scan(x, torch.full((2,), 40.0, device=native), norm_weight=torch.ones_like(bias), norm_bias=bias)
    torch.testing.assert_close(states, bias.expand(2, 3, 16))


def test_open_and_shut_gates(native: str) -> None:
    case = aggregate_case(fresh_generator(), "ema_scan", (3, 5, 8), device=native, norm="none")
    for logit, expected in ((-800.0, case.tensors["initial_state"].expand(3, 5, 8)), (800.0, case.tensors["x"])):
        gates = torch.full((3,), logit, dtype=torch.float64, device=native)
        results = evaluate(case.with_tensors(gate_logits=gates))
        assert torch.equal(results["states"], expected)
        assert torch.equal(results["grad_gate_logits"], torch.zeros_like(gates))


def test_gates_far_from_zero_keep_their_digits(native: str) -> None:
    """1 − σ(a) comes from an exponential and two roundings of its own, so that each layer adds at most 3 eps to what it
    passes on; taken from σ(a) it would have lost 17 of 24 bits at a = 12."""
    logits = torch.tensor([-12.0, -6.0, 0.0, 6.0, 12.0], device=native)
    case = aggregate_case(fresh_generator(), "ema_scan", (5, 4, 24), device=native, norm="none", last_only=True)
    positive = case.with_tensors(
        x=2 + case.tensors["x"].abs(), initial_state=0 * case.tensors["initial_state"], gate_logits=logits
    )
    case = type(case)(case.op, positive.tensors, torch.ones_like(case.grad), case.options).to(torch.float32)
    actual, exact = evaluate(case), evaluate(case.to(torch.float64), "reference")
    for name in ("states", "grad_x", "grad_initial_state"):
        assert ((actual[name].double() - exact[name]).abs() <= 5 * 3 * 2**-23 * exact[name].abs()).all(), name


def test_saturated_units_of_the_gru(native: str) -> None:
    """Gates of pre-activations of some 1e4 are 0 or 1 and candidates ±1 to the bit, but for the one unit in a hundred
    that has a small one, rounded with all of eps/2 · 1e4 · a few."""
    case = aggregate_case(fresh_generator(), "depth_gru", (4, 9, 24), device=native, scale=1e4).to(torch.float32)
    results, expected = evaluate(case), evaluate(case.to(torch.float64), "reference")
    assert all(bool(t.isfinite().all()) for t in results.values())
    error = (results["states"].double() - expected["states"]).abs()
    assert error.quantile(0.95) <= 4 * 2**-23  # of mixtures of ±1 with what the layers before left
    assert error.max() <= 4 * 10 * 2**-24 * 1e4  # four layers, each as far off as its pre-activations


def test_equal_logits_of_large_size_are_averaged(native: str) -> None:
    case = aggregate_case(fresh_generator(), "depth_attention", (4, 3, 12), device=native).to(torch.float32)
    huge = case.with_tensors(weight_key=0 * case.tensors["weight_key"] + 1e18)
    assert all(bool(t.isfinite().all()) for name, t in evaluate(huge).items() if name == "states")


# ---- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_same_bits_every_time(
    native: str, op: str, dtype: torch.dtype, schedule: Callable[[int], None], kernels: str
) -> None:
    size = (3, 40, 24) if kernels == "emulated" else (3, 500, 40)
    case = aggregate_case(fresh_generator(), op, size, device=native).to(dtype)

    def results() -> Results:
        if op != "depth_attention":
            return evaluate(case)
        # Keys and values are torch's own products, which add up in another order for other numbers of threads.
        t, x = case.tensors, case.tensors["x"][..., :10].contiguous()
        taps = (x, x, t["weight_query"], t["weight_out"], t["initial_state"])
        states, attended = torch.ops.xlayer.depth_attention(*taps, 2, 3, 0.5, True)
        grads = torch.ops.xlayer.depth_attention_backward(case.grad, states, attended, *taps, 2, 3, 0.5)
        return {"states": states} | {f"grad_{index}": grad for index, grad in enumerate(grads)}

    expected = results()
    for order in (1, 2, 3):
        schedule(order)
        assert_same_bits(results(), expected)
