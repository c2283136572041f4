"""The small decoders: pretraining end to end, what may be read, and models by name."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from training_tools import contents
from xlayer_systems.cli import make_app
from xlayer_systems.data.blocks import DecoderData
from xlayer_systems.data.corpus import Corpus, load_corpus
from xlayer_systems.errors import UserError
from xlayer_systems.hf import decoders
from xlayer_systems.hf.decoders import ASSETS, RECEIVER, SENDER, fingerprint_decoder, load_decoder
from xlayer_systems.hf.tokenizer import train_tokenizer
from xlayer_systems.pretraining import decoder as pretraining
from xlayer_systems.pretraining.decoder import DecoderShape, decoder_text, make_decoder
from xlayer_systems.runs.execute import train_run
from xlayer_systems.training.directory import RunDirectory
from xlayer_systems.training.options import with_current_names
from xlayer_systems.training.trainer import Trainer

SHAPE = DecoderShape(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, max_position_embeddings=64
)
SETTINGS = {
    "max_steps": "40", "batch_size": "8", "max_length": "32", "eval_blocks": "16", "eval_every": "20",
    "checkpoint_every": "10", "tensorboard": "false",
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus():
    files = [file for file in load_corpus().files if file.package in ("logging", "wsgiref")]
    assert {file.split for file in files} == {"train", "validation"}
    return Corpus(tuple(files), "a small corpus")


def pretrain(
    out: Path, corpus: Corpus, *, seed: int = 0, resume: bool = False, overrides: dict[str, str] | None = None
):
    """Runs the pretraining of the decoder of `SHAPE`."""
    system = pretraining.DecoderPretraining(corpus)
    spec = system.make_spec(seed=seed, overrides=overrides or SETTINGS)
    return train_run(system, dataclasses.replace(spec, config=SHAPE), out, resume)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, corpus):
    out = tmp_path_factory.mktemp("pretrain") / "run"
    pretrain(out, corpus)
    return out


def test_pretraining_learns_and_leaves_a_decoder(pretrained):
    losses = [record["loss"] for record in RunDirectory(pretrained).metrics() if record["event"] == "eval"]
    assert losses[-1] < losses[0] and losses[-1] < 5.4  # the logarithm of the vocabulary is 5.7
    model, tokenizer = load_decoder(str(pretrained / "decoder"))
    assert model.config.model_type == "llama" and len(tokenizer) == SHAPE.vocab_size
    recipe = json.loads((pretrained / "decoder" / "recipe.json").read_text())
    assert recipe["run"]["config"] == dataclasses.asdict(SHAPE) and recipe["result"]["loss"] == losses[-1]
    assert (pretrained / "plots" / "curves.png").exists()


def test_an_interrupted_run_ends_in_the_same_weights(pretrained, corpus, tmp_path, monkeypatch):
    out = tmp_path / "run"
    step = Trainer._step

    def interrupt(self, batch, watch=False):
        if self.progress.step == 25:
            raise KeyboardInterrupt
        return step(self, batch, watch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_step", interrupt)
        pretrain(out, corpus)
    assert not (out / "decoder").exists()
    pretrain(out, corpus, resume=True)
    assert fingerprint_decoder(str(out / "decoder")) == fingerprint_decoder(str(pretrained / "decoder"))


def test_pretraining_overwrites_nothing(pretrained, corpus):
    before = contents(pretrained)
    for seed, resume, message in ((0, False, "exists"), (1, True, "its seed is 0, this command's is 1")):
        with pytest.raises(UserError, match=message):
            pretrain(pretrained, corpus, seed=seed, resume=resume)
    assert contents(pretrained) == before


def test_validation_files_reach_neither_tokenizer_nor_training(corpus, tmp_path, monkeypatch):
    mark = "ʘʘʘ validation only ʘʘʘ"
    files = [
        dataclasses.replace(f, text=f'"""{mark} {mark}."""\n') if f.split == "validation" else f for f in corpus.files
    ]
    marked = Corpus(tuple(files), "marked")
    read: list[str] = []
    made: list[DecoderData] = []
    data = pretraining.DecoderData

    def recorded(texts, *args, **options):
        read.extend(texts)
        return train_tokenizer(read, *args, **options)

    def kept(*args):
        made.append(data(*args))
        return made[-1]

    monkeypatch.setattr(pretraining, "train_tokenizer", recorded)
    monkeypatch.setattr(pretraining, "DecoderData", kept)
    settings = SETTINGS | {"max_steps": "1"}
    pretrain(tmp_path / "run", marked, overrides=settings)
    assert read and not any("ʘ" in text for text in read)
    tokenizer, blocks = made[0].tokenizer, made[0]
    assert "ʘ" not in tokenizer.decode(blocks.train.flatten().tolist())
    assert "ʘ" in tokenizer.decode(blocks.validation[blocks.validation >= 0].tolist())


def test_documents_have_a_first_and_a_last_token(corpus):
    text = decoder_text(corpus, 0)
    tokenizer = train_tokenizer(text.train, SHAPE.vocab_size, 64, keep_text=True)
    data = DecoderData(text, tokenizer, 32)
    ids = torch.cat([data.train[:, :-1].flatten(), data.train[-1, -1:]])
    assert ids[0] == tokenizer.bos_token_id
    starts = (ids == tokenizer.bos_token_id).nonzero().flatten()[1:]
    assert len(starts) > 50 and (ids[starts - 1] == tokenizer.eos_token_id).all()
    assert decoder_text(corpus, 0) == text and decoder_text(corpus, 1) != text


def test_a_fresh_decoder_predicts_nearly_evenly(corpus):
    torch.manual_seed(0)
    tokenizer = train_tokenizer(decoder_text(corpus, 0).train, SHAPE.vocab_size, 64, keep_text=True)
    ids = torch.randint(5, SHAPE.vocab_size, (8, 32))
    loss = make_decoder(SHAPE, tokenizer)(input_ids=ids, labels=ids).loss
    assert abs(loss.item() - math.log(SHAPE.vocab_size)) < 0.3


def test_the_command_refuses_an_unknown_shape(tmp_path):
    result = CliRunner().invoke(make_app(), ["pretrain", "decoder", str(tmp_path / "x"), "--shape", "huge"])
    assert isinstance(result.exception, UserError)
    assert str(result.exception) == "unknown shape 'huge'; expected one of sender, receiver"
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", [SENDER, RECEIVER])
def test_the_shipped_decoders_are_small_frozen_and_whole(name):
    assert sum(path.stat().st_size for path in (ASSETS / name).iterdir()) <= 6e6
    model, tokenizer = load_decoder(name)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    ids = (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert len(set(ids)) == 3 and None not in ids
    assert model.config.max_position_embeddings >= 512
    text = '    def f(self):\n        """Return the Naïve value."""\n'
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    recipe = json.loads((ASSETS / name / "recipe.json").read_text())
    shape = with_current_names(pretraining.DecoderShape, recipe["run"]["shape"])
    assert shape == dataclasses.asdict(pretraining.SHAPES[name.removeprefix("decoder-")])
    assert fingerprint_decoder(name) == fingerprint_decoder(str(ASSETS / name)) != name


def test_the_shipped_decoders_differ_and_know_english_from_noise():
    (sender, sender_tokenizer), (receiver, receiver_tokenizer) = load_decoder(SENDER), load_decoder(RECEIVER)
    assert sender.config.hidden_size != receiver.config.hidden_size
    assert len(sender_tokenizer) != len(receiver_tokenizer)
    text = "Return the number of bytes that were written to the file."
    for model, tokenizer in ((sender, sender_tokenizer), (receiver, receiver_tokenizer)):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]])
        shuffled = ids[:, [0, *(torch.randperm(ids.shape[1] - 1, generator=torch.Generator().manual_seed(0)) + 1)]]
        assert model(ids, labels=ids).loss + 1 < model(shuffled, labels=shuffled).loss


def test_a_tokenizer_without_padding_or_first_token_gets_the_last(pretrained, tmp_path):
    model, tokenizer = load_decoder(str(pretrained / "decoder"))
    tokenizer.pad_token = tokenizer.bos_token = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    _, loaded = load_decoder(str(tmp_path))
    assert loaded.pad_token_id == loaded.bos_token_id == loaded.eos_token_id == tokenizer.eos_token_id


def test_unknown_and_missing_decoders_are_refused_in_one_line(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="cannot load decoder 'no/such-model'; expected decoder-sender") as caught:
        load_decoder("no/such-model")
    assert "\n" not in str(caught.value)
    assert fingerprint_decoder("no/such-model") == "no/such-model"
    monkeypatch.setattr(decoders, "ASSETS", tmp_path)
    with pytest.raises(UserError, match="make it with `xlayer pretrain decoder`"):
        load_decoder(SENDER)
