"""The CUDA kernels of the quantize operators, on the emulator, called directly: what test_quantize.py does not
know of their tiles, slices, splits, pieces and vectors."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import emulation
from oracle import DTYPES, draw, fresh_generator
from xlayer_ext import reference

pytestmark = pytest.mark.cpu_kernels

METRICS = ("euclidean", "cosine")
ELEMENTS = [(dtype, False) for dtype in DTYPES] + [(torch.float32, True)]  # and whether products may be of tf32


@pytest.fixture(autouse=True)
def loaded() -> Iterator[None]:
    emulation.library()
    yield
    emulation.set_seed(emulation.SEED)


def nearest(x: Tensor, codebook: Tensor, metric: str, tf32: bool = False) -> tuple[Tensor, Tensor]:
    indices, distance = torch.ops.xlayer_emulated.vq_nearest(x, codebook, metric == "cosine", tf32)
    return indices, distance


def statistics(x: Tensor, indices: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    counts, sums = torch.ops.xlayer_emulated.vq_statistics(x, indices, codes)
    return counts, sums


def misaligned(tensor: Tensor) -> Tensor:
    """Copies the tensor to one element past a boundary of 16 bytes."""
    base = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    copy = base[1:].view(tensor.shape)
    copy.copy_(tensor)
    return copy


def check_nearest(x: Tensor, codebook: Tensor, metric: str, tf32: bool, found: tuple[Tensor, Tensor]) -> None:
    """Asserts against float64 that no other code is nearer by more than the rounding of the scores."""
    indices, distance = found
    wide_x, wide = x.double(), codebook.double()
    if metric == "euclidean":
        every = (wide_x.unsqueeze(-2) - wide.unsqueeze(-3)).square().sum(-1)
        size = wide_x.square().sum(-1) + wide.square().sum(-1).amax(-1, keepdim=True)
    else:
        lengths = [tensor.norm(dim=-1, keepdim=True).clamp(min=1e-300) for tensor in (wide_x, wide)]
        every = 1 - (wide_x / lengths[0]) @ (wide / lengths[1]).transpose(-1, -2)
        size = torch.ones_like(every[..., 0])
    eps = 2**-10 if tf32 else torch.finfo(distance.dtype).eps
    room = (math.sqrt(x.shape[-1]) + 4) * eps * size
    chosen = every.gather(-1, indices.unsqueeze(-1)).squeeze(-1)
    assert (chosen - every.amin(-1) <= room).all()
    rounding = (math.sqrt(x.shape[-1]) + 4) * torch.finfo(distance.dtype).eps
    torch.testing.assert_close(distance.double(), chosen.clamp(min=0), rtol=4 * rounding, atol=rounding)


# 256 rows and 128 codes are a block's share in half precision, 32 columns a slice; 37 columns take no vectors.
@pytest.mark.parametrize(("dtype", "tf32"), ELEMENTS)
@pytest.mark.parametrize("sizes", [(257, 129, 32), (1, 300, 72), (130, 65, 37), (3, 2, 1), (65, 1, 104)], ids=str)
def test_nearest_over_tiles_and_slices(sizes: tuple[int, int, int], dtype: torch.dtype, tf32: bool) -> None:
    n, k, d = sizes
    generator = fresh_generator()
    for metric, books in zip(METRICS, (1, 3) if n < 100 else (1, 1), strict=True):
        x, codebook = (draw(generator, books, rows, d, dtype=dtype) for rows in (n, k))
        check_nearest(x, codebook, metric, tf32, nearest(x, codebook, metric, tf32))


@pytest.mark.parametrize(("dtype", "tf32"), ELEMENTS)
@pytest.mark.parametrize("width", [24, 25])
def test_the_first_of_equal_codes_wins_in_every_tile_and_split(dtype: torch.dtype, tf32: bool, width: int) -> None:
    """One code stands everywhere from a place on: before, at and after the edges of lanes, warps, tiles and splits."""
    generator = fresh_generator()
    x = draw(generator, 1, 2, width, dtype=dtype)
    for first in (0, 1, 7, 8, 63, 64, 127, 128, 129, 255, 256, 280):
        codebook = 4 + draw(generator, 1, 290, width, dtype=dtype)
        codebook[:, first:] = x[:, :1]
        indices, distance = nearest(x, codebook, "euclidean", tf32)
        assert indices[0, 0] == first and distance[0, 0] == 0


def test_one_block_walks_over_many_tiles() -> None:
    """Rows enough that no block of them is split over codes; equal codes lie two tiles apart."""
    generator = fresh_generator()
    # One slice, three, and eleven, with which x does not stay in shared memory.
    for width, codes in ((8, 330), (24, 330), (88, 130)):
        codebook = draw(generator, 264, codes, width, dtype=torch.float64)
        codebook[:, codes - 1] = codebook[:, 64] = codebook[:, 5]
        x = codebook[:, 4:6].contiguous()
        indices, distance = nearest(x, codebook, "euclidean")
        assert torch.equal(indices, torch.tensor([4, 5]).expand(264, 2)) and not distance.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_stay_in_shared_memory_and_that_do_not(dtype: torch.dtype) -> None:
    """Widths on both sides of what fits into the 99 KB that the emulator gives: 128 columns."""
    generator = fresh_generator()
    for width in (120, 128, 136, 264):
        x, codebook = (draw(generator, 1, rows, width, dtype=dtype) for rows in (5, 140))
        check_nearest(x, codebook, "euclidean", False, nearest(x, codebook, "euclidean"))


@pytest.mark.parametrize(("dtype", "tf32"), ELEMENTS)
def test_pointers_and_strides_do_not_matter(dtype: torch.dtype, tf32: bool) -> None:
    """Scores and indices are the same whether rows are loaded as vectors or element by element."""
    generator = fresh_generator()
    x, codebook = (draw(generator, 3, rows, 40, dtype=dtype) for rows in (33, 70))
    plain = nearest(x, codebook, "euclidean", tf32)
    rows_apart = torch.stack([codebook, codebook], -2).flatten(-3, -2)[:, ::2]
    books_inside = x.transpose(0, 1).contiguous().transpose(0, 1)
    for x_like, codebook_like in (
        (misaligned(x), codebook),
        (x, misaligned(codebook)),
        (books_inside, rows_apart),
        (torch.nn.functional.pad(x, (3, 2))[..., 3:43], codebook),
    ):
        found = nearest(x_like, codebook_like, "euclidean", tf32)
        assert torch.equal(found[0], plain[0])
        torch.testing.assert_close(found[1], plain[1])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite(dtype: torch.dtype, metric: str) -> None:
    generator = fresh_generator()
    x, codebook = (draw(generator, 1, rows, 17, dtype=dtype) for rows in (20, 135))
    for at, poison in enumerate((math.nan, math.inf, -math.inf)):
        x[0, 5 * at, 3], codebook[0, 64 * at, 16] = poison, poison
    indices, distance = nearest(x, codebook, metric)
    assert torch.equal(indices[0, [0, 5, 10]], torch.zeros(3, dtype=torch.int64))
    assert not distance[0, [0, 5, 10]].isfinite().any()
    fine = torch.tensor([row not in (0, 5, 10) for row in range(20)])
    usable = torch.tensor([code not in (0, 64, 128) for code in range(135)])
    places = usable.cumsum(0) - 1  # of the codes that are left when the others are taken out
    assert usable[indices[0, fine]].all()
    check_nearest(x[:, fine], codebook[:, usable], metric, False, (places[indices[:, fine]], distance[:, fine]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_same_bits_in_every_order(dtype: torch.dtype) -> None:
    generator = fresh_generator()
    x, codebook = (draw(generator, 2, rows, 40, dtype=dtype) for rows in (70, 150))
    rows, codes = draw(generator, 1, 1500, 9, dtype=dtype), torch.randint(-1, 300, (1, 1500), generator=generator)
    z = draw(generator, 500, 5, dtype=dtype)
    found = []
    for seed in (1, 2, 3):
        emulation.set_seed(seed)
        fsq = torch.ops.xlayer_emulated.fsq(z, [8, 5, 5, 5, 3], [], [], [], False, True)
        found.append([*nearest(x, codebook, "cosine"), *statistics(rows, codes, 299), *fsq])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# ---- what falls to each code -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "codes", "width"),
    [(1025, 1, 3), (2100, 5, 65), (1500, 300, 8), (300, 70_000, 2), (130, 2, 260)],  # one pass of sorting to three
)
def test_sums_of_whole_numbers_are_exact(rows: int, codes: int, width: int, dtype: torch.dtype) -> None:
    generator = fresh_generator()
    books = 2 if rows < 1000 else 1
    x = torch.randint(-4, 5, (books, rows, width), generator=generator).to(dtype)
    indices = torch.randint(-1, codes + 1, (books, rows), generator=generator)
    found, expected = statistics(x, indices, codes), reference.vq_statistics(x.double(), indices, codes)
    assert all(torch.equal(a.double(), b) for a, b in zip(found, expected, strict=True))


def test_codes_with_many_pieces() -> None:
    """Codes with a few rows and with several pieces of rows, in every window of the sorted rows."""
    generator = fresh_generator()
    counts = [127, 1, 128, 129, 0, 700, 2, 384, 255, 3, 1200, 40]
    indices = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    indices = indices[torch.randperm(len(indices), generator=generator)].unsqueeze(0)
    x = torch.randint(-50, 50, (1, indices.shape[1], 33), generator=generator).float()
    found, expected = statistics(x, indices, len(counts)), reference.vq_statistics(x.double(), indices, len(counts))
    assert found[0][0].tolist() == counts
    assert torch.equal(found[1].double(), expected[1])


def test_the_sum_of_a_code_depends_on_its_rows_alone() -> None:
    generator = fresh_generator()
    x = draw(generator, 1, 900, 5, dtype=torch.float32)
    indices = torch.randint(0, 3, (1, 900), generator=generator)
    together = statistics(x, indices, 3)[1]
    for code in range(3):
        mine = indices[0] == code
        alone = statistics(x[:, mine], torch.zeros(1, int(mine.sum()), dtype=torch.int64), 1)[1]
        assert torch.equal(alone[:, 0], together[:, code])


def test_rows_and_indices_of_any_strides() -> None:
    generator = fresh_generator()
    x = torch.randint(-4, 5, (3, 200, 40), generator=generator).float()
    indices = torch.randint(0, 7, (3, 200), generator=generator)
    expected = statistics(x, indices, 7)
    for x_like in (misaligned(x), x.transpose(0, 1).contiguous().transpose(0, 1)):
        found = statistics(x_like, indices.t().contiguous().t(), 7)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ---- finite scalar quantization --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("width", [1, 2, 5, 8, 33, 64])
def test_fsq_over_tiles(width: int, offset: bool, dtype: torch.dtype) -> None:
    """More rows than a tile, an odd end, and rows on pointers that take no vectors."""
    generator = fresh_generator()
    levels = [3 + i % 5 for i in range(width)]
    columns: list[list[float]] = [[], [], []]
    if offset:
        columns = [list(column) for column in zip(*reference.quantize.fsq_offsets(levels, "package"), strict=True)]
    rows = 2048 // width + 11
    z = draw(generator, rows, width, dtype=dtype)
    bound = "offset" if offset else "tanh"
    exact = reference.fsq(z.double(), levels, bound=bound)
    place = edges(z, levels, columns, offset)
    for z_like in (z, misaligned(z)):
        codes, indices, slope = torch.ops.xlayer_emulated.fsq(z_like, levels, *columns, offset, True)
        certain = place > 1e-6 * torch.tensor(levels)
        assert torch.equal(codes[certain], exact[0][certain].to(dtype))
        assert torch.equal(indices[certain.all(-1)], exact[1][certain.all(-1)])
        wide = z.double().requires_grad_()
        (expected,) = torch.autograd.grad(reference.fsq(wide, levels, bound=bound)[0].sum(), wide)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(slope.double(), expected, rtol=8 * eps, atol=8 * eps)
        plain = torch.ops.xlayer_emulated.fsq(z_like, levels, *columns, offset, False)
        assert torch.equal(plain[0], codes) and torch.equal(plain[1], indices)


def edges(z: Tensor, levels: list[int], columns: list[list[float]], offset: bool) -> Tensor:
    """Returns the distance of each bounded number from the nearest change of its digit, in digits."""
    z, count = z.double(), torch.tensor(levels, dtype=torch.float64)
    if offset:
        shift, half, middle = (torch.tensor(column, dtype=torch.float64) for column in columns)
        place = torch.tanh(z + shift) * half - middle
    else:
        place = (count - 1) * (torch.tanh(z) + 1) / 2
    return 0.5 - (place - place.round()).abs()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("offset", [False, True])
def test_digits_of_saturated_numbers_stay_in_range(offset: bool, dtype: torch.dtype) -> None:
    """Digits of saturated numbers stay in range although with many levels the offset bound reaches past the last
    digit."""
    levels = [4001, 2**20]
    columns: list[list[float]] = [[], [], []]
    if offset:
        columns = [list(column) for column in zip(*reference.quantize.fsq_offsets(levels, "package"), strict=True)]
    z = torch.tensor([[math.inf, 90.0], [-math.inf, -90.0]], dtype=dtype)
    codes, indices, _ = torch.ops.xlayer_emulated.fsq(z, levels, *columns, offset, False)
    assert indices.tolist() == [4001 * 2**20 - 1, 0]
    assert codes[1].tolist() == [-1, -1] and (codes[0] > 0.999).all() and (codes <= 1).all()
