"""Bridge from the sender's hidden states to soft tokens that the receiver can read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xlayer_ext.nn import FSQ, VectorQuantizer
from xlayer_systems.hf.pretrained import check_state, read_config, read_own, save_own
from xlayer_systems.telepathy.config import TelepathyConfig
from xlayer_systems.telepathy.diffusion import DiffusionBridge
from xlayer_systems.telepathy.resampler import PerceiverResampler, RMSScale, StatisticalNormalizer, TanhScale

WEIGHTS, DESCRIPTION = "bridge.safetensors", "bridge.json"


class BridgeOutput(NamedTuple):
    """Holds the output of a bridge for a batch.

    Attributes:
        soft: ``[B, K, d]``, in the scale of the receiver's embeddings.
        hidden: ``[B, K, d]`` before that scale; the auxiliary heads read it.
        codes: what the variance loss sees: the codes of FSQ, else ``hidden`` before a quantizer.
        indices: of the codes, ``[B, K]``, or of their digits ``[B, K, c]``; None without a quantizer.
        loss: of the quantizer; 0 without one.
    """

    soft: Tensor
    hidden: Tensor
    codes: Tensor
    indices: Tensor | None
    loss: Tensor


class Dimensions(NamedTuple):
    """Widths of both models and the sender's vocabulary."""

    source: int
    target: int
    source_vocabulary: int


class TelepathyBridge(nn.Module):
    """Combines normalizer, resampler or diffusion transformer, quantizer and output scale, with heads for the losses.

    Args:
        config: the bridge.
        dimensions: of the models at both ends.
        target_rms: root mean square of the receiver's embeddings, where the config does not say what it shall be.
    """

    def __init__(self, config: TelepathyConfig, dimensions: Dimensions, target_rms: float) -> None:
        super().__init__()
        self.config, self.dimensions = config, dimensions
        self.target_rms = config.target_rms or target_rms
        source, target, vocabulary = dimensions
        width = config.hidden_size or target
        if width % config.num_heads:
            raise ValueError(f"num_heads must divide the bridge's width {width}, got {config.num_heads}")
        self.normalizer: nn.Module = nn.Identity()
        if config.normalizer != "none":
            self.normalizer = StatisticalNormalizer(source, target, learnable=config.normalizer == "learnable")
        self.dit: DiffusionBridge | None = None
        if config.bridge == "dit":
            self.dit = DiffusionBridge(
                source, target, config.soft_tokens, width, config.num_layers, config.num_heads, config.conditioning,
                target_scale=self.target_rms,
            )  # fmt: skip
        else:
            self.resampler = PerceiverResampler(
                source, target, config.soft_tokens, config.num_layers, config.num_heads, hidden_size=width
            )
            start_as_messages(self.resampler)
        if config.bridge == "vq":
            self.quantizer: nn.Module = VectorQuantizer(
                target,
                config.codebook_size,
                metric=config.metric,
                ema=config.ema,
                decay=config.decay,
                commitment_weight=config.commitment,
                entropy_weight=config.entropy,
                threshold_ema_dead_code=config.threshold_ema_dead_code,
            )
        elif config.bridge == "fsq":
            # Projections of its own, so that the variance loss sees the codes themselves.
            self.down, self.up = nn.Linear(target, len(config.levels)), nn.Linear(len(config.levels), target)
            self.quantizer = FSQ(config.levels)
        self.scale: nn.Module = nn.Identity()
        if self.samples and config.scaling != "none":
            self.scale = (RMSScale if config.scaling == "rms" else TanhScale)(self.target_rms)
        if config.reconstruction > 0:
            self.reconstruct = nn.Linear(target, source)
        if config.bag_of_words > 0:
            self.name_words = nn.Linear(target, vocabulary)

    @property
    def samples(self) -> bool:
        """Tells whether training samples soft tokens: a diffusion transformer alone can train without them."""
        config = self.config
        others = (
            config.lm, config.anchor, config.info_nce, config.reconstruction, config.bag_of_words,
            config.batch_diversity, config.variance_diversity,
        )  # fmt: skip
        return config.bridge != "dit" or any(weight > 0 for weight in others)

    def forward(self, states: Tensor, mask: Tensor, generator: torch.Generator | None = None) -> BridgeOutput:
        """Maps ``states [B, T, d_s]``, ``mask [B, T]`` bool, to a message; ``generator``: of the diffusion's noise."""
        states = self.normalizer(_kept(states, mask))
        config = self.config
        if self.dit is not None:
            hidden: Tensor = self.dit.sample(states, mask, steps=config.dit_steps, generator=generator)
        else:
            hidden = self.resampler(states, mask)
        codes, indices, loss = hidden, None, hidden.new_zeros(())
        if config.bridge == "vq":
            quantized = self.quantizer(hidden)
            hidden, indices, loss = quantized.quantized, quantized.indices, quantized.loss
        elif config.bridge == "fsq":
            codes, indices = self.quantizer(self.down(hidden))
            hidden = self.up(codes)
        return BridgeOutput(self.scale(hidden), hidden, codes, indices, loss)

    def flow_loss(
        self, states: Tensor, mask: Tensor, target: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Computes the rectified flow's loss towards the embeddings ``target [B, K, d]``."""
        if self.dit is None:
            raise ValueError(f"only a dit bridge has a flow loss, this one is {self.config.bridge}")
        return self.dit.loss(self.normalizer(_kept(states, mask)), mask, target, generator)

    def calibrate(self, batches: Iterable[tuple[Tensor, Tensor]], target_embeddings: Tensor) -> None:
        """Measures the statistics of the source (states and mask per batch) and of the receiver's embeddings."""
        if isinstance(self.normalizer, StatisticalNormalizer):
            self.normalizer.calibrate(batches, target_embeddings)

    def save_pretrained(self, folder: Path, pair: Mapping[str, Any]) -> None:
        """Writes the bridge alone, and the description ``pair`` of its models."""
        description = {
            "config": self.config.to_dict(),
            "dimensions": self.dimensions._asdict(),
            "target_rms": self.target_rms,
            **pair,
        }
        save_own(folder, self.state_dict(), WEIGHTS, description, DESCRIPTION)

    @classmethod
    def from_pretrained(cls, folder: Path, pair: Mapping[str, Any]) -> TelepathyBridge:
        """Loads what `save_pretrained` wrote.

        Raises:
            ValueError: files are missing or do not fit, or ``pair`` is not what the bridge was trained between.
        """
        stored, weights = read_own(folder, "bridge", WEIGHTS, DESCRIPTION)
        for role in ("sender", "receiver"):
            trained, given = stored[role], pair[role]
            if trained["fingerprint"] != given["fingerprint"]:
                raise ValueError(
                    f"this bridge was trained for the {role} {trained['name']} ({trained['fingerprint']}), "
                    f"got {given['name']} ({given['fingerprint']})"
                )
        config = read_config(TelepathyConfig, stored["config"], folder)
        bridge = cls(config, Dimensions(**stored["dimensions"]), stored["target_rms"])
        check_state(weights, bridge.state_dict(), folder)
        bridge.load_state_dict(weights)
        return bridge


def start_as_messages(resampler: PerceiverResampler) -> None:
    """Initializes the resampler so that the first messages depend on the texts.

    Normalized states are as small as the receiver's embeddings, so a usual bias is as large as what it is added to, and
    projections that keep a third of the variance leave little of the source beside the queries: messages then start
    out nearly the same for all texts (cosine 0.9; without the biases and with the variance kept 0.2) and stay so for
    hundreds of steps.
    """
    with torch.no_grad():
        for linear in (resampler.project, resampler.out):
            linear.bias.zero_()
        for name, weight in resampler.named_parameters():
            if "cross_attention" in name:
                weight.mul_(3**0.5)  # nn.Linear draws with variance 1 / (3 inputs)


def _kept(states: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.unsqueeze(-1), states, torch.zeros_like(states))
