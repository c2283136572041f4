"""The CUDA kernels of hdim_attention, on the emulator, beside the CPU kernels in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import emulation
from oracle import (
    DTYPES,
    FLOATS,
    Draw,
    HdimCase,
    Results,
    assert_same_bits,
    check_oracle_rule,
    evaluate,
    evaluate_formula,
    fresh_generator,
    hdim_case,
    without_kinks,
)
from xlayer_ext import functional as XF
from xlayer_ext.reference.hdim import pair_features
from xlayer_ext.testing import relative_error

pytestmark = pytest.mark.cpu_kernels


def run(case: HdimCase, namespace: str, tf32: bool = False) -> Results:
    """Calls the operators of one library directly; returns output and gradients."""
    operators: Any = getattr(torch.ops, namespace)
    floats = [case.floats[name] for name in FLOATS[:6]]
    masks = (case.masks["key_mask"], case.masks["attn_mask"])
    options = (case.options.get("temperature", 1.0), case.options.get("activation", "relu") == "gelu", tf32)
    context, statistics, row_entropy = operators.hdim_attention(*floats, *masks, *options)
    grad_entropy = None
    if case.grad_entropy is not None:
        rows = (statistics[..., 1] != 0).to(row_entropy.dtype)
        grad_entropy = case.grad_entropy * rows / rows.sum().clamp(min=1)
    grads = operators.hdim_attention_backward(
        case.grad_context, grad_entropy, *floats, *masks, context, statistics, *options
    )
    return {"context": context} | {f"grad_{name}": grad for name, grad in zip(FLOATS[:6], grads, strict=True)}


@settings(max_examples=24, deadline=None)
@given(data=st.data())
def test_cuda_kernels_agree_with_the_cpu_kernels(data: st.DataObject) -> None:
    """Each obeys the oracle rule, so they differ by no more than twice the room that it gives."""
    emulation.library()

    def size(largest: int) -> int:
        return data.draw(st.integers(1, largest))

    generator = fresh_generator(data.draw(st.integers(0, 2**31 - 1)))
    dtype = data.draw(st.sampled_from(DTYPES))
    options: dict[str, Any] = {
        "sizes": (size(3), size(24), size(40), size(40), size(40), size(24)),
        "key_mask": data.draw(st.booleans()),
        "attn_mask": data.draw(st.booleans()),
        "grad_entropy": data.draw(st.sampled_from([None, 1.0])),
        "temperature": data.draw(st.sampled_from([0.7, 1.0, 3.0])),
        "activation": data.draw(st.sampled_from(["relu", "gelu"])),
    }
    draws, on_cpu = [], []
    for _ in range(3):
        case = without_kinks(hdim_case(generator, dtype=dtype, **options))
        exact, plain = evaluate_formula(case.to(torch.float64)), evaluate_formula(case)
        draws.append(Draw(run(case, "xlayer_emulated"), exact, plain))
        on_cpu.append(run(case, "xlayer"))
    # Gradients that cancel to nothing keep the roundings of what was summed.
    eps, summed = torch.finfo(dtype).eps, max(float(t.abs().max()) for draw in draws for t in draw.exact.values())
    for name in draws[0].actual:
        sides = (
            [draw.actual for draw in draws],
            on_cpu,
            [draw.exact for draw in draws],
            [draw.plain for draw in draws],
        )
        actual, cpu, exact, plain = (torch.cat([one[name].double().flatten() for one in side]) for side in sides)
        room = 1e-12 if dtype == torch.float64 else 1.1 * relative_error(plain, exact) + 2 * eps
        apart = float((actual - cpu).square().mean().sqrt())
        assert apart <= 2 * room * float(exact.square().mean().sqrt()) + 4 * eps * summed, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_oracle_rule_at_the_largest_sizes(dtype: torch.dtype) -> None:
    """D = 64 and M = 256: hidden units in several passes through shared memory, columns in several walks."""
    emulation.library()
    generator = fresh_generator()

    def make() -> Draw:
        sizes = (1, 5, 40, 64, 256, 6)
        case = without_kinks(hdim_case(generator, sizes=sizes, dtype=dtype, key_mask=True, grad_entropy=0.5))
        exact, plain = evaluate_formula(case.to(torch.float64)), evaluate_formula(case)
        return Draw(run(case, "xlayer_emulated"), exact, plain)

    check_oracle_rule(make, dtype, draws=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_schedules_give_the_same_bits(dtype: torch.dtype) -> None:
    case = hdim_case(fresh_generator(), dtype=dtype, key_mask=True, attn_mask=True, grad_entropy=1.0)
    try:
        results = []
        for seed in (1, 2, 3):
            emulation.set_seed(seed)
            results.append(run(case, "xlayer_emulated"))
    finally:
        emulation.set_seed(emulation.SEED)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def rounded(x: Tensor) -> Tensor:
    """Rounds to tf32, ten bits after the point; the gradient passes through."""
    bits = (x.detach().float().view(torch.int32) + 0x1000) & ~0x1FFF
    return x + (bits.view(torch.float32).to(x.dtype) - x).detach()


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_tf32_rounds_as_much_as_the_formula_would(activation: str) -> None:
    """The error is that of the formula with the factors of its first product rounded, as tf32 multiplies them."""
    emulation.library()
    generator, draws = fresh_generator(), []

    def formula(*, bias2: Tensor, query: Tensor, key: Tensor, value: Tensor, weight1: Tensor, **rest: Any) -> Any:
        hidden = rounded(pair_features(query, key)) @ rounded(weight1).mT + rest["bias1"]
        act = torch.relu(hidden) if activation == "relu" else torch.nn.functional.gelu(hidden)
        return (act @ rest["weight2"]).softmax(-1) @ value + 0 * bias2, None

    for _ in range(4):
        case = hdim_case(generator, dtype=torch.float32, activation=activation)
        exact = evaluate_formula(case.to(torch.float64))
        draws.append((run(case, "xlayer_emulated", tf32=True), exact, evaluate(case.to(torch.float64), formula)))
    for name in draws[0][0]:
        sides = zip(*draws, strict=True)
        actual, exact, plain = (torch.cat([as_rows(one[name].double()) for one in side]) for side in sides)
        error_of = error_of_most_rows if activation == "relu" and name in BEHIND_THE_KINK else relative_error
        error = error_of(actual, exact)
        assert 1e-5 < error <= 1.1 * error_of(plain, exact) + 2 * 2**-10, name


# Factors rounded by 2⁻¹¹ switch one hidden unit in a thousand at relu on or off. The gradients that go
# through such a unit are then others, neither wrong, and few rows may hold nearly all of the error: one had 96 % of it.
BEHIND_THE_KINK = ("grad_query", "grad_key", "grad_weight1", "grad_bias1")


def as_rows(tensor: Tensor) -> Tensor:
    """Reshapes a tensor to rows of its last dimension; numbers of one dimension are a row each."""
    return tensor.unsqueeze(-1) if tensor.dim() == 1 else tensor.flatten(0, -2)


def error_of_most_rows(actual: Tensor, exact: Tensor) -> float:
    """Returns the median of the rows' errors, over the rms of the rows."""
    rows = (actual - exact).square().mean(-1).sqrt()
    return float(rows.median() / exact.square().mean().sqrt())


def test_tf32_only_when_asked() -> None:
    case = hdim_case(fresh_generator(), dtype=torch.float32)
    before, operator = torch.get_float32_matmul_precision(), torch.ops.xlayer.hdim_attention
    seen = []

    def spy(*arguments: Any) -> Any:
        seen.append(arguments[-1])
        return operator(*arguments)

    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.ops.xlayer, "hdim_attention", spy)
                XF.hdim_attention(**case.floats)
                XF.hdim_attention(**case.to(torch.float64).floats)
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [False, False, True, False, True, False]


def test_a_compiled_graph_follows_the_setting() -> None:
    case = hdim_case(fresh_generator(), dtype=torch.float32)
    before, graphs = torch.get_float32_matmul_precision(), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        calls = [node for node in graph.graph.nodes if "hdim_attention" in str(node.target)]
        graphs.append([node.args[-1] for node in calls])
        return graph

    compiled = torch.compile(lambda floats: XF.hdim_attention(**floats), backend=backend, fullgraph=True)
    try:
        for precision in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            compiled(case.floats)
    finally:
        torch.set_float32_matmul_precision(before)
        torch._dynamo.reset()
    assert graphs == [[False], [True]]


def test_more_columns_than_the_kernels_take_are_refused() -> None:
    emulation.library()
    with pytest.raises(RuntimeError, match="take at most 64 columns of query and key, got 65"):
        run(hdim_case(fresh_generator(), sizes=(1, 2, 3, 65, 4, 2)), "xlayer_emulated")
