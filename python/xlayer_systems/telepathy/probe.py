"""The linear probe: how much of the answer can be read off the sender's states by a linear map alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
HELD_OUT = 5  # every fifth training example chooses the features and the penalty
ITERATIONS = 60


class Pooled(NamedTuple):
    """Holds the mean state and the last token's of N texts, ``[N, d]`` each."""

    mean: Tensor
    last: Tensor

    def features(self) -> dict[str, Tensor]:
        """Returns the features that a probe may read, by name."""
        return {"mean": self.mean, "last": self.last, "both": torch.cat(self, dim=1)}


def pool(states: Tensor, mask: Tensor) -> Pooled:
    """Pools ``states [B, T, d]`` over the tokens of ``mask [B, T]`` bool; a text has at least one."""
    weights = mask.to(states.dtype).unsqueeze(-1)
    mean = (states * weights).sum(1) / weights.sum(1)
    places = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, places, -1).max(1).values
    return Pooled(mean, states[torch.arange(len(states), device=states.device), last])


class Probe(NamedTuple):
    """Holds a fitted probe: ``features`` names what it reads, ``held_out`` its accuracy where it was chosen."""

    features: str
    penalty: float
    held_out: float
    center: Tensor
    scale: Tensor
    weight: Tensor

    def predict(self, pooled: Pooled) -> list[int]:
        """Returns the index of the most probable label per text."""
        x = _standard(pooled.features()[self.features], self.center, self.scale)
        labels: list[int] = (x @ self.weight).argmax(1).tolist()
        return labels


def fit_probe(pooled: Pooled, labels: Sequence[int], classes: int, seed: int) -> Probe:
    """Fits a multinomial logistic regression, its features and penalty chosen on a held-out fifth, then on all.

    The validation examples of the task have no part in it. Penalties are of the mean loss: λ/2 · ‖W‖².
    """
    target = torch.tensor(labels, device=pooled.mean.device)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(target.device)
    held, rest = order[::HELD_OUT], order[torch.arange(len(order), device=order.device) % HELD_OUT != 0]
    best: tuple[float, str, float] | None = None
    for name, features in pooled.features().items():
        center, scale = _moments(features[rest])
        x = _standard(features, center, scale)
        weight = None
        for penalty in reversed(PENALTIES):  # from the strongest penalty down, each started at the solution before
            weight = _fit(x[rest], target[rest], classes, penalty, weight)
            accuracy = ((x[held] @ weight).argmax(1) == target[held]).double().mean().item()
            if best is None or accuracy > best[0]:
                best = (accuracy, name, penalty)
    assert best is not None
    accuracy, name, penalty = best
    features = pooled.features()[name]
    center, scale = _moments(features)
    weight = _fit(_standard(features, center, scale), target, classes, penalty, None)
    return Probe(name, penalty, accuracy, center, scale, weight)


def _fit(x: Tensor, target: Tensor, classes: int, penalty: float, start: Tensor | None) -> Tensor:
    weight = torch.zeros(x.shape[1], classes, device=x.device) if start is None else start.clone()
    weight.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=ITERATIONS, history_size=10, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        # The last feature is the constant: its weights, the biases, are not shrunk.
        value = F.cross_entropy(x @ weight, target) + penalty / 2 * weight[:-1].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weight.detach()


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    return features.mean(0), features.std(0, correction=0).clamp(min=1e-6)


def _standard(features: Tensor, center: Tensor, scale: Tensor) -> Tensor:
    return torch.cat([(features - center) / scale, features.new_ones(len(features), 1)], dim=1)
