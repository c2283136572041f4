"""The training form of the model: its loss, and the metrics of its layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlayer_systems.data.blocks import IGNORED
from xlayer_systems.hyper_lm.model import HyperTransformer
from xlayer_systems.training.model import TrainingModel


class LanguageModelOutput(NamedTuple):
    """Holds ``loss``, the mean over predicted tokens in nats; ``token_loss [B, S]``, 0 where nothing was predicted."""

    loss: Tensor
    token_loss: Tensor


class LanguageModel(TrainingModel):
    """Predicts next tokens with a `HyperTransformer`: ``forward(input_ids, labels) -> LanguageModelOutput``.

    In evaluation it gathers how similar the inputs of adjacent sublayers are: where layers stop adding anything new,
    the cosine is near 1 (representation collapse, as Zhu et al. 2025 measure it).
    """

    def __init__(self, model: HyperTransformer) -> None:
        super().__init__()
        self.model = model
        self.inputs = SublayerInputs(model)

    def forward(self, input_ids: Tensor, labels: Tensor) -> LanguageModelOutput:
        """Computes the loss; ``labels [B, S]``: the token after each of ``input_ids``, or `IGNORED`."""
        with self.inputs.watch(not self.training):
            logits = self.model(input_ids)
        token_loss = F.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        loss = token_loss.sum() / (labels != IGNORED).sum()
        return LanguageModelOutput(loss, token_loss.detach().view_as(labels))

    def usage(self, reset: bool = True) -> dict[str, Any]:
        """Returns ``{"similarity": {sublayer: mean cosine of its input and the one before}}`` in evaluations."""
        similarity = self.inputs.similarity()
        if reset:
            self.inputs.reset()
        return {"similarity": similarity}

    def gradient_groups(self) -> dict[str, list[nn.Parameter]]:
        """Returns the parameters by layer: embedding (which also makes the logits), blocks by number, last norm."""
        blocks = {f"{index}": list(block.parameters()) for index, block in enumerate(self.model.blocks)}
        return {
            "embedding": list(self.model.embedding.parameters()),
            **blocks,
            "norm": list(self.model.norm.parameters()),
        }

    def gradient_checkpointing_enable(self) -> None:
        """Recomputes each block in the backward pass."""
        self.model.gradient_checkpointing_enable()


class SublayerInputs:
    """Cosines of what adjacent sublayers read, summed on the device over all tokens while recording is on."""

    def __init__(self, model: HyperTransformer) -> None:
        self.active = False
        self.names: list[str] = []
        for index, block in enumerate(model.blocks):
            for part in ("attention", "mlp"):
                norm: nn.Module = getattr(block, f"{part}_norm")
                norm.register_forward_pre_hook(self._hook(len(self.names)))
                self.names.append(f"{index}.{part}")
        self.reset()

    def reset(self) -> None:
        """Forgets all tokens."""
        self.sums: list[Tensor | float] = [0.0] * len(self.names)
        self.tokens = 0
        self.last: Tensor | None = None

    def watch(self, active: bool) -> SublayerInputs:
        """Turns recording on or off until the end of a ``with`` block."""
        self.active = active
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self.active, self.last = False, None

    def similarity(self) -> dict[str, float]:
        """Returns the mean cosine per sublayer with the one before; {} before any token."""
        named = zip(self.names, self.sums, strict=True)
        return {name: float(total) / self.tokens for name, total in list(named)[1:]} if self.tokens else {}

    def _hook(self, position: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if self.active:
                self._add(position, arguments[0].detach().float())

        return see

    def _add(self, position: int, x: Tensor) -> None:
        if self.last is None:
            self.tokens += x.shape[:-1].numel()
        else:
            wide = torch.float64 if x.device.type == "cpu" else torch.float32
            self.sums[position] = self.sums[position] + F.cosine_similarity(x, self.last, dim=-1).sum(dtype=wide)
        self.last = x
