"""Pretraining makes a backbone that loads by path; the shipped one is small, whole and never read validation files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from training_tools import contents
from xlayer_systems.data.corpus import Corpus, load_corpus
from xlayer_systems.errors import UserError
from xlayer_systems.hf.encoders import SMALL_FOLDER, load_backbone, load_tokenizer
from xlayer_systems.pretraining.encoder import IGNORED, EncoderConfig, EncoderPretraining, PretrainModel, make_encoder
from xlayer_systems.runs.execute import train_run
from xlayer_systems.training.directory import RunDirectory

SHAPE = EncoderConfig(
    vocab_size=400, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, max_position_embeddings=64
)
SETTINGS = {"epochs": "4", "batch_size": "16", "max_length": "32", "tensorboard": "false", "encoder_lr": "3e-3"}


@pytest.fixture(scope="module")
def corpus():
    whole = load_corpus()
    files = [file for file in whole.files if file.package in ("logging", "http", "wsgiref")]
    return Corpus(tuple(files), "a small corpus")


def pretrain(out: Path, corpus: Corpus, *, seed: int = 0, resume: bool = False):
    """Runs the pretraining of the encoder of `SHAPE`."""
    system = EncoderPretraining(corpus)
    spec = system.make_spec(seed=seed, overrides=SETTINGS)
    return train_run(system, dataclasses.replace(spec, config=SHAPE), out, resume)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, corpus):
    out = tmp_path_factory.mktemp("pretrain") / "run"
    pretrain(out, corpus)
    return out


def test_pretraining_learns_and_leaves_a_backbone(pretrained):
    metrics = [record for record in RunDirectory(pretrained).metrics() if record["event"] == "eval"]
    assert metrics[-1]["masked_loss"] < metrics[0]["masked_loss"]
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"] - 0.2
    encoder, tokenizer = load_backbone(str(pretrained / "encoder")), load_tokenizer(str(pretrained / "encoder"))
    assert next(encoder.parameters()).dtype == torch.float32
    ids = tokenizer("Return the logger.", return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.cls_token_id and encoder(ids).last_hidden_state.shape == (1, ids.shape[1], 32)
    recipe = json.loads((pretrained / "encoder" / "recipe.json").read_text())
    assert recipe["run"]["seed"] == 0 and recipe["environment"]["data_hash"] == "a small corpus"
    assert (pretrained / "plots" / "curves.png").exists()


def test_pretraining_overwrites_nothing(pretrained, corpus):
    before = contents(pretrained)
    for seed, resume, message in ((0, False, "exists"), (1, True, "its seed is 0, this command's is 1")):
        with pytest.raises(UserError, match=message):
            pretrain(pretrained, corpus, seed=seed, resume=resume)
    assert contents(pretrained) == before


def test_masking_hides_words_only_and_is_fixed_in_evaluation(pretrained):
    tokenizer = load_tokenizer(str(pretrained / "encoder"))
    encoder = make_encoder(SHAPE, tokenizer, dropout=0.0)
    frequencies = torch.zeros(SHAPE.vocab_size)
    model = PretrainModel(encoder, 5, tokenizer.mask_token_id, frequencies, contrast=1.0)
    ids = torch.randint(5, SHAPE.vocab_size, (64, 30))
    ids[:, 0], ids[:, -1] = tokenizer.cls_token_id, tokenizer.pad_token_id
    masked, targets = model._mask(ids)
    chosen = targets != IGNORED
    assert not chosen[:, 0].any() and not chosen[:, -1].any()
    assert torch.equal(masked[~chosen], ids[~chosen]) and torch.equal(targets[chosen], ids[chosen])
    assert 0.15 < chosen.float().mean() < 0.25
    assert 0.7 < (masked[chosen] == tokenizer.mask_token_id).float().mean() < 0.9
    model.eval()
    assert torch.equal(model._mask(ids)[0], model._mask(ids)[0])
    assert not torch.equal(model._mask(ids)[0], masked)


def test_the_first_token_of_a_fresh_encoder_tells_texts_apart():
    torch.manual_seed(0)
    encoder, tokenizer = load_backbone("small-scratch"), load_tokenizer("small-scratch")
    assert next(encoder.parameters()).dtype == torch.float32
    encoder.eval()
    texts = ["Return the event loop.", "Return the current event loop.", "Parse an email header into its parts."]
    with torch.no_grad():
        first, similar, other = (encoder(**tokenizer(t, return_tensors="pt")).last_hidden_state[0, 0] for t in texts)
    assert (first - similar).norm() < (first - other).norm()
    assert (first - other).norm() > 0.1 * first.norm()


def test_the_shipped_encoder_is_small_and_has_its_recipe():
    size = sum(path.stat().st_size for path in SMALL_FOLDER.iterdir())
    assert size <= 6 * 2**20
    recipe = json.loads((SMALL_FOLDER / "recipe.json").read_text())
    assert recipe["environment"]["python"].startswith("3.11.") and recipe["run"]["seed"] == 0
    encoder = load_backbone("small")
    assert all(parameter.isfinite().all() for parameter in encoder.parameters())
    assert sum(parameter.numel() for parameter in encoder.parameters()) < 2.0e6
