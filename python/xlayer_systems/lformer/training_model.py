"""The training form of an L-Former: phase A, then phase B, and the metrics of the side path."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlayer_systems.data.blocks import IGNORED
from xlayer_systems.lformer.model import LFormer
from xlayer_systems.lformer.path import SidePath
from xlayer_systems.training.checkpoints import whole
from xlayer_systems.training.model import TrainingModel


class LFormerTrainingOutput(NamedTuple):
    """Holds the losses; ``loss`` alone has a gradient. ``token_loss [blocks, S]``: nats, 0 for no prediction."""

    loss: Tensor
    losses: dict[str, Tensor]
    logits_tools: Tensor | None
    values: Tensor | None
    plan: Tensor | None
    token_loss: Tensor | None


class LFormerForTraining(TrainingModel):
    """Is the training form of an attached L-Former, on requests and on blocks of text for the next-token loss.

    Args:
        model: the L-Former.
        phase_a_steps: optimizer steps before phase B.
    """

    def __init__(self, model: LFormer, phase_a_steps: int) -> None:
        super().__init__()
        self.model, self.phase_a_steps = model, phase_a_steps
        self.moved: list[Tensor] = []
        self._set_phase("a")

    def begin_step(self, step: int) -> None:
        """Sets the phase, which follows from the number of the step."""
        phase = "a" if step < self.phase_a_steps else "b"
        if phase != self.model.phase:
            self._set_phase(phase)

    def _set_phase(self, phase: str) -> None:
        self.model.set_phase(phase)
        for parameter in self.model.unfrozen():
            # In phase A too, where no gradient reaches them: DDP checks requires_grad once, when it is made.
            parameter.requires_grad_(True)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        tools: Tensor,
        values: Tensor,
        plan: Tensor,
        lm_input_ids: Tensor,
        lm_labels: Tensor,
    ) -> LFormerTrainingOutput:
        """Computes the losses of a batch; in training, blocks are read only where their loss has a gradient."""
        model = self.model
        output = model(input_ids, attention_mask, tools=tools, values=values, plan=plan, logits=False)
        loss, losses, token_loss = output.loss, dict(output.losses), None
        if self.reads_blocks or not self.training:
            logits = model(lm_input_ids, reason=False).logits_lm
            flat = logits.float().flatten(0, 1)
            token_loss = F.cross_entropy(flat, lm_labels.flatten(), ignore_index=IGNORED, reduction="none")
            losses["lm"] = token_loss.sum() / (lm_labels != IGNORED).sum()
            loss = loss + model.config.lambda_lm * losses["lm"]
            token_loss = token_loss.detach().view_as(lm_labels)
        if not self.training:
            self._watch(output.states)
        return LFormerTrainingOutput(
            loss,
            {name: part.detach() for name, part in losses.items()},
            _detached(output.logits_tools),
            _detached(output.values),
            output.plan,
            token_loss,
        )

    @property
    def reads_blocks(self) -> bool:
        """Tells whether the language-modelling loss reaches a trained parameter in this phase."""
        config = self.model.config
        taught = config.blend_into_lm or (self.model.phase == "b" and config.last_k_unfreeze > 0)
        return taught and config.lambda_lm > 0

    def usage(self, reset: bool = True) -> dict[str, Any]:
        """Returns ``gates`` (of ema) and ``movement``, each layer's share in the way of the state; {} without a path.

        The shares are means over the evaluation.
        """
        if not isinstance(self.model.path, SidePath) or not self.moved:
            return {}
        path = self.model.path
        moved = torch.cat(self.moved, 1)
        if reset:
            self.moved = []
        movement = (moved / moved.sum(0).clamp(min=1e-12)).mean(1).tolist()
        named = zip(map(str, path.taps), movement, strict=True)
        gates = path.aggregator.gates
        if gates is None:
            return {"movement": dict(named)}
        values = whole(gates).tolist()
        return {"gates": dict(zip(map(str, path.taps), values, strict=True)), "movement": dict(named)}

    def gradient_groups(self) -> dict[str, list[nn.Parameter]]:
        """Returns the parameters by part of the side path, the heads, and the base's layers that phase B trains."""
        model = self.model
        parts = {name: list(part.parameters()) for name, part in model.path.named_children()}
        parts["heads"] = list(model.heads.parameters())
        if model.config.blend_into_lm:
            parts["blend"] = [*model.blend.parameters(), model.blend_gate]
        if model.unfrozen():
            parts["base"] = model.unfrozen()
        return parts

    def gradient_checkpointing_enable(self) -> None:
        """Recomputes each layer of the base in the backward pass."""
        self.model.gradient_checkpointing_enable()

    def _watch(self, states: Tensor) -> None:
        """Collects how far each layer moved each state, ``[L, states]``."""
        before = torch.cat([torch.zeros_like(states[:1]), states[:-1]])
        self.moved.append((states - before).float().norm(dim=-1).flatten(1))


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
