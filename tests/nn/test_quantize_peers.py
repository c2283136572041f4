"""The quantizers against the PyPI package `vector-quantize-pytorch`, with the same codebooks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from oracle import draw, fresh_generator
from quantize_tools import edge_distance
from xlayer_ext import functional as XF
from xlayer_ext.nn import FSQ, VectorQuantizer

peers = pytest.importorskip("vector_quantize_pytorch")

D, K = 24, 60


def pair(metric: str) -> tuple[VectorQuantizer, torch.nn.Module]:
    """Returns our quantizer and theirs, with the same codes and averages."""
    ours = VectorQuantizer(D, K, metric=metric, decay=0.8, commitment_weight=1.0)
    theirs = peers.VectorQuantize(D, codebook_size=K, decay=0.8, use_cosine_sim=metric == "cosine")
    codes = draw(fresh_generator(), K, D, dtype=torch.float32)
    ours.set_codebook(codes)
    book = theirs._codebook
    with torch.no_grad():
        book.embed.copy_(ours.codebook)
        book.embed_avg.copy_(ours.sums)
        book.cluster_size.copy_(ours.sizes)
    return ours, theirs


def assert_same_choice(mine: Tensor, other: Tensor, x: Tensor, codes: Tensor, metric: str) -> None:
    """Asserts equal indices, except where both codes are equally near up to rounding."""
    different = mine != other
    assert different.float().mean() < 0.01
    unit = torch.nn.functional.normalize if metric == "cosine" else (lambda t, dim: t)
    rows, codes = unit(x.double(), dim=-1)[different], unit(codes.double(), dim=-1)
    distances = [(rows - codes[choice[different]]).square().sum(-1) for choice in (mine, other)]
    torch.testing.assert_close(*distances, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_choices_in_evaluation(metric: str) -> None:
    ours, theirs = (module.eval() for module in pair(metric))
    x = draw(fresh_generator(), 5, 200, D, dtype=torch.float32)
    mine, (quantized, indices, _) = ours(x), theirs(x)
    assert_same_choice(mine.indices, indices, x, ours.codebook[0], metric)
    same = mine.indices == indices
    torch.testing.assert_close(mine.quantized[same], quantized[same])


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_one_step_of_the_moving_averages(metric: str) -> None:
    ours, theirs = (module.train() for module in pair(metric))
    x = draw(fresh_generator(), 4, 300, D, dtype=torch.float32)
    mine, (_, indices, _) = ours(x), theirs(x)
    assert torch.equal(mine.indices, indices)
    book = theirs._codebook
    torch.testing.assert_close(ours.sizes, book.cluster_size)
    torch.testing.assert_close(ours.sums, book.embed_avg, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.codebook, book.embed, rtol=1e-5, atol=1e-5)


def test_commitment_loss() -> None:
    ours, theirs = (module.train() for module in pair("euclidean"))
    x = draw(fresh_generator(), 4, 50, D, dtype=torch.float32)
    torch.testing.assert_close(ours(x).loss, theirs(x)[2].squeeze())


@pytest.mark.parametrize("bound", ["tanh", "offset"])
@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [7, 6, 3], [16, 4], [5] * 8], ids=str)
def test_finite_scalar_quantization(levels: list[int], bound: str) -> None:
    theirs = peers.FSQ(levels, preserve_symmetry=bound == "tanh")
    z = 2 * draw(fresh_generator(), 3, 400, len(levels), dtype=torch.float32)
    codes, indices = theirs(z)
    out = FSQ(levels, bound=bound)(z)
    certain = edge_distance(z, levels, bound, "package") > 1e-6 * torch.tensor(levels)
    torch.testing.assert_close(out.quantized[certain], codes[certain], rtol=1e-5, atol=1e-6)
    rows = certain.all(-1)
    assert rows.float().mean() > 0.99 and torch.equal(out.indices[rows], indices[rows].long())
    torch.testing.assert_close(
        XF.fsq_indices_to_codes(out.indices, levels, bound=bound), theirs.indices_to_codes(out.indices.int())
    )
