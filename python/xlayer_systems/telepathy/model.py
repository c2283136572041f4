"""The training form of a bridge: two frozen language models and the bridge between them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xlayer_ext.functional import losses
from xlayer_systems.data.blocks import IGNORED
from xlayer_systems.telepathy.bridge import DESCRIPTION, BridgeOutput, Dimensions, TelepathyBridge
from xlayer_systems.telepathy.config import TelepathyConfig
from xlayer_systems.telepathy.receiver import ReceiverInput, generate_answers, receiver_input, receiver_logits
from xlayer_systems.telepathy.usage import Messages
from xlayer_systems.training.model import TrainingModel

EVALUATION_NOISE = 0  # seed of the diffusion's noise in evaluation


@dataclass(frozen=True)
class Pair:
    """Holds two language models by name, loaded and frozen, each with its tokenizer and what identifies its weights."""

    sender_name: str
    receiver_name: str
    sender: Any
    sender_tokenizer: Any
    receiver: Any
    receiver_tokenizer: Any
    sender_fingerprint: str
    receiver_fingerprint: str

    @classmethod
    def load(cls, sender: str, receiver: str) -> Pair:
        """Loads a pair by the names that `load_decoder` knows."""
        from xlayer_systems.hf.decoders import fingerprint_decoder, load_decoder

        prints = fingerprint_decoder(sender), fingerprint_decoder(receiver)
        return cls(sender, receiver, *load_decoder(sender), *load_decoder(receiver), *prints)

    def describe(self) -> dict[str, dict[str, str]]:
        """Returns the description of the models that a saved bridge keeps."""
        return {
            "sender": {"name": self.sender_name, "fingerprint": self.sender_fingerprint},
            "receiver": {"name": self.receiver_name, "fingerprint": self.receiver_fingerprint},
        }

    @property
    def dimensions(self) -> Dimensions:
        """Returns widths and the sender's vocabulary."""
        widths = [model.get_input_embeddings().weight.shape for model in (self.sender, self.receiver)]
        return Dimensions(widths[0][1], widths[1][1], widths[0][0])

    def target_rms(self) -> float:
        """Returns the root mean square of the receiver's input embeddings."""
        return float(self.receiver.get_input_embeddings().weight.detach().double().square().mean().sqrt())


class TelepathyOutput(NamedTuple):
    """Holds ``loss``; its ``parts`` before weighting; in evaluation what the receiver ``generated`` per example."""

    loss: Tensor
    parts: dict[str, Tensor]
    generated: list[str] | None


class TelepathyModel(TrainingModel):
    """Joins sender, bridge and receiver. Only the bridge is a submodule: nothing else is trained or saved.

    Args:
        pair: the two models.
        bridge: what is trained.
        max_new_tokens: longest answer in evaluation.
    """

    def __init__(self, pair: Pair, bridge: TelepathyBridge, max_new_tokens: int = 8) -> None:
        super().__init__()
        for model in (pair.sender, pair.receiver):
            model.eval().requires_grad_(False)
        self.bridge = bridge
        self.pair, self.max_new_tokens = pair, max_new_tokens
        self.frozen = (pair.sender, pair.receiver)  # a tuple: no submodules, and train() leaves them in eval mode
        self.messages = Messages()

    @classmethod
    def build(cls, pair: Pair, config: TelepathyConfig, max_new_tokens: int = 8) -> TelepathyModel:
        """Returns a new bridge for the pair."""
        return cls(pair, TelepathyBridge(config, pair.dimensions, pair.target_rms()), max_new_tokens)

    @classmethod
    def from_pretrained(cls, folder: Path, pair: Pair) -> TelepathyModel:
        """Returns a saved bridge between ``pair``; models that it was not trained for raise `ValueError`."""
        bridge = TelepathyBridge.from_pretrained(folder, pair.describe())
        return cls(pair, bridge, json.loads((folder / DESCRIPTION).read_text())["max_new_tokens"])

    def save_pretrained(self, folder: Path) -> None:
        """Writes the bridge, and which models it is for."""
        self.bridge.save_pretrained(folder, {**self.pair.describe(), "max_new_tokens": self.max_new_tokens})

    @property
    def config(self) -> TelepathyConfig:
        """Returns the config of the bridge."""
        return self.bridge.config

    @property
    def layer(self) -> int:
        """Returns the index of the sender's hidden states that the bridge reads; 0 are the embeddings."""
        return self.config.layer(int(self.sender.config.num_hidden_layers))

    @property
    def sender(self) -> Any:
        """Returns the model that reads."""
        return self.frozen[0]

    @property
    def receiver(self) -> Any:
        """Returns the model that answers."""
        return self.frozen[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TelepathyModel:
        """Moves and casts the frozen models along."""
        for model in self.frozen:
            model._apply(fn)
        super()._apply(fn, recurse)
        return self

    @torch.no_grad()
    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns the sender's hidden states ``[B, T, d_s]`` at the configured layer; no logits are computed."""
        backbone, layer = self.sender.base_model, self.layer
        output = backbone(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, use_cache=False
        )
        states: Tensor = output.hidden_states[layer]
        return states

    def encode_message(self, input_ids: Tensor, attention_mask: Tensor) -> BridgeOutput:
        """Reads a text and makes the message; outside of training the diffusion's noise is the same every time."""
        states, mask = self.encode(input_ids, attention_mask), attention_mask.bool()
        output: BridgeOutput = self.bridge(states, mask, generator=self._generator())
        return output

    def answer(self, soft: Tensor) -> list[str]:
        """Generates the receiver's answers to messages ``[B, K, d]``."""
        given = self.receiver_input(soft, None)
        return generate_answers(self.receiver, self.pair.receiver_tokenizer, given, self.max_new_tokens)

    def receiver_input(self, soft: Tensor | None, answers: list[list[int]] | None) -> ReceiverInput:
        """Returns the receiver's input with this config's primer."""
        return receiver_input(
            self.receiver, self.pair.receiver_tokenizer, soft, primer=self.config.primer, answers=answers
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        target_ids: Tensor,
        answer_ids: Tensor,
        question_ids: Tensor,
        example: Tensor | None = None,
        states: Tensor | None = None,
    ) -> TelepathyOutput:
        """Computes the loss of a batch; in evaluation the answers too.

        Args:
            input_ids, attention_mask: ``[B, T]``, the text for the sender.
            target_ids: ``[B, A]``, the receiver's expected output, −100 behind its end.
            answer_ids: ``[B, C]`` and
            question_ids: ``[B, Q]``, answer and text in the receiver's tokens, −100 behind their end.
            example: of no use here; numbers of the examples, for scoring.
            states: ``[B, T, d_s]``, what `encode` gave for the texts, where that is known.
        """
        config = self.config
        states = self.encode(input_ids, attention_mask) if states is None else states
        mask = attention_mask.bool()
        noise = self._generator()
        anchor_ids = answer_ids if config.anchor_target == "answer" else question_ids
        parts: dict[str, Tensor] = {}
        sent: BridgeOutput | None = None
        if self.bridge.samples or not self.training:
            sent = self.bridge(states, mask, generator=noise)
            parts.update(self._message_losses(sent, states, mask, input_ids, anchor_ids))
            if config.lm > 0 or not self.training:
                parts["lm"] = self._lm_loss(sent.soft, target_ids)
        if self.bridge.dit is not None:
            parts["flow"] = self.bridge.flow_loss(states, mask, self._flow_target(anchor_ids), noise)
        weighted = [getattr(config, name) * part for name, part in parts.items() if name != "quantizer"]
        loss = torch.stack(weighted).sum() + parts.get("quantizer", 0.0)
        generated = None
        if not self.training and sent is not None:
            self.messages.add(sent)
            generated = self.answer(sent.soft)
        return TelepathyOutput(loss, {name: part.detach() for name, part in parts.items()}, generated)

    def usage(self, reset: bool = True) -> dict[str, Any]:
        """Returns the metrics of an evaluation's messages (`Messages.summary`)."""
        summary = self.messages.summary(self.config.codebook_size if self.config.bridge == "vq" else None)
        if reset:
            self.messages = Messages()
        return summary

    def gradient_groups(self) -> dict[str, list[nn.Parameter]]:
        """Returns the parameters by part of the bridge."""
        groups = {name: list(part.parameters()) for name, part in self.bridge.named_children()}
        return {name: parameters for name, parameters in groups.items() if parameters}

    def _lm_loss(self, soft: Tensor, target_ids: Tensor) -> Tensor:
        given = self.receiver_input(soft, [row[row != IGNORED].tolist() for row in target_ids])
        assert given.labels is not None
        last = target_ids.shape[1] + 2  # BOS, target, EOS
        logits, labels = receiver_logits(self.receiver, given, last), given.labels[:, -last:]
        config = self.config
        return losses.language_modeling_loss(logits, labels, first_k=config.first_k, first_weight=config.first_weight)

    def _message_losses(
        self, sent: BridgeOutput, states: Tensor, mask: Tensor, input_ids: Tensor, anchor_ids: Tensor
    ) -> dict[str, Tensor]:
        """Returns all losses that weigh and need no receiver."""
        config, parts = self.config, {}
        if sent.indices is not None:
            parts["quantizer"] = sent.loss
        if config.anchor > 0:
            kept = anchor_ids != IGNORED
            parts["anchor"] = losses.cosine_anchor_loss(sent.soft, self._embed(anchor_ids), kept)
        if config.info_nce > 0:
            parts["info_nce"] = losses.info_nce_loss(sent.soft)
        if config.reconstruction > 0:
            parts["reconstruction"] = losses.reconstruction_loss(self.bridge.reconstruct(sent.hidden), states, mask)
        if config.bag_of_words > 0:
            logits = self.bridge.name_words(sent.hidden.amax(1))
            parts["bag_of_words"] = losses.bag_of_words_loss(logits, input_ids, mask)
        if config.batch_diversity > 0:
            parts["batch_diversity"] = losses.batch_diversity_loss(sent.soft)
        if config.variance_diversity > 0:
            parts["variance_diversity"] = losses.variance_diversity_loss(sent.codes)
        return parts

    def _flow_target(self, ids: Tensor) -> Tensor:
        """Returns embeddings of the first K tokens ``[B, K, d]``; those that are missing are the end of the text."""
        count, end = self.config.soft_tokens, self.pair.receiver_tokenizer.eos_token_id
        cut = ids[:, :count]
        return self._embed(nn.functional.pad(cut, (0, count - cut.shape[1]), value=IGNORED), fill=end)

    def _embed(self, ids: Tensor, fill: int = 0) -> Tensor:
        embedded: Tensor = self.receiver.get_input_embeddings()(ids.masked_fill(ids == IGNORED, fill))
        return embedded

    def _generator(self) -> torch.Generator | None:
        if self.training or self.bridge.dit is None:
            return None
        device = next(self.bridge.parameters()).device
        return torch.Generator(device).manual_seed(EVALUATION_NOISE)
