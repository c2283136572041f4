r"""Losses on soft tokens between two language models: on their content, and on their diversity.

All of them are float32 (float64 where a tensor is), also under autocast, and have finite gradients where a batch has
one element, a vector is zero or every label is ignored. Soft tokens are ``[B, K, d]``: B messages of K vectors.

At the edges: a batch of nothing has loss 0 and gradient 0, and the mean of no vectors is 0. A NaN or an infinity in a
number that counts makes the loss NaN or infinite; what a mask leaves out may hold anything.

Errors: TypeError where an argument is of the wrong type (floating-point tensors of the four usual dtypes, int64 labels
and ids, bool masks), ValueError where shapes or devices disagree or a number is out of range.

Papers: InfoNCE: van den Oord et al., 2018, arXiv 1807.03748.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xlayer_ext.functional._checks import (
    check_device,
    check_floats,
    check_int64,
    check_integer,
    check_mask,
    check_not_negative,
    check_positive,
    check_shapes,
    check_values,
    is_empty,
    no_autocast,
    with_zero_gradients,
)

IGNORED = -100

__all__ = [
    "bag_of_words_loss",
    "batch_diversity_loss",
    "cosine_anchor_loss",
    "first_k_weights",
    "info_nce_loss",
    "language_modeling_loss",
    "reconstruction_loss",
    "variance_diversity_loss",
]


def language_modeling_loss(
    logits: Tensor, labels: Tensor, *, first_k: int | None = None, first_weight: float = 1.0
) -> Tensor:
    r"""Computes the cross-entropy of the next token in nats.

    .. math:: \frac{\sum_t w_t \cdot -\log p_t(y_{t+1})}{\sum_t w_t}

    Args:
        logits: ``[B, T, V]``; those at t predict the label at t + 1.
        labels: int64 ``[B, T]``, each below V; −100 is not predicted.
        first_k, first_weight: each row's first k predicted tokens weigh ``first_weight`` (:func:`first_k_weights`): a
            later one can be guessed from those before it, the first only from the message.

    Returns:
        A scalar; 0 where nothing is predicted.
    """
    check_floats(logits=logits)
    check_int64(labels=labels)
    check_shapes({"logits": "B T V", "labels": "B T"}, logits=logits, labels=labels)
    check_device(logits=logits, labels=labels)
    if first_k is not None:
        check_integer("first_k", first_k, 0)
    check_not_negative(first_weight=first_weight)
    check_values("labels", labels, below=logits.shape[2], besides=IGNORED)
    logits, labels = logits[:, :-1], labels[:, 1:]
    if is_empty(logits.shape):
        return _nothing(logits)
    (logits,) = _wide(logits)
    weights = first_k_weights(labels, first_k or 0, first_weight).to(logits.dtype)
    loss = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return (loss * weights).sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


def first_k_weights(labels: Tensor, k: int, weight: float) -> Tensor:
    """Computes weights ``[B, T]`` of the labels ``[B, T]``: ``weight`` for each row's first k that are predicted, 1 for
    the others, 0 for those that are −100."""
    check_int64(labels=labels)
    check_shapes({"labels": "B T"}, labels=labels)
    check_integer("k", k, 0)
    check_not_negative(weight=weight)
    predicted = labels != IGNORED
    place = predicted.cumsum(1)
    return torch.where(place <= k, weight, 1.0) * predicted


def cosine_anchor_loss(soft: Tensor, anchor: Tensor, anchor_mask: Tensor | None = None) -> Tensor:
    r"""Computes :math:`1 - \cos(\mathrm{mean}_k s_k, \mathrm{mean}_t a_t)`, the mean over the batch; blind to scale.

    Args:
        soft: ``[B, K, d]``.
        anchor: ``[B, T, d]``, embeddings that the message should point to.
        anchor_mask: bool ``[B, T]``, True = counts; what is masked may hold anything.
    """
    check_floats(soft=soft, anchor=anchor)
    check_device(soft=soft, anchor=anchor)
    check_mask("anchor_mask", anchor_mask, soft)
    layouts = {"soft": "B K d", "anchor": "B T d", "anchor_mask": "B T"}
    check_shapes(layouts, soft=soft, anchor=anchor, anchor_mask=anchor_mask)
    if not soft.shape[0]:
        return _nothing(soft, anchor)
    soft, anchor = _wide(soft, anchor)
    cosine = F.cosine_similarity(_masked_mean(soft, None), _masked_mean(anchor, anchor_mask), dim=-1)
    return (1 - cosine).mean()


def info_nce_loss(soft: Tensor, positives: Tensor | None = None, *, temperature: float = 0.07) -> Tensor:
    r"""Computes InfoNCE over the batch: message b must be nearer to positive b than to all others.

    :math:`-\log \frac{e^{\cos(f_b, p_b)/\tau}}{\sum_c e^{\cos(f_b, p_c)/\tau}}` with f the mean-pooled messages.

    Args:
        soft: ``[B, K, d]``.
        positives: ``[B, d]``; None takes the messages themselves, whose cosine with their own is 1: then the loss only
            drives messages apart.
        temperature: τ > 0.
    """
    check_floats(soft=soft, **({} if positives is None else {"positives": positives}))
    check_shapes({"soft": "B K d", "positives": "B d"}, soft=soft, positives=positives)
    check_device(soft=soft, positives=positives)
    check_positive(temperature=temperature)
    if not soft.shape[0]:
        return _nothing(soft, positives)
    wide = _wide(soft, *(() if positives is None else (positives,)))
    features = F.normalize(_masked_mean(wide[0], None), dim=-1)
    other = features if positives is None else F.normalize(wide[1], dim=-1)
    with no_autocast(features):
        cosines = features @ other.T
    return F.cross_entropy(cosines / temperature, torch.arange(len(soft), device=soft.device))


def reconstruction_loss(projected: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
    """Computes the mean squared difference between the means of ``projected [B, K, d]`` over K and of
    ``source [B, T, d]`` over the tokens of ``mask`` (bool ``[B, T]``, True = counts)."""
    check_floats(projected=projected, source=source)
    check_device(projected=projected, source=source)
    check_mask("mask", mask, projected)
    layouts = {"projected": "B K d", "source": "B T d", "mask": "B T"}
    check_shapes(layouts, projected=projected, source=source, mask=mask)
    if is_empty((projected.shape[0], projected.shape[2])):
        return _nothing(projected, source)
    projected, source = _wide(projected, source)
    return F.mse_loss(_masked_mean(projected, None), _masked_mean(source, mask))


def bag_of_words_loss(logits: Tensor, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Computes the binary cross-entropy of token occurrence, mean over vocabulary and batch, in nats.

    Args:
        logits: ``[B, V]``, one per token of the vocabulary.
        input_ids: int64 ``[B, T]``, each that counts at least 0 and below V; one that occurs twice counts once.
        mask: bool ``[B, T]``, True = counts.
    """
    check_floats(logits=logits)
    check_int64(input_ids=input_ids)
    check_device(logits=logits, input_ids=input_ids)
    check_mask("mask", mask, logits)
    check_shapes({"logits": "B V", "input_ids": "B T", "mask": "B T"}, logits=logits, input_ids=input_ids, mask=mask)
    if mask is not None:
        input_ids = input_ids.masked_fill(~mask, 0)
    if is_empty(logits.shape):
        return _nothing(logits)
    check_values("input_ids", input_ids, below=logits.shape[1])
    (logits,) = _wide(logits)
    counted = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
    present = torch.zeros(*logits.shape, dtype=logits.dtype, device=logits.device)
    present.scatter_reduce_(1, input_ids, counted.to(logits.dtype), "amax")
    return F.binary_cross_entropy_with_logits(logits, present)


def batch_diversity_loss(soft: Tensor) -> Tensor:
    """Computes the mean cosine similarity between different messages ``[B, K, d]``, each as one vector.

    1 where all are the same, 0 for a batch of one.
    """
    check_floats(soft=soft)
    check_shapes({"soft": "B K d"}, soft=soft)
    flat = F.normalize(_wide(soft)[0].flatten(1), dim=-1)
    b = len(flat)
    total = flat.sum(0).square().sum() - flat.square().sum()  # of all pairs, without the B × B matrix
    return total / float(max(1, b * (b - 1)))  # a batch on meta may have more pairs than an int64 counts


def variance_diversity_loss(z: Tensor, eps: float = 1e-8) -> Tensor:
    r"""Computes :math:`-\log(\mathrm{mean}_i\, \mathrm{Var}(z_i) + \epsilon)`, the variance of each feature over batch
    and tokens: large where all codes have become the same.

    Unlike a count of different codes it has a gradient, through a straight-through estimator too.

    Args:
        z: ``[..., d]``, of at least two dimensions.
        eps: ε > 0.
    """
    check_floats(z=z)
    check_positive(eps=eps)
    if z.dim() < 2:
        raise ValueError(f"z must have shape [..., d] of at least two dimensions, got {list(z.shape)}")
    if is_empty(z.shape):
        return _nothing(z)
    variance = _wide(z)[0].flatten(0, -2).var(0, unbiased=False)
    return -(variance.mean() + eps).log()


def _wide(*tensors: Tensor) -> list[Tensor]:
    """Casts all tensors to the widest of their dtypes, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def _nothing(*tensors: Tensor | None) -> Tensor:
    """Returns the loss of an empty batch, 0 with gradient 0."""
    given = [tensor for tensor in tensors if tensor is not None]
    (first, *_) = _wide(*given)
    return with_zero_gradients(first.new_zeros(()), *given)


def _masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Averages ``[B, T, d]`` over T to ``[B, d]``; 0 where the mask allows no token."""
    if mask is None:
        return x.mean(1) if x.shape[1] else x.sum(1)
    kept = torch.where(mask.unsqueeze(-1), x, torch.zeros_like(x))
    return kept.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
