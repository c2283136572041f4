r"""Losses for soft tokens that one language model speaks to another with: what they must say, and that they differ.

All of them are float32 (float64 for float64), also under autocast, and have finite gradients where a batch has one
element, a vector is zero or every label is ignored. Soft tokens are ``[B, K, d]``: B messages of K vectors.

Papers: InfoNCE: van den Oord et al., 2018, arXiv 1807.03748.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xlayer_ext.reference._precision import no_autocast

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
    r"""Cross-entropy of the next token, :math:`\frac{\sum_t w_t \cdot -\log p_t(y_{t+1})}{\sum_t w_t}`, in nats.

    Args:
        logits: ``[B, T, V]``; those at t predict the label at t + 1.
        labels: int64 ``[B, T]``; −100 is not predicted.
        first_k, first_weight: each row's first k predicted tokens weigh ``first_weight`` (:func:`first_k_weights`): a
            later one can be guessed from those before it, the first only from the message.

    Returns:
        A scalar; 0 where nothing is predicted.
    """
    logits, labels = logits[:, :-1], labels[:, 1:]
    weights = first_k_weights(labels, first_k or 0, first_weight).to(_wide(logits).dtype)
    loss = F.cross_entropy(_wide(logits).transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return (loss * weights).sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


def first_k_weights(labels: Tensor, k: int, weight: float) -> Tensor:
    """Weights ``[B, T]`` of the labels ``[B, T]``: ``weight`` for each row's first k that are predicted, 1 for the
    others, 0 for those that are −100."""
    predicted = labels != IGNORED
    place = predicted.cumsum(1)
    return torch.where(place <= k, weight, 1.0) * predicted


def cosine_anchor_loss(soft: Tensor, anchor: Tensor, anchor_mask: Tensor | None = None) -> Tensor:
    r""":math:`1 - \cos(\mathrm{mean}_k s_k, \mathrm{mean}_t a_t)`, the mean over the batch; blind to scale.

    Args:
        soft: ``[B, K, d]``.
        anchor: ``[B, T, d]``, embeddings that the message should point to.
        anchor_mask: bool ``[B, T]``, True = counts; what is masked may hold anything.
    """
    cosine = F.cosine_similarity(_wide(soft).mean(1), _masked_mean(_wide(anchor), anchor_mask), dim=-1)
    return (1 - cosine).mean()


def info_nce_loss(soft: Tensor, positives: Tensor | None = None, *, temperature: float = 0.07) -> Tensor:
    r"""InfoNCE over the batch: message b must be nearer to positive b than to all others.

    :math:`-\log \frac{e^{\cos(f_b, p_b)/\tau}}{\sum_c e^{\cos(f_b, p_c)/\tau}}` with f the mean-pooled messages.

    Args:
        soft: ``[B, K, d]``.
        positives: ``[B, d]``; None takes the messages themselves, whose cosine with their own is 1: then the loss only
            drives messages apart.
        temperature: τ.
    """
    features = F.normalize(_wide(soft).mean(1), dim=-1)
    other = features if positives is None else F.normalize(_wide(positives), dim=-1)
    with no_autocast(features):
        cosines = features @ other.T
    return F.cross_entropy(cosines / temperature, torch.arange(len(soft), device=soft.device))


def reconstruction_loss(projected: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference between the means of ``projected [B, K, d]`` over K and of ``source [B, T, d]`` over the
    tokens of ``mask`` (bool ``[B, T]``, True = counts): can the source be told from the message?"""
    return F.mse_loss(_wide(projected).mean(1), _masked_mean(_wide(source), mask))


def bag_of_words_loss(logits: Tensor, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of which tokens occur in a text, mean over vocabulary and batch, in nats.

    Args:
        logits: ``[B, V]``, one per token of the vocabulary.
        input_ids: int64 ``[B, T]``; one that occurs twice counts once.
        mask: bool ``[B, T]``, True = counts.
    """
    logits = _wide(logits)
    counted = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
    present = torch.zeros(*logits.shape, dtype=logits.dtype, device=logits.device)
    present.scatter_reduce_(1, input_ids, counted.to(logits.dtype), "amax")
    return F.binary_cross_entropy_with_logits(logits, present)


def batch_diversity_loss(soft: Tensor) -> Tensor:
    """Mean cosine similarity between different messages ``[B, K, d]``, each as one vector: 1 where all are the same.

    0 for a batch of one.
    """
    flat = F.normalize(_wide(soft).flatten(1), dim=-1)
    b = len(flat)
    total = flat.sum(0).square().sum() - flat.square().sum()  # of all pairs, without the B × B matrix
    return total / max(1, b * (b - 1))


def variance_diversity_loss(z: Tensor, eps: float = 1e-8) -> Tensor:
    r""":math:`-\log(\mathrm{mean}_i\, \mathrm{Var}(z_i) + \epsilon)`, the variance of each of the last dimension's
    numbers over batch and tokens: large where all codes have become the same.

    Unlike a count of different codes it has a gradient, through a straight-through estimator too.
    """
    variance = _wide(z).flatten(0, -2).var(0, unbiased=False)
    return -(variance.mean() + eps).log()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return x.mean(1)
    kept = torch.where(mask.unsqueeze(-1), x, torch.zeros_like(x))
    return kept.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
