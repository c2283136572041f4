"""The losses of soft tokens against loops written out in float64, and at their edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from oracle import draw, fresh_generator
from xlayer_ext import functional as XF

IGNORED = -100


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def test_language_modeling_loss_is_the_weighted_mean() -> None:
    generator = fresh_generator()
    logits = draw(generator, 3, 6, 5)
    labels = torch.randint(5, (3, 6), generator=generator)
    labels[0, :3] = labels[2, 1:] = IGNORED
    total, weight = 0.0, 0.0
    for b in range(3):
        seen = 0
        for t in range(1, 6):
            if labels[b, t] == IGNORED:
                continue
            seen += 1
            w = 7.0 if seen <= 2 else 1.0
            total += w * -float(logits[b, t - 1].log_softmax(-1)[labels[b, t]])
            weight += w
    actual = XF.language_modeling_loss(logits, labels, first_k=2, first_weight=7.0)
    assert math.isclose(float(actual), total / weight, rel_tol=1e-12)
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(XF.language_modeling_loss(logits, labels), plain)


def test_first_k_weights_count_what_is_predicted() -> None:
    labels = torch.tensor([[IGNORED, 4, IGNORED, 3, 2], [1, 1, 1, IGNORED, IGNORED]])
    expected = [[0, 100, 0, 100, 1], [100, 100, 1, 0, 0]]
    assert XF.first_k_weights(labels, 2, 100.0).tolist() == expected


def test_cosine_anchor_loss_is_blind_to_scale() -> None:
    generator = fresh_generator()
    soft, anchor = draw(generator, 4, 3, 8), draw(generator, 4, 5, 8)
    mask = torch.rand(4, 5, generator=generator) < 0.6
    mask[:, 0] = True
    expected = sum(1 - cosine(soft[b].mean(0), anchor[b][mask[b]].mean(0)) for b in range(4)) / 4
    spoiled = anchor.masked_fill(~mask.unsqueeze(-1), float("nan"))
    for scale in (1.0, 1e-3):
        assert math.isclose(float(XF.cosine_anchor_loss(scale * soft, spoiled, mask)), expected, rel_tol=1e-9)


def test_info_nce_loss() -> None:
    generator = fresh_generator()
    soft, positives = draw(generator, 4, 3, 8), draw(generator, 4, 8)
    for other in (positives, soft.mean(1)):
        loss = 0.0
        for b in range(4):
            logits = torch.tensor([cosine(soft[b].mean(0), other[c]) / 0.1 for c in range(4)], dtype=torch.float64)
            loss -= float(logits.log_softmax(0)[b]) / 4
        given = positives if other is positives else None
        assert math.isclose(float(XF.info_nce_loss(soft, given, temperature=0.1)), loss, rel_tol=1e-9)


def test_reconstruction_loss() -> None:
    generator = fresh_generator()
    projected, source = draw(generator, 2, 3, 5), draw(generator, 2, 4, 5)
    mask = torch.tensor([[True, True, False, False], [True, False, True, True]])
    wanted = torch.stack([projected[b].mean(0) - source[b][mask[b]].mean(0) for b in range(2)]).square().mean()
    spoiled = source.masked_fill(~mask.unsqueeze(-1), float("nan"))
    torch.testing.assert_close(XF.reconstruction_loss(projected, spoiled, mask), wanted)


def test_bag_of_words_loss_counts_each_token_once() -> None:
    logits = draw(fresh_generator(), 2, 6)
    ids = torch.tensor([[1, 1, 4], [0, 5, 2]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    present = torch.tensor([[0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0]], dtype=torch.float64)
    wanted = -(present * logits.sigmoid().log() + (1 - present) * (1 - logits.sigmoid()).log()).mean()
    torch.testing.assert_close(XF.bag_of_words_loss(logits, ids, mask), wanted)


def test_batch_diversity_loss_is_the_mean_of_all_pairs() -> None:
    soft = draw(fresh_generator(), 5, 3, 4)
    pairs = [cosine(soft[a].flatten(), soft[b].flatten()) for a in range(5) for b in range(5) if a != b]
    assert math.isclose(float(XF.batch_diversity_loss(soft)), sum(pairs) / len(pairs), rel_tol=1e-9)
    torch.testing.assert_close(XF.batch_diversity_loss(soft[:1].expand(3, 3, 4)), torch.tensor(1.0).double())
    assert XF.batch_diversity_loss(soft[:1]) == 0


def test_variance_diversity_loss() -> None:
    z = draw(fresh_generator(), 4, 3, 2)
    rows = z.reshape(12, 2)
    variance = ((rows - rows.mean(0)) ** 2).mean(0)
    torch.testing.assert_close(XF.variance_diversity_loss(z), -torch.log(variance.mean() + 1e-8))
    assert XF.variance_diversity_loss(torch.ones(4, 3, 2)) > 18  # collapsed: −log 1e-8


def calls(
    generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> dict[str, tuple[Callable[..., Any], Tensor]]:
    """Returns each loss as a function of its first argument."""
    soft, anchor = draw(generator, 3, 2, 4, dtype=dtype), draw(generator, 3, 5, 4, dtype=dtype)
    ids = torch.randint(2, (3, 2), generator=generator)
    return {
        "lm": (lambda x: XF.language_modeling_loss(x, ids, first_k=1, first_weight=3.0), soft),
        "anchor": (lambda x: XF.cosine_anchor_loss(x, anchor), soft),
        "info_nce": (XF.info_nce_loss, soft),
        "reconstruction": (lambda x: XF.reconstruction_loss(x, anchor), soft),
        "bag_of_words": (lambda x: XF.bag_of_words_loss(x[:, 0], ids), soft),
        "batch_diversity": (XF.batch_diversity_loss, soft),
        "variance_diversity": (XF.variance_diversity_loss, soft),
    }


NAMES = tuple(calls(torch.Generator()))


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str) -> None:
    loss, x = calls(fresh_generator())[name]
    assert torch.autograd.gradcheck(loss, x.requires_grad_())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("start", ["one", "zeros", "equal"])
def test_gradients_are_finite_at_the_edges(name: str, start: str) -> None:
    loss, x = calls(fresh_generator(), torch.float32)[name]
    x = {"one": x, "zeros": torch.zeros_like(x), "equal": x[:1].expand_as(x).clone()}[start].requires_grad_()
    value = loss(x)
    (grad,) = torch.autograd.grad(value, x)
    assert value.isfinite() and grad.isfinite().all()


def test_nothing_to_predict_and_a_batch_of_one() -> None:
    logits, labels = torch.ones(1, 3, 4, requires_grad=True), torch.full((1, 3), IGNORED)
    loss = XF.language_modeling_loss(logits, labels)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss == 0 and not grad.any()
    soft = torch.ones(1, 2, 4, requires_grad=True)
    for function in (XF.info_nce_loss, XF.batch_diversity_loss):
        (grad,) = torch.autograd.grad(function(soft), soft)
        assert grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name: str) -> None:
    loss, x = calls(fresh_generator(), torch.float32)[name]
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(x)
    torch.testing.assert_close(inside, loss(x), rtol=1e-6, atol=1e-6)
    assert inside.dtype == torch.float32


# ---- edges: nothing, not a number, numbers out of range --------------------------------------------------------------


def empty_calls() -> dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]]:
    """Returns each loss as a function of its floating-point tensors, and shapes in which no element counts."""
    ids = torch.zeros(0, 3, dtype=torch.int64)
    return {
        "lm": (lambda x: XF.language_modeling_loss(x, ids, first_k=1), [(0, 3, 4)]),
        "lm-one-token": (lambda x: XF.language_modeling_loss(x, torch.zeros(2, 1, dtype=torch.int64)), [(2, 1, 4)]),
        "lm-no-token": (lambda x: XF.language_modeling_loss(x, torch.zeros(2, 0, dtype=torch.int64)), [(2, 0, 4)]),
        "anchor": (XF.cosine_anchor_loss, [(0, 2, 4), (0, 5, 4)]),
        "info_nce": (XF.info_nce_loss, [(0, 2, 4)]),
        "info_nce-positives": (XF.info_nce_loss, [(0, 2, 4), (0, 4)]),
        "reconstruction": (XF.reconstruction_loss, [(0, 2, 4), (0, 5, 4)]),
        "reconstruction-no-width": (XF.reconstruction_loss, [(3, 2, 0), (3, 5, 0)]),
        "bag_of_words": (lambda x: XF.bag_of_words_loss(x, ids), [(0, 9)]),
        "batch_diversity": (XF.batch_diversity_loss, [(0, 2, 4)]),
        "batch_diversity-no-token": (XF.batch_diversity_loss, [(3, 0, 4)]),
        "variance_diversity": (XF.variance_diversity_loss, [(0, 2, 4)]),
        "variance_diversity-no-width": (XF.variance_diversity_loss, [(2, 0)]),
    }


@pytest.mark.parametrize("name", empty_calls())
def test_a_batch_of_nothing_has_loss_0_and_gradient_0(name: str) -> None:
    loss, shapes = empty_calls()[name]
    given = [torch.ones(shape, dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    value = loss(*given)
    assert value == 0 and value.shape == () and value.dtype == torch.float32
    for x, grad in zip(given, torch.autograd.grad(value, given), strict=True):
        assert grad.shape == x.shape and not grad.any()


def test_the_mean_of_no_vectors_is_0() -> None:
    soft, none = torch.ones(3, 2, 4, requires_grad=True), torch.ones(3, 0, 4, requires_grad=True)
    assert XF.cosine_anchor_loss(soft, none) == 1 and XF.cosine_anchor_loss(none, soft) == 1
    assert XF.cosine_anchor_loss(soft, soft, torch.zeros(3, 2, dtype=torch.bool)) == 1
    assert XF.reconstruction_loss(soft, none) == 1
    assert math.isclose(float(XF.info_nce_loss(none.detach())), math.log(3), rel_tol=1e-6)
    for grad in torch.autograd.grad(XF.cosine_anchor_loss(soft, none), (soft, none)):
        assert not grad.any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_does_not_pass_for_a_loss(name: str, poison: float) -> None:
    loss, x = calls(fresh_generator(), torch.float32)[name]
    x[0, 0, 0] = poison
    assert not loss(x).isfinite()


def test_what_does_not_count_may_hold_anything() -> None:
    generator = fresh_generator()
    logits, labels = draw(generator, 2, 4, 5), torch.tensor([[IGNORED, 1, 2, IGNORED], [3, IGNORED, 0, IGNORED]])
    value = XF.language_modeling_loss(logits, labels)
    logits[:, 2:] = float("nan")  # predict labels that are ignored, or nothing
    logits[1, 0] = float("inf")
    assert torch.equal(XF.language_modeling_loss(logits, labels), value)
    words, mask = draw(generator, 2, 6), torch.tensor([[True, True, False], [True, False, False]])
    ids = torch.tensor([[1, 1, IGNORED], [0, 99, -1]])
    expected = XF.bag_of_words_loss(words, ids.masked_fill(~mask, 0), mask)
    assert torch.equal(XF.bag_of_words_loss(words, ids, mask), expected)


def test_labels_are_looked_at_only_where_that_is_free() -> None:
    """Compiled and exported graphs, fake tensors and vmap go around the check of values."""
    logits, labels = torch.ones(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    compiled = torch.compile(XF.language_modeling_loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(logits, labels), XF.language_modeling_loss(logits, labels))
    meta = XF.language_modeling_loss(logits.to("meta"), labels.to("meta"))
    assert meta.is_meta and meta.shape == ()
    with torch._subclasses.FakeTensorMode():
        fake = XF.bag_of_words_loss(torch.ones(2, 4), torch.zeros(2, 3, dtype=torch.int64))
    assert fake.shape == ()
    each = torch.func.vmap(XF.language_modeling_loss)(logits.unsqueeze(1), labels.unsqueeze(1))
    torch.testing.assert_close(each.mean(), XF.language_modeling_loss(logits, labels))


def test_dtypes_may_differ() -> None:
    generator = fresh_generator()
    soft, anchor = draw(generator, 3, 2, 4, dtype=torch.bfloat16), draw(generator, 3, 5, 4)
    for loss, other in (
        (XF.cosine_anchor_loss, anchor),
        (XF.reconstruction_loss, anchor),
        (XF.info_nce_loss, anchor[:, 0]),
    ):
        value = loss(soft, other)
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, loss(soft.double(), other))
