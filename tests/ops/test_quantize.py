"""The operators of quantize against exhaustive float64 search and the plain formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracle import DTYPES, Draw, check_oracle_rule, draw, fresh_generator, need_native
from quantize_tools import edge_distance
from xlayer_ext import backend, reference
from xlayer_ext import functional as XF

pytestmark = pytest.mark.operators

METRICS = ("euclidean", "cosine")
BOUNDS = (("tanh", "package"), ("offset", "package"), ("offset", "paper"))
few_examples = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def native(device: str) -> str:
    need_native("vq_nearest", device)
    return device


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# ---- nearest codes ---------------------------------------------------------------------------------------------------


def all_distances(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """Computes every distance ``[..., N, K]`` in float64, from the differences themselves."""
    x, codebook = x.double(), codebook.double()
    if metric == "euclidean":
        return (x.unsqueeze(-2) - codebook.unsqueeze(-3)).square().sum(-1)
    unit = torch.nn.functional.normalize
    return 1 - unit(x, dim=-1, eps=1e-300) @ unit(codebook, dim=-1, eps=1e-300).transpose(-1, -2)


def check_nearest(x: Tensor, codebook: Tensor, metric: str, indices: Tensor, distance: Tensor) -> None:
    """Asserts that no other code is nearer by more than the rounding of the scores."""
    every = all_distances(x, codebook, metric)
    assert indices.dtype == torch.int64 and indices.shape == x.shape[:-1] == distance.shape
    assert distance.dtype == accumulation(x.dtype) and (distance >= 0).all()
    chosen = every.gather(-1, indices.unsqueeze(-1)).squeeze(-1)
    size = x.double().square().sum(-1) + codebook.double().square().sum(-1).amax(-1, keepdim=True)
    rounding = (math.sqrt(x.shape[-1]) + 4) * torch.finfo(distance.dtype).eps
    room = rounding * (size if metric == "euclidean" else 1.0)
    assert (chosen - every.amin(-1) <= room).all()
    torch.testing.assert_close(distance.double(), chosen.clamp(min=0), rtol=4 * rounding, atol=rounding)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("sizes", [(37, 53, 24), (1, 1, 1), (5, 130, 1), (70, 3, 65), (33, 100, 130)])
def test_nearest_is_what_exhaustive_search_finds(
    native: str, sizes: tuple[int, int, int], metric: str, dtype: torch.dtype
) -> None:
    n, k, d = sizes
    generator = fresh_generator()
    for books in ((), (3,)):
        x = draw(generator, *books, n, d, dtype=dtype).to(native)
        codebook = draw(generator, *books, k, d, dtype=dtype).to(native)
        with backend("native"):
            check_nearest(x, codebook, metric, *XF.vq_nearest(x, codebook, metric=metric))
        check_nearest(x, codebook, metric, *reference.vq_nearest(x, codebook, metric))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_distances_obey_the_oracle_rule(native: str, metric: str, dtype: torch.dtype) -> None:
    generator = fresh_generator()

    def make() -> Draw:
        x, codebook = (draw(generator, rows, 20, dtype=dtype).to(native) for rows in (31, 45))
        with backend("native"):
            indices, distance = XF.vq_nearest(x, codebook, metric=metric)
        exact = all_distances(x, codebook, metric).gather(-1, indices.unsqueeze(-1)).squeeze(-1)
        pairs = zip(x, codebook[indices], strict=True)
        plain = torch.stack([reference.vq_nearest(row[None], code[None], metric)[1][0] for row, code in pairs])
        return Draw({"distance": distance}, {"distance": exact}, {"distance": plain})

    check_oracle_rule(make, dtype, draws=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_the_first_of_equal_codes_wins(native: str, metric: str, dtype: torch.dtype) -> None:
    """The first copy of a code is chosen wherever the copies lie: in one tile, across tiles, threads or blocks."""
    generator = fresh_generator()
    different = draw(generator, 7, 18, dtype=dtype)
    which = torch.randint(7, (400,), generator=generator)
    which[-7:] = torch.arange(7)  # each at least once
    first = torch.stack([(which == code).nonzero()[0, 0] for code in range(7)])
    rows = torch.randint(7, (90,), generator=generator)
    x = different[rows].to(native)
    with backend("native"):
        indices, distance = XF.vq_nearest(x, different[which].to(native), metric=metric)
    assert torch.equal(indices.cpu(), first[rows])
    assert metric == "cosine" or not distance.any()


@given(data=st.data())
@few_examples
def test_any_shape_and_stride(native: str, data: st.DataObject) -> None:
    books, n, k = (data.draw(st.integers(low, high)) for low, high in ((0, 3), (0, 70), (1, 110)))
    d = data.draw(st.sampled_from([1, 2, 5, 8, 16, 31, 40]))
    dtype, metric = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(METRICS))
    generator = fresh_generator(data.draw(st.integers(0, 2**31 - 1)))

    def strided(rows: int) -> Tensor:
        layout = data.draw(st.sampled_from(["plain", "offset", "columns", "rows", "expanded"]))
        if layout == "offset":
            return draw(generator, books, rows, d + 3, dtype=dtype).to(native)[..., 2 : 2 + d]
        if layout == "columns":
            return draw(generator, books, d, rows, dtype=dtype).to(native).transpose(-1, -2)
        if layout == "rows":
            return draw(generator, rows, books, d, dtype=dtype).to(native).transpose(0, 1)
        if layout == "expanded":
            return draw(generator, 1, rows, d, dtype=dtype).to(native).expand(books, rows, d)
        return draw(generator, books, rows, d, dtype=dtype).to(native)

    x, codebook = strided(n), strided(k)
    with backend("native"):
        indices, distance = XF.vq_nearest(x, codebook, metric=metric)
        counts, sums = XF.vq_statistics(x, indices, k)
    if books and n:
        check_nearest(x, codebook, metric, indices, distance)
    assert indices.shape == (books, n)
    expected = reference.vq_statistics(x.double(), indices, k)
    assert torch.equal(counts.double(), expected[0])
    torch.testing.assert_close(sums.double(), expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_chosen(native: str, poison: float, metric: str) -> None:
    generator = fresh_generator()
    x, codebook = (draw(generator, rows, 12, dtype=torch.float32).to(native) for rows in (40, 30))
    x[3, 5] = x[39, 11] = poison
    codebook[0, 0] = codebook[29, 11] = poison
    with backend("native"):
        indices, distance = XF.vq_nearest(x, codebook, metric=metric)
    fine = torch.ones(40, dtype=torch.bool)
    fine[[3, 39]] = False
    assert not indices[~fine].any() and not distance[~fine].isfinite().any()
    check_nearest(x[fine], codebook[1:29], metric, indices[fine] - 1, distance[fine])
    wanted = reference.vq_nearest(x, codebook, metric)[0]
    assert torch.equal(wanted[~fine], indices[~fine]) and (wanted[fine] > 0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_no_code_that_can_be_chosen(native: str, metric: str) -> None:
    x, codebook = torch.ones(3, 4, device=native), torch.full((5, 4), float("nan"), device=native)
    with backend("native"):
        indices, distance = XF.vq_nearest(x, codebook, metric=metric)
    assert not indices.any() and distance.isnan().all()
    assert torch.equal(reference.vq_nearest(x, codebook, metric)[0], indices)


def test_vectors_of_length_zero_have_cosine_zero(native: str) -> None:
    x = torch.tensor([[0.0, 0.0], [-1.0, 0.0]], device=native)
    codebook = torch.tensor([[1.0, 0.0], [0.0, 0.0]], device=native)
    for choice in ("native", "reference"):
        with backend(choice):
            indices, distance = XF.vq_nearest(x, codebook, metric="cosine")
        assert indices.tolist() == [0, 1] and distance.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_under_any_schedule(native: str, dtype: torch.dtype, schedule: Callable[[int], None]) -> None:
    generator = fresh_generator()
    x, codebook = (draw(generator, rows, 40, dtype=dtype).to(native) for rows in (150, 260))
    z = draw(generator, 3000, 5, dtype=dtype).to(native)
    found = []
    for number in (1, 2, 3):
        schedule(number)
        with backend("native"):
            indices, distance = XF.vq_nearest(x, codebook)
            found.append((indices, distance, *XF.vq_statistics(x, indices % 7, 7), *XF.fsq(z, [8, 5, 5, 5, 3])))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_rows_do_not_depend_on_their_neighbours(native: str) -> None:
    generator = fresh_generator()
    x, codebook = (draw(generator, rows, 24, dtype=torch.float32).to(native) for rows in (67, 90))
    with backend("native"):
        together = XF.vq_nearest(x, codebook)
        for row in (0, 31, 66):
            alone = XF.vq_nearest(x[row : row + 1], codebook)
            assert all(torch.equal(a[row : row + 1], b) for a, b in zip(together, alone, strict=True))


# ---- what falls to each code -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_obey_the_oracle_rule(native: str, dtype: torch.dtype) -> None:
    generator = fresh_generator()

    def make() -> Draw:
        x = draw(generator, 2, 210, 70, dtype=dtype).to(native)
        indices = torch.randint(-1, 9, (2, 210), generator=generator).to(native)
        with backend("native"):
            counts, sums = XF.vq_statistics(x, indices, 8)  # −1 and 8 count nowhere
        exact, plain = reference.vq_statistics(x.double(), indices, 8), reference.vq_statistics(x, indices, 8)
        assert torch.equal(counts.double(), exact[0]) and counts.dtype == plain[0].dtype
        return Draw({"sums": sums}, {"sums": exact[1]}, {"sums": plain[1]})

    check_oracle_rule(make, accumulation(dtype), draws=3)


def test_rows_that_count_nowhere_may_hold_anything(native: str) -> None:
    x = torch.ones(6, 3, device=native)
    x[[1, 4]] = float("nan")
    indices = torch.tensor([0, -1, 2, 2, 2**40, -(2**40)], device=native)
    x[5] = float("inf")
    for choice in ("native", "reference"):
        with backend(choice):
            counts, sums = XF.vq_statistics(x, indices, 4)
        assert counts.tolist() == [1, 0, 2, 0] and sums[:, 0].tolist() == [1, 0, 2, 0]


def test_long_sums_keep_their_digits(native: str, kernels: str) -> None:
    """All rows on one code: a sum in one chain would lose digits with its length."""
    rows = 3000 if kernels == "emulated" else 100_000
    x = torch.rand(rows, 2, generator=fresh_generator()).to(native)
    with backend("native"):
        counts, sums = XF.vq_statistics(x, torch.ones(rows, dtype=torch.int64, device=native), 3)
    exact = x.double().sum(0)
    assert counts.tolist() == [0, rows, 0] and not sums[0].any()
    assert ((sums[1].double() - exact).abs() <= 4e-7 * exact).all()


@pytest.mark.parametrize("sizes", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_statistics_of_nothing(native: str, sizes: tuple[int, int, int]) -> None:
    books, rows, width = sizes
    x, indices = torch.ones(sizes, device=native), torch.zeros(books, rows, dtype=torch.int64, device=native)
    with backend("native"):
        counts, sums = XF.vq_statistics(x, indices, 4)
    assert counts.shape == (books, 4) and sums.shape == (books, 4, width)
    assert counts.sum() == books * rows and not sums[:, 1:].any()


# ---- finite scalar quantization --------------------------------------------------------------------------------------


def fsq_results(z: Tensor, grad: Tensor, levels: Sequence[int], choice: str, **how: Any) -> dict[str, Tensor]:
    z = z.detach().requires_grad_()
    with backend(choice):
        codes, indices = XF.fsq(z, levels, **how)
    (grad_z,) = torch.autograd.grad(codes, z, grad)
    return {"codes": codes.detach(), "indices": indices, "grad": grad_z}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bound", "variant"), BOUNDS)
@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [3], [7] * 8, [16, 3, 9], [1000, 4], [5] * 32], ids=str)
def test_fsq_is_the_formula(native: str, levels: list[int], bound: str, variant: str, dtype: torch.dtype) -> None:
    generator = fresh_generator()

    def make() -> Draw:
        z, grad = (draw(generator, 2, 41, len(levels), dtype=dtype).to(native) * gain for gain in (2, 1))
        how = {"bound": bound, "variant": variant}
        actual, plain = (fsq_results(z, grad, levels, choice, **how) for choice in ("native", "reference"))
        exact = fsq_results(z.double(), grad.double(), levels, "reference", **how)
        edge = edge_distance(z, levels, bound, variant)
        certain = edge > 1e-6 * torch.tensor(levels, device=z.device)
        if dtype == torch.float64:
            certain = edge > 1e-12
        rows = certain.all(-1)
        assert torch.equal(actual["indices"][rows], exact["indices"][rows])
        assert torch.equal(actual["codes"][certain], exact["codes"][certain].to(dtype))
        return Draw(*({"grad": results["grad"]} for results in (actual, exact, plain)))

    check_oracle_rule(make, dtype, draws=3)


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_codes_and_indices_are_the_same_thing(device: str, data: st.DataObject) -> None:
    bound, variant = data.draw(st.sampled_from(BOUNDS))
    least = 2 if bound == "tanh" else 3
    levels = data.draw(st.lists(st.integers(least, data.draw(st.sampled_from([4, 9, 300]))), min_size=1, max_size=20))
    generator = fresh_generator(data.draw(st.integers(0, 2**31 - 1)))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    z = (3 * draw(generator, 40, len(levels), dtype=dtype)).to(device)
    with backend(data.draw(st.sampled_from(["auto", "reference"]))):
        codes, indices = XF.fsq(z, levels, bound=bound, variant=variant)
    assert torch.equal(XF.fsq_codes_to_indices(codes, levels, bound=bound), indices)
    assert torch.equal(XF.fsq_indices_to_codes(indices, levels, bound=bound, dtype=dtype), codes)
    fits = math.prod(levels) <= 2**63
    assert indices.shape == (z.shape[:-1] if fits else z.shape)
    if math.prod(levels) <= 1000:
        every = torch.arange(math.prod(levels), device=device)
        found = XF.fsq_codes_to_indices(XF.fsq_indices_to_codes(every, levels, bound=bound), levels, bound=bound)
        assert torch.equal(found, every)
        assert len(XF.fsq_indices_to_codes(every, levels, bound=bound).unique(dim=0)) == len(every)


@pytest.mark.parametrize("count", [63, 64])
def test_indices_up_to_63_bits(native: str, count: int) -> None:
    z = torch.ones(2, count, device=native)
    z[1, 5] = -1
    for choice in ("native", "reference"):
        with backend(choice):
            _, indices = XF.fsq(z, [2] * count)
        if count == 63:
            assert indices.tolist() == [2**63 - 1, 2**63 - 1 - 2**5]
        else:
            assert indices.shape == z.shape and indices[0].sum() == 64 and indices[1, 5] == 0


@pytest.mark.parametrize("levels", [[8, 5], [300] * 9], ids=["index", "digits"])
@pytest.mark.parametrize(("bound", "variant"), BOUNDS)
def test_fsq_of_what_is_not_finite(native: str, bound: str, variant: str, levels: list[int]) -> None:
    z = torch.zeros(3, len(levels), device=native)
    z[0, 0], z[1, 0], z[2, 0] = float("nan"), float("inf"), -float("inf")
    for choice in ("native", "reference"):
        with backend(choice):
            codes, indices = XF.fsq(z, levels, bound=bound, variant=variant)
        first = indices[:, 0] if len(levels) > 2 else indices % levels[0]
        assert first.tolist() == [0, levels[0] - 1, 0]
        assert codes[0, 0].isnan() and codes[:, 1:].isfinite().all()
        assert codes[1, 0] == (1 if bound == "tanh" or levels[0] % 2 else (levels[0] // 2 - 1) / (levels[0] // 2))
        assert codes[2, 0] == -1


def test_fsq_of_nothing_and_of_one(native: str) -> None:
    with backend("native"):
        codes, indices = XF.fsq(torch.zeros(0, 3, device=native), [3, 3, 3])
        assert codes.shape == (0, 3) and indices.shape == (0,)
        codes, indices = XF.fsq(torch.zeros(1, device=native), [3])
    assert codes.tolist() == [0.0] and indices.shape == () and indices.item() == 1


def test_fsq_of_any_strides(native: str) -> None:
    generator = fresh_generator()
    z = draw(generator, 5, 4, 33, dtype=torch.float32).to(native).transpose(1, 2)
    grad = draw(generator, 33, 5, 4, dtype=torch.float32).to(native).transpose(0, 1)
    actual = fsq_results(z, grad, [8, 5, 5, 5], "native")
    expected = fsq_results(z.contiguous(), grad.contiguous(), [8, 5, 5, 5], "native")
    assert all(torch.equal(actual[name], expected[name]) for name in actual)


def test_more_dimensions_than_the_kernels_take_run_the_reference(device: str) -> None:
    z = torch.ones(2, 65, device=device)
    assert XF.fsq(z, [2] * 65)[1].shape == z.shape
    need_native("fsq", device)
    with backend("native"), pytest.raises(RuntimeError, match="more than 64 dimensions"):
        XF.fsq(z, [2] * 65)
