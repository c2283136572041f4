"""Pretraining of the two small decoders, sender and receiver, on the corpus's training files.

Next-token prediction by Llama decoders (Touvron et al., 2023) with tied embeddings. The two differ in what two language
models from different makers differ in: tokenizer, vocabulary and width. Beside the
source files they read every docstring once after and once before the path of its file, so that they know docstrings as
texts of their own, and which package says what.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlayer_systems.data.blocks import IGNORED, LanguageModelingData, encode_text
from xlayer_systems.data.corpus import Corpus, SourceFile, load_corpus
from xlayer_systems.data.tasks import words
from xlayer_systems.data.text import TextCorpus
from xlayer_systems.errors import UserError
from xlayer_systems.hf.tokenizer import train_tokenizer
from xlayer_systems.reporting.plots import plot_losses
from xlayer_systems.training.directory import Record, RunDirectory, disk_errors, environment
from xlayer_systems.training.options import LanguageModelOptions, apply_overrides, check_seed, split_overrides
from xlayer_systems.training.trainer import Trainer, make_accelerator, seed_everything

PRETRAINING = LanguageModelOptions(
    batch_size=16, max_length=128, learning_rate=3e-3, warmup=0.05, eval_blocks=128, eval_every=200, max_steps=900
)
MIN_WORDS = 4
EMBEDDING_SCALE, PROJECTION_GAIN = 0.06, 0.8


@dataclass(frozen=True)
class DecoderShape:
    """Size of a small decoder; ``positions`` is the longest input in tokens."""

    vocabulary: int
    hidden_size: int
    feed_forward: int
    layers: int = 4
    heads: int = 4
    positions: int = 1024


SHAPES = {
    "sender": DecoderShape(vocabulary=4096, hidden_size=160, feed_forward=448),
    "receiver": DecoderShape(vocabulary=3072, hidden_size=128, feed_forward=352),
}


class DecoderOutput(NamedTuple):
    """``loss``: mean over the predicted tokens; ``token_loss``: ``[B, S]``, 0 where nothing is predicted (nats)."""

    loss: Tensor
    token_loss: Tensor


class DecoderModel(nn.Module):
    """A causal language model as the training loop calls it: labels are the next tokens already."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor, labels: Tensor) -> DecoderOutput:
        """``input_ids`` and ``labels`` ``[B, S]``."""
        logits = self.decoder(input_ids=input_ids, use_cache=False).logits.float()
        token_loss = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        return DecoderOutput(token_loss.sum() / (labels != IGNORED).sum().clamp(min=1), token_loss)


class DecoderData(LanguageModelingData):
    """Blocks in which every document stands between its own first and last special token.

    A receiver hears a message, then its first token, then answers and ends; both tokens must have been learned.
    """

    def _blocks(self, texts: Iterable[str], drop_last: bool) -> Tensor:
        first = self.tokenizer.bos_token_id
        ids = [id for row in encode_text(self.tokenizer, texts) for id in (first, *row, self.end_id)]
        missing = -(len(ids) - 1) % self.length
        if missing and not drop_last:
            ids += [IGNORED] * missing
        if len(ids) <= self.length:
            return torch.empty(0, self.length + 1, dtype=torch.int32)
        return torch.tensor(ids, dtype=torch.int32).unfold(0, self.length + 1, self.length)


def decoder_text(corpus: Corpus, seed: int) -> TextCorpus:
    """What the decoders read: source files and docstrings, in an order drawn from ``seed``."""
    splits = []
    for split in ("train", "validation"):
        documents = [text for file in corpus.of(split) for text in _documents(file)]
        random.Random(f"decoder/{split}/{seed}").shuffle(documents)
        splits.append(tuple(documents))
    return TextCorpus("stdlib-decoder", splits[0], splits[1], corpus.hash)


def make_decoder(shape: DecoderShape, tokenizer: Any) -> Any:
    """A Llama causal language model of this shape with fresh parameters.

    Projections start with variance 0.64 / inputs, those that write into the residual stream further divided by twice
    the number of layers: the usual fixed 0.02 is so little at this width that the first hundreds of steps are lost.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.positions,
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
                scale /= (2 * shape.layers) ** 0.5
            weight.normal_(0.0, scale)
    return decoder


def pretrain_decoder(
    out: Path,
    *,
    shape: str | DecoderShape = "sender",
    seed: int = 0,
    overrides: Mapping[str, str] | None = None,
    resume: bool = False,
    corpus: Corpus | None = None,
) -> Record:
    """Pretrain a small decoder in the run directory ``out`` and write it, in half precision, to ``out/decoder``.

    Args:
        out: a new directory, or with ``resume`` one of an interrupted run.
        shape: ``sender``, ``receiver`` or any other shape.
        seed: parameters, order of documents and blocks.
        overrides: settings of `LanguageModelOptions`, as text.
        resume: go on from the last checkpoint.
        corpus: the embedded one by default; only its training files reach tokenizer and parameters.

    Returns the last evaluation, on the validation files. Raises `UserError` for an unknown shape or setting and for a
    run directory that exists.
    """
    if isinstance(shape, str):
        if shape not in SHAPES:
            raise UserError(f"unknown shape {shape!r}; expected one of {', '.join(SHAPES)}")
        shape = SHAPES[shape]
    check_seed(seed)
    with disk_errors(out):
        if out.exists() and not resume:
            raise UserError(f"run directory {out} exists; choose another one, or continue it with --resume")
    split_overrides(overrides or {}, PRETRAINING)
    options = apply_overrides(PRETRAINING, overrides or {})
    if options.max_length > shape.positions:
        raise UserError(
            f"max_length must be at most the decoder's {shape.positions} positions, got {options.max_length}"
        )
    corpus = corpus or load_corpus()
    accelerator = make_accelerator(options)
    with disk_errors(out), RunDirectory(out, accelerator.is_main_process) as run:
        description = {
            "system": "decoder",
            "seed": seed,
            "shape": dataclasses.asdict(shape),
            "options": dataclasses.asdict(options),
        }
        surroundings = environment(corpus.hash)
        resume = resume and out.exists()
        if resume:
            run.check_resumable(description, surroundings)
            run.lock()
        accelerator.wait_for_everyone()
        text = decoder_text(corpus, seed)
        tokenizer = train_tokenizer(text.train, shape.vocabulary, shape.positions, keep_text=True)
        data: Any = DecoderData(text, tokenizer, options.max_length, options.eval_blocks)
        seed_everything(seed)
        model = DecoderModel(make_decoder(shape, tokenizer))
        trainer = Trainer(accelerator, model, _groups(model, options), data, options, run, seed, "pretraining")
        if resume:
            trainer.resume()
        else:
            run.create(description, surroundings)
        accelerator.wait_for_everyone()
        result = trainer.train()
        if accelerator.is_main_process:
            trained = accelerator.unwrap_model(trainer.model).decoder
            recipe = {"run": description, "environment": surroundings, "result": result}
            _save_decoder(trained, tokenizer, out / "decoder", recipe)
            curve = [(r["step"] * options.batch_size * options.max_length, r["loss"]) for r in _evaluations(run)]
            plot_losses({"decoder": [curve]}, out / "plots" / "curves.png", None)
            run.write_json("result.json", result)
        return result


def _documents(file: SourceFile) -> list[str]:
    """The file's source, and each docstring of some length with the file's path before it and after it."""
    found = [file.text] if file.text else []
    for definition in file.definitions:
        if len(words(definition.docstring)) >= MIN_WORDS:
            found.append(f"{file.path}: {definition.docstring}")
            found.append(f"{definition.docstring}\n\n{file.path}")
    return found


def _groups(model: nn.Module, options: LanguageModelOptions) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": matrices, "lr": options.learning_rate, "weight_decay": options.weight_decay},
        {"params": others, "lr": options.learning_rate, "weight_decay": 0.0},
    ]


def _evaluations(run: RunDirectory) -> list[Record]:
    return [record for record in run.metrics() if record["event"] == "eval"]


def _save_decoder(decoder: Any, tokenizer: Any, folder: Path, recipe: Record) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    decoder.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
