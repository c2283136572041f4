"""Pretraining of the small encoder on the corpus's training files.

Two objectives on pairs of passages (docstrings and function bodies) that belong together: masked-token prediction on
both (Devlin et al., 2019), and in-batch contrast between the pair's first tokens (van den Oord et al., 2018): the pair
must find each other among all passages of the batch. The second makes the first token a summary of the passage, which
is what a classification head reads.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlayer_systems.data.corpus import Corpus, SourceFile, load_corpus
from xlayer_systems.data.tasks import words
from xlayer_systems.errors import UserError
from xlayer_systems.hf.encoders import start_as_average
from xlayer_systems.hf.tokenizer import SPECIAL_TOKENS, train_tokenizer
from xlayer_systems.pretraining.backbones import BackbonePretraining, save_backbone, write_recipe
from xlayer_systems.reporting.plots import plot_curves
from xlayer_systems.runs.spec import RunSpec
from xlayer_systems.training.directory import Record, RunDirectory
from xlayer_systems.training.model import TrainingModel
from xlayer_systems.training.optim import decay_groups
from xlayer_systems.training.options import TrainOptions, check_fields, option

PRETRAINING = TrainOptions(
    epochs=3, batch_size=32, max_length=64, encoder_lr=1e-3, head_lr=1e-3, warmup=0.05, eval_batch_size=32
)
MIN_WORDS = 4
MIN_BODY_CHARACTERS = 40
IGNORED = -100
FIRST_SCALE, LARGEST_SCALE = 5.0, 50.0  # of similarities: the contrast's inverse temperature
FINE_TUNING_DROPOUT = 0.1


@dataclass(frozen=True)
class EncoderConfig:
    """Defines the small encoder (about 1.7 M parameters by default) and its objective."""

    vocab_size: int = option(5000, "tokens of the vocabulary", minimum=1, earlier="vocabulary")
    hidden_size: int = option(128, "width", minimum=1)
    num_layers: int = option(6, "layers", minimum=1, earlier="layers")
    num_heads: int = option(4, "attention heads; must divide the width", minimum=1, earlier="heads")
    intermediate_size: int = option(512, "inner width", minimum=1, earlier="feed_forward")
    max_position_embeddings: int = option(130, "tokens of the longest input", minimum=1, earlier="positions")
    contrast: float = option(1.0, "weight of the contrastive loss; 0 leaves masked tokens only", minimum=0)

    def __post_init__(self) -> None:
        check_fields(self)


class PretrainOutput(NamedTuple):
    """Holds ``loss`` and its two parts, as scalars; the parts per example ``[B]`` for evaluation."""

    loss: Tensor
    masked_loss: Tensor
    hits: Tensor


class Pair(NamedTuple):
    """Holds two passages that belong together, as token ids."""

    first: list[int]
    second: list[int]


class PassagePairs:
    """Pairs of passages from the corpus, in the form that the training loop asks for.

    A documented function gives (docstring, body); any other docstring or body is paired with another passage of
    its file, and so is one documented function in two: that a file's passages belong together is what topics are about.
    """

    def __init__(self, corpus: Corpus, tokenizer: Any, max_length: int, seed: int) -> None:
        generator = random.Random(f"pairs/{seed}")
        self.tokenizer, self.fingerprint = tokenizer, corpus.hash
        self.pad_id: int = tokenizer.pad_token_id
        self.train = self._pairs(corpus.of("train"), tokenizer, max_length, generator)
        self.validation = self._pairs(corpus.of("validation"), tokenizer, max_length, generator)
        # It is evaluated in this order, and within one file the contrast would be harder than in training.
        generator.shuffle(self.validation)

    def lengths(self) -> list[int]:
        """Returns the number of tokens of the longer passage of each training pair."""
        return [max(len(pair.first), len(pair.second)) for pair in self.train]

    def log_frequencies(self, vocabulary: int) -> Tensor:
        """Returns the logarithm of each token's share of the training passages (each token counted once more)."""
        counts = torch.ones(vocabulary)
        for pair in self.train:
            counts += torch.bincount(torch.tensor(pair.first + pair.second), minlength=vocabulary)
        return (counts / counts.sum()).log()

    def collate(self, examples: Sequence[Pair]) -> dict[str, Tensor]:
        """Returns ``input_ids`` and ``attention_mask`` ``[2 B, S]``: all first passages, then all second ones."""
        rows = [pair.first for pair in examples] + [pair.second for pair in examples]
        width = max(map(len, rows))
        return {
            "input_ids": torch.tensor([row + [self.pad_id] * (width - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        }

    def score(self, output: PretrainOutput, batch: dict[str, Tensor]) -> Tensor:
        """Returns for each pair: masked-token loss (the batch's mean), whether the pair found each other, 1."""
        ones = torch.ones_like(output.hits)
        return torch.stack([output.masked_loss * ones, output.hits, ones], dim=1).double()

    def summarize(self, sums: Tensor) -> dict[str, float | int]:
        """Returns the mean masked-token loss in nats, and how often the pair was found among a batch of passages."""
        return {"masked_loss": float(sums[0] / sums[2]), "pairs_found": float(sums[1] / sums[2])}

    def _pairs(
        self, files: Sequence[SourceFile], tokenizer: Any, max_length: int, generator: random.Random
    ) -> list[Pair]:
        texts = [pair for file in files for pair in _file_pairs(file, generator)]
        ids = [
            tokenizer([pair[side] for pair in texts], truncation=True, max_length=max_length)["input_ids"]
            for side in (0, 1)
        ]
        return [Pair(first, second) for first, second in zip(*ids, strict=True)]


class PretrainModel(TrainingModel):
    """Adds a head for masked tokens (tied to the embeddings) and the contrastive loss to an encoder.

    Args:
        encoder: a RoBERTa-like encoder.
        special_tokens: ids 0 to ``special_tokens - 1`` are never masked.
        mask_id: the id of the mask token.
        log_frequencies: natural logarithm of each token's share of the training text, ``[vocabulary]``.
        contrast: weight of the contrastive loss.
        mask_share: share of tokens to predict; of these 80 % are masked, 10 % random, 10 % kept.
    """

    def __init__(
        self,
        encoder: Any,
        special_tokens: int,
        mask_id: int,
        log_frequencies: Tensor,
        contrast: float,
        mask_share: float = 0.2,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.vocabulary: int = encoder.config.vocab_size
        self.embeddings: nn.Embedding = encoder.get_input_embeddings()
        self.special_tokens, self.mask_id = special_tokens, mask_id
        self.contrast, self.mask_share = contrast, mask_share
        hidden = encoder.config.hidden_size
        self.transform = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.LayerNorm(hidden))
        # Starting from the tokens' frequencies; learning these first would flatten everything else.
        self.bias = nn.Parameter(log_frequencies.clone())
        self.log_scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> PretrainOutput:
        """Computes the losses of a batch of pairs ``[2 B, S]``; in evaluation the mask is the same every time."""
        masked, targets = self._mask(input_ids)
        hidden = self.encoder(input_ids=masked, attention_mask=attention_mask).last_hidden_state
        chosen = targets != IGNORED
        logits = F.linear(self.transform(hidden[chosen]), self.embeddings.weight, self.bias)
        masked_loss = F.cross_entropy(logits, targets[chosen])
        # Centred: what all first tokens share does not tell which belong together, and without this they collapse.
        summary = hidden[:, 0].float()
        summary = F.normalize(summary - summary.mean(0), dim=-1)
        first, second = summary.chunk(2)
        similarity = self.log_scale.exp().clamp(max=LARGEST_SCALE) * first @ second.T
        own = torch.arange(len(first), device=first.device)
        contrast = (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2
        hits = (similarity.argmax(1) == own).double()
        return PretrainOutput(masked_loss + self.contrast * contrast, masked_loss.detach(), hits)

    def _mask(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        generator = None if self.training else torch.Generator(ids.device).manual_seed(0)

        def uniform() -> Tensor:
            return torch.rand(ids.shape, generator=generator, device=ids.device)

        chosen = (uniform() < self.mask_share) & (ids >= self.special_tokens)
        # At least one token per batch, or the mean over none would be NaN.
        chosen[0, 1] = True
        action = uniform()
        noise = torch.randint(self.special_tokens, self.vocabulary, ids.shape, generator=generator, device=ids.device)
        masked = torch.where(chosen & (action < 0.8), torch.full_like(ids, self.mask_id), ids)
        masked = torch.where(chosen & (action >= 0.9), noise, masked)
        return masked, torch.where(chosen, ids, torch.full_like(ids, IGNORED))


class EncoderPretraining(BackbonePretraining):
    """Pretrains the small encoder and keeps it, in half precision, in the folder encoder of the run directory."""

    name = "encoder"
    summary = "pretraining of the small encoder"
    preset_help = "small"
    default_preset = "small"
    model_folder = "encoder"

    def presets(self) -> Sequence[str]:
        return (self.default_preset,)

    def config(self, preset: str, backbone: str) -> EncoderConfig:
        if preset != self.default_preset:
            raise UserError(f"unknown shape {preset!r}; expected {self.default_preset}")
        return EncoderConfig()

    def options(self, preset: str, dataset: str, backbone: str, quick: bool) -> TrainOptions:
        return PRETRAINING

    def upgrade(self, stored: Mapping[str, Any]) -> Mapping[str, Any]:
        """Translates the description of a run before pretraining was one like all others."""
        if "shape" not in stored:
            return stored
        return self.upgraded(stored, self.default_preset, {**stored["shape"], "contrast": stored["contrast"]})

    def prepare(self, spec: RunSpec, whole: bool = False) -> PassagePairs:
        corpus, shape = self.corpus or load_corpus(), spec.config
        texts = (text for file in corpus.of("train") for pair in passages(file) for text in pair if text)
        tokenizer = train_tokenizer(texts, shape.vocab_size, shape.max_position_embeddings)
        return PassagePairs(corpus, tokenizer, spec.options.max_length, spec.seed)

    def build(self, backbone: Any, config: EncoderConfig, data: PassagePairs, options: TrainOptions) -> PretrainModel:
        tokenizer = data.tokenizer
        # A short pretraining underfits, so it goes without dropout; fine-tuning on far less text needs it.
        encoder = make_encoder(dataclasses.replace(config, vocab_size=len(tokenizer)), tokenizer, dropout=0.0)
        frequencies = data.log_frequencies(len(tokenizer))
        return PretrainModel(encoder, len(SPECIAL_TOKENS), tokenizer.mask_token_id, frequencies, config.contrast)

    def parameter_groups(self, model: nn.Module, options: TrainOptions) -> list[dict[str, Any]]:
        return decay_groups(model.named_parameters(), options.encoder_lr, options.weight_decay)

    def save(self, model: Any, data: PassagePairs, folder: Path) -> None:
        encoder = model.encoder
        encoder.config.hidden_dropout_prob = encoder.config.attention_probs_dropout_prob = FINE_TUNING_DROPOUT
        save_backbone(encoder, data.tokenizer, folder)

    def load(self, folder: Path, backbone: Any) -> nn.Module:
        raise UserError(f"{folder} holds an encoder without its pretraining heads; train a system on it")

    def result(self, spec: RunSpec, data: PassagePairs, metrics: Mapping[str, Any]) -> Record:
        return {name: metrics[name] for name in ("masked_loss", "pairs_found")}

    def format(self, result: Mapping[str, Any]) -> str:
        found = f"pairs found {100 * result['pairs_found']:.1f} %"
        return f"masked-token loss {result['masked_loss']:.3f} nats, {found}"

    def report(self, spec: RunSpec, data: PassagePairs, result: Mapping[str, Any], run: RunDirectory) -> list[str]:
        write_recipe(spec, data, result, run.path / self.model_folder)
        plot_curves({"encoder": [run.metrics()]}, run.path / "plots" / "curves.png", metric="masked_loss")
        return [self.format(result), "", "![curves](plots/curves.png)"]


def make_encoder(shape: EncoderConfig, tokenizer: Any, dropout: float) -> nn.Module:
    """Returns a RoBERTa encoder of this shape with fresh parameters."""
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=shape.max_position_embeddings + 2,
        type_vocab_size=1,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return start_as_average(RobertaModel(config, add_pooling_layer=False))


def passages(file: SourceFile) -> list[tuple[str, str]]:
    """Returns (docstring, body) of each definition, "" for one that is absent or too short to say anything."""
    found = []
    for definition in file.definitions:
        docstring = definition.docstring if len(words(definition.docstring)) >= MIN_WORDS else ""
        body = definition.body if len(definition.body) >= MIN_BODY_CHARACTERS else ""
        if docstring or body:
            found.append((docstring, body))
    return found


def _file_pairs(file: SourceFile, generator: random.Random) -> list[tuple[str, str]]:
    found = passages(file)
    everything = [text for pair in found for text in pair if text]
    pairs = []
    for docstring, body in found:
        own = docstring or body
        partner = generator.choice(everything)
        if docstring and body and (generator.random() < 0.5 or partner == own):
            partner = body
        if partner != own:
            pairs.append((own, partner))
    return pairs
