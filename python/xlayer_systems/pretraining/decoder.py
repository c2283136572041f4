"""Pretraining of the two small decoders, sender and receiver, on the corpus's training files.

Next-token prediction by Llama decoders (Touvron et al., 2023) with tied embeddings. The two differ in what two language
models from different makers differ in: tokenizer, vocabulary and width. Beside the
source files they read every docstring once after and once before the path of its file, so that they know docstrings as
texts of their own, and which package says what.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xlayer_systems.data.blocks import DecoderData
from xlayer_systems.data.corpus import Corpus, SourceFile, load_corpus
from xlayer_systems.data.tasks import words
from xlayer_systems.data.text import TextCorpus
from xlayer_systems.errors import UserError
from xlayer_systems.hf.causal_lm import DecoderModel
from xlayer_systems.hf.decoders import load_decoder
from xlayer_systems.hf.tokenizer import train_tokenizer
from xlayer_systems.pretraining.backbones import BackbonePretraining, save_backbone, write_recipe
from xlayer_systems.reporting.plots import plot_losses
from xlayer_systems.reporting.tables import evaluations_of
from xlayer_systems.runs.spec import RunSpec
from xlayer_systems.training.directory import Record, RunDirectory
from xlayer_systems.training.optim import decay_groups
from xlayer_systems.training.options import LanguageModelOptions, check_fields, option, with_current_names

PRETRAINING = LanguageModelOptions(
    batch_size=16, max_length=128, learning_rate=3e-3, warmup=0.05, eval_blocks=128, eval_every=200, max_steps=900
)
MIN_WORDS = 4
EMBEDDING_SCALE, PROJECTION_GAIN = 0.06, 0.8


@dataclass(frozen=True)
class DecoderShape:
    """Defines a small decoder."""

    vocab_size: int = option(4096, "tokens of the vocabulary", minimum=1, earlier="vocabulary")
    hidden_size: int = option(160, "width", minimum=1)
    intermediate_size: int = option(448, "inner width", minimum=1, earlier="feed_forward")
    num_layers: int = option(4, "layers", minimum=1, earlier="layers")
    num_heads: int = option(4, "attention heads; must divide the width", minimum=1, earlier="heads")
    max_position_embeddings: int = option(1024, "tokens of the longest input", minimum=1, earlier="positions")

    def __post_init__(self) -> None:
        check_fields(self)


SHAPES = {
    "sender": DecoderShape(),
    "receiver": DecoderShape(vocab_size=3072, hidden_size=128, intermediate_size=352),
}


def decoder_text(corpus: Corpus, seed: int) -> TextCorpus:
    """Returns what the decoders read: source files and docstrings, in an order drawn from ``seed``."""
    splits = []
    for split in ("train", "validation"):
        documents = [text for file in corpus.of(split) for text in _documents(file)]
        random.Random(f"decoder/{split}/{seed}").shuffle(documents)
        splits.append(tuple(documents))
    return TextCorpus("stdlib-decoder", splits[0], splits[1], corpus.hash)


def make_decoder(shape: DecoderShape, tokenizer: Any) -> Any:
    """Returns a Llama causal language model of this shape with fresh parameters.

    Projections start with variance 0.64 / inputs, those that write into the residual stream further divided by twice
    the number of layers: the usual fixed 0.02 is so little at this width that the first hundreds of steps are lost.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        max_position_embeddings=shape.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    decoder = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            if weight.ndim < 2:
                continue
            scale = EMBEDDING_SCALE if "embed_tokens" in name else PROJECTION_GAIN * weight.shape[1] ** -0.5
            if "o_proj" in name or "down_proj" in name:
                scale /= (2 * shape.num_layers) ** 0.5
            weight.normal_(0.0, scale)
    return decoder


class DecoderPretraining(BackbonePretraining):
    """Pretrains a small decoder and keeps it, in half precision, in the folder decoder of the run directory."""

    name = "decoder"
    summary = "pretraining of a small decoder"
    preset_help = "sender or receiver: they differ in tokenizer and width"
    default_preset = "sender"
    model_folder = "decoder"

    def presets(self) -> Sequence[str]:
        return tuple(SHAPES)

    def config(self, preset: str, backbone: str) -> DecoderShape:
        if preset not in SHAPES:
            raise UserError(f"unknown shape {preset!r}; expected one of {', '.join(SHAPES)}")
        return SHAPES[preset]

    def options(self, preset: str, dataset: str, backbone: str, quick: bool) -> LanguageModelOptions:
        return PRETRAINING

    def upgrade(self, stored: Mapping[str, Any]) -> Mapping[str, Any]:
        """Translates the description of a run before pretraining was one like all others."""
        if "shape" not in stored:
            return stored
        shape = with_current_names(DecoderShape, stored["shape"])
        known = {name for name, found in SHAPES.items() if dataclasses.asdict(found) == shape}
        return self.upgraded(stored, known.pop() if known else self.default_preset, shape)

    def prepare(self, spec: RunSpec, whole: bool = False) -> DecoderData:
        options, shape = spec.options, spec.config
        if options.max_length > shape.max_position_embeddings:
            most = shape.max_position_embeddings
            raise UserError(f"max_length must be at most the decoder's {most} positions, got {options.max_length}")
        text = decoder_text(self.corpus or load_corpus(), spec.seed)
        tokenizer = train_tokenizer(text.train, shape.vocab_size, shape.max_position_embeddings, keep_text=True)
        data = DecoderData(text, tokenizer, options.max_length, None if whole else options.eval_blocks)
        data.fingerprint = text.fingerprint  # the tokenizer follows from text and config
        return data

    def build(
        self, backbone: Any, config: DecoderShape, data: DecoderData, options: LanguageModelOptions
    ) -> DecoderModel:
        return DecoderModel(make_decoder(config, data.tokenizer))

    def parameter_groups(self, model: nn.Module, options: LanguageModelOptions) -> list[dict[str, Any]]:
        return decay_groups(model.named_parameters(), options.learning_rate, options.weight_decay)

    def save(self, model: Any, data: DecoderData, folder: Path) -> None:
        save_backbone(model.decoder, data.tokenizer, folder)

    def load(self, folder: Path, backbone: Any) -> DecoderModel:
        return DecoderModel(load_decoder(str(folder))[0])

    def result(self, spec: RunSpec, data: DecoderData, metrics: Mapping[str, Any]) -> Record:
        return {name: metrics[name] for name in ("loss", "perplexity", "bits_per_byte")}

    def format(self, result: Mapping[str, Any]) -> str:
        return f"validation loss {result['loss']:.3f} nats per token, {result['bits_per_byte']:.3f} bits per byte"

    def report(self, spec: RunSpec, data: DecoderData, result: Mapping[str, Any], run: RunDirectory) -> list[str]:
        write_recipe(spec, data, result, run.path / self.model_folder)
        per_step = spec.options.batch_size * spec.options.max_length
        curve = [(r["step"] * per_step, r["loss"]) for r in evaluations_of(run.metrics())]
        plot_losses({"decoder": [curve]}, run.path / "plots" / "curves.png", None)
        return [self.format(result), "", "![curves](plots/curves.png)"]


def _documents(file: SourceFile) -> list[str]:
    """Returns the file's source, and each docstring of some length with the file's path before it and after it."""
    found = [file.text] if file.text else []
    for definition in file.definitions:
        if len(words(definition.docstring)) >= MIN_WORDS:
            found.append(f"{file.path}: {definition.docstring}")
            found.append(f"{definition.docstring}\n\n{file.path}")
    return found
