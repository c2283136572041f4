"""The CUDA kernels of hdim_attention, on the emulator, beside the CPU kernels in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import emulation
from oracle import (
    DTYPES,
    FLOATS,
    Draw,
    HdimCase,
    Results,
    assert_same_bits,
    check_oracle_rule,
    evaluate_formula,
    fresh_generator,
    hdim_case,
)
from xlayer_ext.bench import relative_error

pytestmark = pytest.mark.cpu_kernels


def run(case: HdimCase, namespace: str) -> Results:
    """Output and gradients by the operators of one library, called directly."""
    operators: Any = getattr(torch.ops, namespace)
    floats = [case.floats[name] for name in FLOATS[:6]]
    masks = (case.masks["key_mask"], case.masks["pair_mask"])
    options = (case.options.get("temperature", 1.0), case.options.get("activation", "relu") == "gelu")
    context, logsumexp, row_entropy = operators.hdim_attention(*floats, *masks, *options)
    grad_entropy = None
    if case.grad_entropy is not None:
        rows = (logsumexp != -torch.inf).to(row_entropy.dtype)
        grad_entropy = case.grad_entropy * rows / rows.sum().clamp(min=1)
    grads = operators.hdim_attention_backward(
        case.grad_context, grad_entropy, *floats, *masks, context, logsumexp, row_entropy, *options
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
        "pair_mask": data.draw(st.booleans()),
        "grad_entropy": data.draw(st.sampled_from([None, 1.0])),
        "temperature": data.draw(st.sampled_from([0.7, 1.0, 3.0])),
        "activation": data.draw(st.sampled_from(["relu", "gelu"])),
    }
    draws, on_cpu = [], []
    for _ in range(3):
        case = hdim_case(generator, dtype=dtype, **options)
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
    generator, draws = fresh_generator(), []
    for _ in range(2):
        case = hdim_case(generator, sizes=(1, 5, 40, 64, 256, 6), dtype=dtype, key_mask=True, grad_entropy=0.5)
        exact, plain = evaluate_formula(case.to(torch.float64)), evaluate_formula(case)
        draws.append(Draw(run(case, "xlayer_emulated"), exact, plain))
    check_oracle_rule(draws, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_schedules_give_the_same_bits(dtype: torch.dtype) -> None:
    case = hdim_case(fresh_generator(), dtype=dtype, key_mask=True, pair_mask=True, grad_entropy=1.0)
    try:
        results = []
        for seed in (1, 2, 3):
            emulation.set_seed(seed)
            results.append(run(case, "xlayer_emulated"))
    finally:
        emulation.set_seed(emulation.SEED)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def test_more_columns_than_the_kernels_take_are_refused() -> None:
    emulation.library()
    with pytest.raises(RuntimeError, match="take at most 64 columns of query and key, got 65"):
        run(hdim_case(fresh_generator(), sizes=(1, 2, 3, 65, 4, 2)), "xlayer_emulated")
