"""The hyper operators against their float64 formula: values, gradients, extremes, layouts, the same bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hyper_tools import KINDS, all_cases, evaluate_formula, evaluate_native, hyper_case, pack
from oracle import DTYPES, Draw, assert_near, assert_same_bits, check_oracle_rule, draw, fresh_generator, need_native
from xlayer_ext import backend, reference
from xlayer_ext import functional as XF
from xlayer_ext.functional import Connection
from xlayer_ext.testing import relative_error

pytestmark = pytest.mark.operators

CASES = all_cases()
DYNAMIC = [kind for kind in KINDS if kind != "shc"]


@pytest.fixture
def native(device: str) -> str:
    for op in ("hyper_pre", "hyper_post", "hyper_post_pre"):
        need_native(op, device)
    return device


# ---- the oracle rule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("part", "kind"), CASES)
def test_oracle_rule(native: str, part: str, kind: str, dtype: torch.dtype) -> None:
    generator, shared = fresh_generator(), itertools.cycle((False, True))

    def make() -> Draw:
        case = hyper_case(generator, part, kind, n=4, d=65, lead=(2, 19), device=native, shared=next(shared)).to(dtype)
        return Draw(evaluate_native(case), evaluate_formula(case.to(torch.float64)), evaluate_formula(case))

    check_oracle_rule(make, dtype, draws=12)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_oracle_rule_for_other_numbers_of_streams(native: str, kind: str, n: int) -> None:
    generator = fresh_generator()

    def make() -> Draw:
        case = hyper_case(generator, "post_pre", kind, n=n, d=40, device=native).to(torch.float32)
        return Draw(evaluate_native(case), evaluate_formula(case.to(torch.float64)), evaluate_formula(case))

    check_oracle_rule(make, torch.float32, draws=6)


@pytest.mark.parametrize("d", [1, 2, 7, 16, 127, 300])
@pytest.mark.parametrize("kind", ["shc", "dhc", "mhc"])
def test_any_width(native: str, kind: str, d: int) -> None:
    # A single element has no variance: eps keeps its norm finite.
    case = hyper_case(fresh_generator(), "post_pre", kind, d=d, lead=(3,), eps=0.1, device=native)
    assert_near(evaluate_native(case), evaluate_formula(case), 1e-11)


@pytest.mark.parametrize("branch_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_branch_outputs_of_16_bits_beside_float32_streams(native: str, branch_dtype: torch.dtype) -> None:
    generator = fresh_generator()
    for part, own in itertools.product(("post", "post_pre"), (True, False)):

        def make(part: str = part, own: bool = own) -> Draw:
            case = hyper_case(generator, part, d=48, device=native).to(torch.float32, branch_dtype)
            exact, actual = evaluate_formula(case.to(torch.float64)), evaluate_native(case)
            assert actual["grad_branch_output"].dtype == branch_dtype
            sides = (actual, exact, evaluate_formula(case))
            return Draw(*({k: v for k, v in s.items() if (k == "grad_branch_output") == own} for s in sides))

        check_oracle_rule(make, branch_dtype if own else torch.float32, draws=3)


@pytest.mark.parametrize(("part", "kind"), CASES)
def test_gradcheck(native: str, part: str, kind: str) -> None:
    case = hyper_case(fresh_generator(), part, kind, lead=(2,), n=2, d=3, eps=0.1, device=native)
    case = replace(case, connection=case.connection._replace(sinkhorn_iters=3))
    tensors = [t for t in (case.streams, case.branch_output, case.coefficients, *case.connection[:4]) if t is not None]

    def call(streams: Tensor, branch: Tensor, coefficients: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        given = iter(parameters)
        kept = [None if t is None else next(given) for t in case.connection[:4]]
        connection = Connection(*kept, *case.connection[4:])  # type: ignore[arg-type]
        if part == "pre":
            return XF.hyper_pre(streams, connection)
        if part == "post":
            return (XF.hyper_post(streams, branch, coefficients),)
        return XF.hyper_post_pre(streams, branch, coefficients, connection)

    with backend("native"):
        assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in tensors])


@pytest.mark.parametrize("use", [("streams",), ("branch_input",), ("coefficients",)], ids="-".join)
@pytest.mark.parametrize("kind", ["shc", "dhc", "mhc"])
def test_gradients_of_each_output_alone(native: str, kind: str, use: tuple[str, ...]) -> None:
    case = hyper_case(fresh_generator(), "post_pre", kind, use=use, device=native)
    assert_near(evaluate_native(case), evaluate_formula(case), 1e-11)


# ---- layouts and sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shc", "dhc", "mhc"])
def test_streams_packed_into_the_batch_stay_there(native: str, kind: str) -> None:
    case = hyper_case(fresh_generator(), "post_pre", kind, lead=(2, 3), packed=True, device=native)
    assert_near(evaluate_native(case), evaluate_formula(case), 1e-11)
    streams = pack(case.streams).requires_grad_()
    out, x, _ = XF.hyper_post_pre(streams, case.branch_output, case.coefficients, case.connection)
    assert out.stride() == streams.stride() and x.is_contiguous()
    (grad,) = torch.autograd.grad(out.square().sum(), streams)
    assert grad.stride() == streams.stride()


@given(data=st.data())
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape_and_stride(native: str, kernels: str, data: st.DataObject) -> None:
    part, kind = data.draw(st.sampled_from(CASES))
    lead = tuple(data.draw(st.lists(st.integers(0, 4), min_size=0, max_size=4)))
    n, d = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 40))
    shared = data.draw(st.booleans())
    generator = fresh_generator(data.draw(st.integers(0, 2**31 - 1)))
    case = hyper_case(generator, part, kind, lead=lead, n=n, d=d, shared=shared, eps=0.1, device=native)

    def strided(tensor: Tensor) -> Tensor:
        how = data.draw(st.sampled_from(["as it is", "every other", "reversed dimensions"]))
        if how == "every other":
            return torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2]
        return tensor.permute(*reversed(range(tensor.dim()))).contiguous().permute(*reversed(range(tensor.dim())))

    case = replace(
        case,
        streams=strided(case.streams),
        branch_output=strided(case.branch_output),
        coefficients=strided(case.coefficients),
        grads={name: strided(grad) for name, grad in case.grads.items()},
    )
    assert_near(evaluate_native(case), evaluate_formula(case), 1e-10)


@pytest.mark.parametrize(("part", "kind"), CASES)
@pytest.mark.parametrize("lead", [(0,), (3, 0), (0, 2)])
def test_no_tokens(native: str, part: str, kind: str, lead: tuple[int, ...]) -> None:
    use = ("streams", "branch_input")  # static coefficients are there without a token, and so are their gradients
    results = evaluate_native(hyper_case(fresh_generator(), part, kind, lead=lead, shared=True, use=use, device=native))
    for name, tensor in results.items():
        if name != "coefficients":
            assert torch.equal(tensor, torch.zeros_like(tensor)), name


def test_one_token_without_leading_dimensions(native: str) -> None:
    case = hyper_case(fresh_generator(), "post_pre", "dhc", lead=(), device=native)
    assert_near(evaluate_native(case), evaluate_formula(case), 1e-11)


def test_streams_that_begin_as_copies_are_not_copied(native: str) -> None:
    x = draw(fresh_generator(), 2, 3, 8).to(native)
    case = hyper_case(fresh_generator(), "post_pre", "dhc", lead=(2, 3), d=8, device=native)
    streams = x.unsqueeze(-2).expand(2, 3, 4, 8)
    arguments = (case.branch_output, case.coefficients, case.connection)
    actual, expected = (XF.hyper_post_pre(h, *arguments) for h in (streams, streams.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


# ---- extremes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_is_not_finite_spoils_no_other(native: str, kind: str, poison: float) -> None:
    case = hyper_case(fresh_generator(), "post_pre", kind, lead=(1, 20), device=native).to(torch.float32)
    clean = evaluate_native(case)
    streams = case.streams.clone()
    streams[0, 7, 1, 3] = poison
    dirty = evaluate_native(replace(case, streams=streams))
    others = torch.arange(20, device=native) != 7
    for name in ("streams", "branch_input", "grad_streams", "grad_branch_output"):
        assert torch.equal(dirty[name][:, others], clean[name][:, others]), name
    assert not dirty["streams"][0, 7].isfinite().all()


@pytest.mark.parametrize("kind", DYNAMIC)
def test_streams_of_zeros(native: str, kind: str) -> None:
    case = hyper_case(fresh_generator(), "pre", kind, device=native)
    case = replace(case, streams=torch.zeros_like(case.streams))
    assert_near(evaluate_native(case), evaluate_formula(case), 1e-11)


@pytest.mark.parametrize("kind", ["dhc", "dhc-rms"])
@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_large_small_and_shifted_streams(native: str, kind: str, offset: float, scale: float) -> None:
    generator = fresh_generator()

    def make() -> Draw:
        case = hyper_case(generator, "pre", kind, d=96, device=native)
        case = replace(case, streams=scale * (case.streams + offset)).to(torch.float32)
        return Draw(evaluate_native(case), evaluate_formula(case.to(torch.float64)), evaluate_formula(case))

    check_oracle_rule(make, torch.float32, draws=10)


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_deviations_from_a_large_mean_keep_their_digits(native: str, offset: float) -> None:
    """A mean rounded to float32 would put the deviations off by up to offset · 6e-8: some 10 eps of the coefficients at
    the smaller offset, over 100 eps at the larger.

    Each coefficient, and each number t that a gradient adds up, is a dot product of d = 96 numbers and a few roundings.
    A chain of n additions is off by about eps/2 · √(1/3) · √(n/2) of its result's size, 2 eps for n = 96: so 5 eps
    bound the coefficients, and grad_weight, whose 40 products are rounded as well. grad_bias and grad_scale add 40
    numbers t of either sign, which may cancel, so what bounds their error is Σ|t|: |δΣt| ≤ Σ|δt| + 40 · eps/2 ·
    max|partial sum| in the worst case, and as √40 rather than 40 where roundings are independent: 2·√40/(0.8·40) + 1
    < 2 eps of Σ|t|.
    """
    case = hyper_case(fresh_generator(), "pre", "dhc", d=96, device=native, offset=offset).to(torch.float32)
    exact, actual = evaluate_formula(case.to(torch.float64)), evaluate_native(case)
    rows, given = case.streams.shape[:-1], case.connection
    assert given.bias is not None and given.scale is not None
    each = {name: getattr(given, name).expand(*rows, -1) for name in ("bias", "scale")}  # of every row its own
    terms = evaluate_formula(replace(case, connection=given._replace(**each)).to(torch.float64))
    size = exact | {name: terms[name].abs().sum((0, 1, 2)) for name in ("grad_bias", "grad_scale")}
    for name in ("coefficients", "grad_weight", "grad_bias", "grad_scale"):
        error = (actual[name].double() - exact[name]).square().mean().sqrt()
        assert error < 5 * 2**-23 * size[name].square().mean().sqrt(), name


def test_small_arguments_of_tanh_keep_their_digits(native: str) -> None:
    case = hyper_case(fresh_generator(), "pre", "dhc-rms", d=64, device=native).to(torch.float32)
    connection = case.connection._replace(
        weight=case.connection.weight * 1e-6, base=torch.zeros_like(case.connection.base)
    )
    case = replace(case, connection=connection)
    exact = evaluate_formula(case.to(torch.float64))
    actual = evaluate_native(case)
    for name in ("coefficients", "grad_scale"):
        assert relative_error(actual[name], exact[name]) < 1e-6


# ---- the manifold ----------------------------------------------------------------------------------------------------


def mixing(coefficients: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Returns the sums of M along the axis that is normalized last, and along the other; each minus 1."""
    last, other = (-2, -1) if form == "sinkhorn_rows" else (-1, -2)  # [..., j, i] is M_ij
    m = coefficients[..., 1:-1]
    return (m.sum(last) - 1).abs().max(), (m.sum(other) - 1).abs().max()


@pytest.mark.parametrize("form", ["sinkhorn_rows", "sinkhorn_columns"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_mixing_is_doubly_stochastic(
    native: str, form: str, dtype: torch.dtype, record_property: Callable[[str, object], None]
) -> None:
    generator = fresh_generator()
    n, d = 4, 32
    streams = draw(generator, 64, n, d).to(native, dtype)
    for bound, gain in ((0.5, 0.25), (None, 4.0)):
        base = gain * draw(generator, n, n + 2)
        weight = gain * draw(generator, n + 2, d) / d
        if bound is not None:
            base = base.clamp(-bound / 2, bound / 2)
        connection = Connection(base.to(native, dtype), weight.to(native, dtype), None,
                                torch.ones(n + 2, device=native, dtype=dtype), "rms", form)  # fmt: skip
        logits = reference.hyper_coefficients(
            streams.double(),
            Connection(*(t if t is None else t.double() for t in connection[:4]), "rms", "identity"),  # type: ignore[arg-type]
        )
        if bound is not None:
            assert logits[..., 1:-1].abs().max() <= bound
        with backend("native"):
            _, coefficients = XF.hyper_pre(streams, connection)
        last, other = mixing(coefficients.double(), form)
        assert last <= 1e-6
        if bound is not None:
            assert other <= 1e-5
        else:  # far from convergence after 20 iterations, and so is the float64 result
            expected = reference.manifold(logits, connection)
            torch.testing.assert_close(
                coefficients.double(), expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-6
            )
        record_property(f"worst column error, logits of scale {gain}", float(other))


def test_static_manifold(native: str) -> None:
    case = hyper_case(fresh_generator(), "pre", "shc", device=native)
    connection = case.connection._replace(form="sinkhorn_rows")
    case = replace(case, connection=connection)
    assert_near(evaluate_native(case), evaluate_formula(case), 1e-11)
    _, c = XF.hyper_pre(case.streams, connection)
    assert c.shape == (4, 6) and mixing(c, "sinkhorn_rows")[0] <= 1e-12


# What is added to the logits of M, whose element (j, i) is M_ij. Exponentials of what is far below are 0 in float32.
FAR_APART = {
    "a column far below": torch.tensor([[0.0, -100, 0, 0]]).expand(4, 4),
    "a row far below": torch.tensor([[0.0], [-100], [0], [0]]).expand(4, 4),
    "no matrix with these zeros is doubly stochastic": torch.tensor([[0.0, -40, -90, -90]] * 3 + [[0, 0, 0, 0]]),
    "hundreds apart": torch.tensor([[0.0, 300, -300, 100], [200, 0, 100, 0], [-100, 0, 0, 50], [0, 250, 0, -200]]),
}


@pytest.mark.parametrize("kind", ["mhc", "mhc-per-stream"])
@pytest.mark.parametrize("pattern", FAR_APART)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_oracle_rule_where_logits_lie_far_apart(native: str, dtype: torch.dtype, pattern: str, kind: str) -> None:
    generator = fresh_generator()

    def make() -> Draw:
        case = hyper_case(generator, "pre", kind, lead=(2, 19), device=native)
        base = case.connection.base.clone()
        base[:, 1:-1] += FAR_APART[pattern].to(native)
        case = replace(case, connection=case.connection._replace(base=base)).to(dtype)
        return Draw(evaluate_native(case), evaluate_formula(case.to(torch.float64)), evaluate_formula(case))

    check_oracle_rule(make, dtype, draws=6)


@pytest.mark.parametrize("form", ["sinkhorn_rows", "sinkhorn_columns"])
def test_elements_that_grow_from_nothing(native: str, form: str) -> None:
    """e^-198 is no float32, and a sixth after 200 iterations. Each of their normalizations rounds logarithms of up to
    198 by half an eps, 1.2e-5 of an element; the last ones, near the fixed point, contract what the others left."""
    base = torch.zeros(4, 6, dtype=torch.float64, device=native)
    base[:, 1:-1] = 2.2 * FAR_APART["no matrix with these zeros is doubly stochastic"]
    streams = draw(fresh_generator(), 3, 4, 8).to(native)
    connection = Connection(base, base.new_zeros(6, 8), None, base.new_ones(6), "rms", form, 200)
    _, exact = reference.hyper_pre(streams, connection)
    tensors = (t if t is None else t.float() for t in connection[:4])
    with backend("native"):
        _, actual = XF.hyper_pre(streams.float(), Connection(*tensors, *connection[4:]))  # type: ignore[arg-type]
    assert exact[..., :3, 1:-1].min() > 0.16
    torch.testing.assert_close(actual[..., :3, 1:-1].double(), exact[..., :3, 1:-1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["mhc", "mhc-per-stream"])
def test_logits_far_apart_change_no_bit_of_other_tokens(native: str, kind: str) -> None:
    case = hyper_case(fresh_generator(), "pre", kind, lead=(1, 20), eps=1.0, device=native).to(torch.float32)
    connection = case.connection._replace(scale=torch.full_like(case.connection.scale, 200))  # type: ignore[arg-type]
    case = replace(case, connection=connection, streams=1e-3 * case.streams)
    streams = case.streams.clone()
    streams[0, 7] *= 1e6  # eps is large beside the others and negligible beside this
    clean, far = evaluate_native(case), evaluate_native(replace(case, streams=streams))
    others = torch.arange(20, device=native) != 7
    for name in ("branch_input", "coefficients", "grad_streams"):
        assert torch.equal(far[name][:, others], clean[name][:, others]), name
        assert far[name].isfinite().all(), name
    with backend("reference"):
        logits = reference.hyper_coefficients(streams, connection._replace(form="identity"))[..., 1:-1].flatten(-2)
    span = logits.amax(-1) - logits.amin(-1)
    assert span[0, 7] > 200 and span[0, others].max() < 60


# ---- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_boundary_is_post_then_pre_bit_for_bit(native: str, kind: str, dtype: torch.dtype) -> None:
    case = hyper_case(fresh_generator(), "post_pre", kind, d=50, lead=(2, 9), device=native).to(dtype)
    with backend("native"):
        fused = XF.hyper_post_pre(case.streams, case.branch_output, case.coefficients, case.connection)
        streams = XF.hyper_post(case.streams, case.branch_output, case.coefficients)
        apart = (streams, *XF.hyper_pre(streams, case.connection))
    for a, b in zip(fused, apart, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_under_any_schedule(native: str, kind: str, schedule: Callable[[int], None]) -> None:
    case = hyper_case(fresh_generator(), "post_pre", kind, lead=(2, 70), shared=True, device=native).to(torch.float32)
    results = []
    for turn in (1, 2, 3, 1):
        schedule(turn)
        results.append(evaluate_native(case))
    for other in results[1:]:
        assert_same_bits(other, results[0])


def test_tokens_do_not_depend_on_their_neighbours(native: str) -> None:
    """A causal model needs this to the bit: a token alone, in a batch, or behind others."""
    for kind in KINDS:
        case = hyper_case(fresh_generator(), "post_pre", kind, lead=(1, 21), device=native).to(torch.float32)
        with backend("native"):
            whole = XF.hyper_post_pre(case.streams, case.branch_output, case.coefficients, case.connection)
            part = XF.hyper_post_pre(
                case.streams[:, 13:14], case.branch_output[:, 13:14], case.coefficients[:, 13:14], case.connection
            )
        for name, a, b in zip(("streams", "x", "c"), part, whole, strict=True):
            if b.dim() > 2:
                assert torch.equal(a, b[:, 13:14]), (kind, name)
