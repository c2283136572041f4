"""The CUDA kernels of the hyper operators, on the emulator, beside the CPU kernels in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import emulation
from hyper_tools import HyperCase, all_cases, evaluate_formula, hyper_case
from oracle import Draw, Results, assert_near, assert_same_bits, check_oracle_rule, fresh_generator
from xlayer_ext.testing import relative_error

pytestmark = pytest.mark.cpu_kernels

NORMS = ("none", "layer", "rms", "rms_all")
FORMS = ("identity", "tanh", "sinkhorn_rows", "sinkhorn_columns")
LOSSES = ("streams", "branch_input")


def four(tensor: Tensor, lead: int) -> Tensor:
    """Reshapes a tensor with ``lead`` leading dimensions to [outer, inner, …]."""
    return tensor.reshape(1, -1, *tensor.shape[lead:])


def run(case: HyperCase, namespace: str) -> Results:
    """Calls the operators of one library directly; returns outputs and gradients."""
    operators: Any = getattr(torch.ops, namespace)
    c, lead = case.connection, case.streams.dim() - 2
    norm = 0 if c.weight is None else NORMS.index(c.norm)
    connection = (c.base, c.weight, c.bias, c.scale, norm, FORMS.index(c.form) if norm else 0, c.sinkhorn_iters, c.eps)
    shared = case.coefficients.dim() == 2
    coefficients = case.coefficients if shared else four(case.coefficients, lead)
    post = (four(case.streams, lead), four(case.branch_output, lead), coefficients)
    out, x = four(case.grads["streams"], lead), four(case.grads["branch_input"], lead)
    if case.part == "post":
        values: tuple[Tensor, ...] = (operators.hyper_post(*post),)
        grads = operators.hyper_post_backward(out, *post)
    elif case.part == "pre":
        values = operators.hyper_pre(post[0], *connection)
        grads = operators.hyper_pre_backward(x, None, post[0], *values[1:], *connection)
    else:
        values = operators.hyper_post_pre(*post, *connection)
        grads = operators.hyper_post_pre_backward(out, x, None, *post, *values[2:], *connection)
    if c.weight is not None and case.part != "post":
        parts = values[-1]  # of the norms' statistics: a mean in two parts, which may differ where their sum does not
        values = (*values[:-1], torch.stack([parts[..., 0] + parts[..., 1], parts[..., 2]], -1))
    return {str(at): value for at, value in enumerate((*values, *grads))}


def some_case(data: st.DataObject, generator: torch.Generator, part: str, kind: str) -> HyperCase:
    n, d = data.draw(st.integers(1, 16)), data.draw(st.integers(1, 140))
    lead = (data.draw(st.integers(0, 40)),)
    return hyper_case(generator, part, kind, lead=lead, n=n, d=d, shared=data.draw(st.booleans()), eps=0.1)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_cuda_kernels_agree_with_the_cpu_kernels(data: st.DataObject) -> None:
    emulation.library()
    part, kind = data.draw(st.sampled_from(all_cases()))
    case = some_case(data, fresh_generator(data.draw(st.integers(0, 2**31 - 1))), part, kind)
    try:
        emulation.set_seed(data.draw(st.integers(1, 100)))
        actual = run(case, "xlayer_emulated")
    finally:
        emulation.set_seed(emulation.SEED)
    assert_near(actual, run(case, "xlayer"), 1e-10)


@pytest.mark.parametrize(("part", "kind"), all_cases())
def test_they_round_alike(part: str, kind: str) -> None:
    emulation.library()
    case = hyper_case(fresh_generator(), part, kind, lead=(21,), d=136).to(torch.float32)
    actual, expected = run(case, "xlayer_emulated"), run(case, "xlayer")
    for name, tensor in expected.items():
        of_all_tokens = 21 not in tensor.shape  # a sum over them, of which much may cancel
        if tensor.numel() > 0:
            assert relative_error(actual[name].double(), tensor.double()) < (1e-3 if of_all_tokens else 1e-5), name


@pytest.mark.parametrize("n", [4, 5])
@pytest.mark.parametrize(("part", "kind"), all_cases())
def test_schedules_give_the_same_bits(part: str, kind: str, n: int) -> None:
    case = hyper_case(fresh_generator(), part, kind, lead=(37,), n=n, d=130, shared=True).to(torch.float32)
    try:
        results = []
        for seed in (1, 2, 3):
            emulation.set_seed(seed)
            results.append(run(case, "xlayer_emulated"))
    finally:
        emulation.set_seed(emulation.SEED)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize(("kind", "n", "d"), [("dhc", 4, 7000), ("mhc", 2, 5000), ("mhc-per-stream", 16, 20)])
def test_what_does_not_fit_into_shared_memory(kind: str, n: int, d: int) -> None:
    """Rows, or the matrices of Sinkhorn's iterations, are read again from global memory."""
    emulation.library()
    generator = fresh_generator()

    def make() -> Draw:
        case = hyper_case(generator, "post_pre", kind, lead=(2,), n=n, d=d, use=LOSSES).to(torch.float32)
        exact, plain = evaluate_formula(case.to(torch.float64)), evaluate_formula(case)
        with_names = dict(zip(names(case), run(case, "xlayer_emulated").values(), strict=True))
        actual = {name: with_names[name].reshape(exact[name].shape) for name in exact}
        return Draw(actual, exact, plain)

    check_oracle_rule(make, torch.float32, draws=2)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["shc", "dhc", "mhc-per-stream"])
def test_blocks_with_several_tokens(kind: str, shared: bool) -> None:
    """A block that has several tokens copies the next one to shared memory while it computes the current one."""
    emulation.library()
    case = hyper_case(fresh_generator(), "post_pre", kind, lead=(560,), d=8, shared=shared, eps=0.1)
    assert_near(run(case, "xlayer_emulated"), run(case, "xlayer"), 1e-10)


def names(case: HyperCase) -> list[str]:
    outputs = ["streams", "branch_input", "coefficients", "logits", "statistics"]
    parameters = ["base", "weight", "bias", "scale"]
    leaves = ["streams", "branch_output", "post_coefficients", *parameters]
    return outputs + [f"grad_{leaf}" for leaf in leaves]
