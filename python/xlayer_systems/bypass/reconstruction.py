"""Stage 1: encoder and projectors learn to give the hidden states of every layer back from one latent per token.

Measured by R² per layer on held-out text, beside principal components of the same rank, the best that a linear
encoder and decoder can do in squared error over all layers together (Baldi and Hornik, 1989).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xlayer_systems.bypass.model import Bypass
from xlayer_systems.data.blocks import IGNORED, LanguageModelingData
from xlayer_systems.training.model import TrainingModel

LOG = logging.getLogger(__name__)
BATCH = 32  # blocks at once, where no gradient is needed
MAX_EXACT = 4096  # tokens or features up to which principal components are exact
OVERSAMPLING = 32  # random directions beyond those that are wanted


class FrozenModel(TrainingModel):
    """Is the training form of a bypass: the bypass as the only submodule, beside the frozen model that it is on.

    Args:
        frozen: is moved and cast along; not trained, saved or put into checkpoints.
        bypass: attached to it.
    """

    def __init__(self, frozen: nn.Module, bypass: Bypass) -> None:
        super().__init__()
        self.frozen = (frozen.eval(),)  # a tuple: no submodule, and train() leaves it in eval mode
        self.bypass = bypass

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenModel:
        self.frozen[0]._apply(fn)
        super()._apply(fn, recurse)
        return self


class ReconstructionOutput(NamedTuple):
    """Holds ``loss``; per example squared errors and squares ``[B, L]``, sums ``[B, L·d]`` and tokens ``[B]``."""

    loss: Tensor
    errors: Tensor
    squares: Tensor
    sums: Tensor
    tokens: Tensor


class Reconstruction(FrozenModel):
    """Is the training form of stage 1."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> ReconstructionOutput:
        """Computes the loss on ``input_ids`` ``[B, S]``; tokens whose label is −100 do not count.

        The loss is the squared error of the standardized states, averaged over features, layers and tokens.
        """
        states = self.bypass.collect(input_ids=input_ids)
        mask = (labels != IGNORED).to(self.bypass.mean.dtype)
        said, _ = self.bypass(states)
        wanted = self.bypass.standardize(states) * mask[..., None, None]
        errors = (said.permute(1, 2, 0, 3) * mask[..., None, None] - wanted).square().sum(-1)  # [B, S, L]
        loss = errors.mean(-1).sum() / (mask.sum().clamp(min=1) * states.shape[-1])
        squares, sums = wanted.double().square().sum((1, 3)), wanted.double().sum(1).flatten(1)
        return ReconstructionOutput(loss, errors.double().sum(1), squares, sums, mask.sum(1))


class ReconstructionData:
    """Holds text in the form that the training loop asks for in stage 1.

    Args:
        text: blocks of tokens.
        layers: L of the model.
    """

    def __init__(self, text: LanguageModelingData, layers: int) -> None:
        self.text, self.layers = text, layers
        self.train, self.validation, self.fingerprint = text.train, text.validation, text.fingerprint
        self.lengths, self.collate = text.lengths, text.collate

    def score(self, output: ReconstructionOutput, batch: dict[str, Tensor]) -> Tensor:
        """Returns for each block ``[B, 2L + 1 + L·d]``: squared errors, squares, tokens, sums."""
        tokens = output.tokens.double()[:, None]
        return torch.cat([output.errors, output.squares, tokens, output.sums], dim=1)

    def summarize(self, sums: Tensor) -> dict[str, Any]:
        """Returns ``r2``: per layer, ``r2_mean``: over layers; ``loss`` per feature."""
        layers = self.layers
        errors, squares, rest = sums[:layers], sums[layers : 2 * layers], sums[2 * layers :]
        tokens, totals = rest[0], rest[1:].reshape(layers, -1)
        r2 = 1 - errors / (squares - totals.square().sum(-1) / tokens)
        loss = float(errors.mean() / (tokens * totals.shape[-1]))
        return {"loss": loss, "r2": r2.tolist(), "r2_mean": float(r2.mean()), "tokens": int(tokens)}


def spread(blocks: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """Returns evenly spaced blocks of about that many tokens in total, the same for every seed."""
    count = min(len(blocks), max(1, tokens // (len(blocks[0]) - 1)))
    return [blocks[index * len(blocks) // count] for index in range(count)]


def inputs_of(data: LanguageModelingData, blocks: Sequence[Tensor], device: Any) -> Iterator[dict[str, Tensor]]:
    """Yields keyword arguments for a model that reads blocks, some at a time; the mask leaves out the padding."""
    for start in range(0, len(blocks), BATCH):
        batch = data.collate(blocks[start : start + BATCH])
        mask = (batch["labels"] != IGNORED).long()
        yield {"input_ids": batch["input_ids"].to(device), "attention_mask": mask.to(device)}


def standardized_states(bypass: Bypass, data: LanguageModelingData, blocks: Sequence[Tensor]) -> Tensor:
    """Returns the standardized states ``[N, L, d]`` of all tokens of the blocks."""
    found = []
    for inputs in inputs_of(data, blocks, bypass.mean.device):
        states = bypass.standardize(bypass.collect(**inputs))
        found.append(states[inputs["attention_mask"].bool()])
    return torch.cat(found)


def r2_per_layer(states: Tensor, said: Tensor) -> list[float]:
    """Computes 1 − squared error / squared deviation from the mean, of ``[N, L, d]`` per layer."""

    def squares(x: Tensor) -> Tensor:
        return x.square().sum((0, 2), dtype=torch.float64)

    return (1 - squares(states - said) / squares(states - states.mean(0, dtype=torch.float64))).tolist()


def principal_directions(centered: Tensor, rank: int) -> Tensor:
    """Returns the ``rank`` directions ``[D, rank]`` of most variance in ``[N, D]``.

    Up to 4096 tokens or features they come from the smaller Gram matrix, in float64. Its decomposition
    takes time that grows with the cube; above, the directions come from random ones and four multiplications by the
    covariance (Halko, Martinsson and Tropp, SIAM Review 2011, arXiv 0909.4061).
    """
    count, width = centered.shape
    if min(count, width) > MAX_EXACT:
        with torch.random.fork_rng(devices=[centered.device] if centered.is_cuda else []):
            torch.manual_seed(0)
            return torch.svd_lowrank(centered, min(rank + OVERSAMPLING, count, width), niter=4)[2][:, :rank]
    centered = centered.double()
    if count >= width:
        vectors = torch.linalg.eigh(centered.T @ centered).eigenvectors[:, -rank:]
    else:
        vectors = centered.T @ torch.linalg.eigh(centered @ centered.T).eigenvectors[:, -rank:]
    return vectors / vectors.norm(dim=0).clamp(min=1e-300)


def principal_r2(bypass: Bypass, data: LanguageModelingData, tokens: int) -> list[float]:
    """Computes R² per layer on validation of principal components of the same rank in place of the bypass.

    Components of all layers' standardized states together in the variant ``full``, layer by layer in ``offset``; from
    about so many training tokens.
    """
    parts = (spread(list(data.train), tokens), list(data.validation))
    LOG.info("PCA of %d tokens", len(parts[0]) * (len(parts[0][0]) - 1))
    train, held_out = (standardized_states(bypass, data, blocks) for blocks in parts)
    mean = train.mean(0, dtype=torch.float64).to(train)
    train -= mean
    held_out -= mean
    said = torch.empty_like(held_out)
    layers = held_out.shape[1]
    for group in [slice(0, layers)] if bypass.config.variant == "full" else [slice(i, i + 1) for i in range(layers)]:
        directions = principal_directions(train[:, group].flatten(1), bypass.config.latent).to(train)
        said[:, group] = (held_out[:, group].flatten(1) @ directions @ directions.T).view_as(held_out[:, group])
    return r2_per_layer(held_out, said)
