"""Language models on the shared loop and command line: blocks of text, runs, sweeps, tokens to a loss."""

from __future__ import annotations

import json
import math
import os
import signal
import time

import datasets
import pytest
import torch

from hyper_lm_tools import save_text
from training_tools import contents, finish, make_spec, read_metrics, run_xlayer, start_xlayer, train_run
from xlayer_systems.data.blocks import IGNORED, LanguageModelingData, encode_text
from xlayer_systems.data.corpus import Corpus, load_corpus
from xlayer_systems.data.text import TextCorpus, load_text, stdlib_text
from xlayer_systems.errors import UserError
from xlayer_systems.hf.tokenizer import train_tokenizer
from xlayer_systems.hyper_lm import HyperTransformer
from xlayer_systems.hyper_lm.report import format_speed_up, mean_curve, speed_up, tokens_to_reach
from xlayer_systems.training.directory import RunDirectory, flatten

TINY = {
    "hidden_size": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 300, "max_length": 16, "batch_size": 4,
    "max_steps": 12, "eval_every": 3, "eval_blocks": 8, "log_every": 2, "learning_rate": 3e-3,
}  # fmt: skip
TEXTS = ("def f(x):\n    return X_1 * 2\n", "a </s> is text, and so is ünïcode ﬁ\n\n\n", "def g(y):\n\treturn f(y)\n")


def settings(**changes: object) -> list[str]:
    return [part for key, value in {**TINY, **changes}.items() for part in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return save_text(tmp_path_factory.mktemp("text") / "code")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocabulary=280, max_length=16, keep_text=True)


# ---- text and blocks -------------------------------------------------------------------------------------------------


def test_tokens_give_the_text_back_byte_for_byte(tokenizer):
    for text, ids in zip(TEXTS, encode_text(tokenizer, TEXTS), strict=True):
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        assert not set(ids) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize("length", [4, 7, 16])
def test_blocks_predict_every_token_once(tokenizer, length):
    data = LanguageModelingData(TextCorpus("t", TEXTS, TEXTS[::-1], "x"), tokenizer, length)
    stream = [data.end_id]
    for ids in encode_text(tokenizer, TEXTS[::-1]):
        stream += [*ids, data.end_id]
    batch = data.collate(list(data.validation))
    predicted = batch["labels"] != IGNORED
    assert batch["labels"][predicted].tolist() == stream[1:]
    assert batch["input_ids"][predicted].tolist() == stream[:-1]
    train = data.collate(list(data.train))
    assert (train["labels"] != IGNORED).all() and train["input_ids"].shape[1] == length
    assert set(data.lengths()) == {length} and len(data.lengths()) == len(data.train)


def test_losses_are_counted_per_token_and_per_byte(tokenizer):
    data = LanguageModelingData(TextCorpus("t", TEXTS, TEXTS, "x"), tokenizer, 5)
    batch = data.collate(list(data.validation))

    class Output:
        token_loss = torch.full(batch["labels"].shape, 1.5) * (batch["labels"] != IGNORED)

    found = data.summarize(data.score(Output, batch).sum(0))
    size, count = sum(len(text.encode()) for text in TEXTS), int((batch["labels"] != IGNORED).sum())
    assert found["loss"] == pytest.approx(1.5) and found["perplexity"] == pytest.approx(math.exp(1.5))
    assert found["tokens"] == count
    assert found["bits_per_byte"] == pytest.approx(1.5 * count / math.log(2) / size)


def test_evaluation_may_use_evenly_spaced_blocks(tokenizer):
    corpus = TextCorpus("t", TEXTS, TEXTS * 5, "x")
    whole, some = (LanguageModelingData(corpus, tokenizer, 4, blocks) for blocks in (None, 6))
    assert len(some.validation) == 6 and some.whole_validation == len(whole.validation)
    positions = [len(whole.validation) * number // 6 for number in range(6)]
    assert torch.equal(some.validation, whole.validation[positions])
    assert some.fingerprint == whole.fingerprint


def test_other_text_or_another_tokenizer_is_other_data(tokenizer):
    other = train_tokenizer(TEXTS, vocabulary=290, max_length=16, keep_text=True)
    prints = {
        LanguageModelingData(TextCorpus("t", TEXTS, TEXTS, hash), tok, 4).fingerprint
        for hash in ("x", "y")
        for tok in (tokenizer, other)
    }
    assert len(prints) == 4


def test_the_embedded_text_keeps_the_split_of_the_corpus():
    whole = load_corpus()
    corpus = Corpus(tuple(file for file in whole.files if file.package in ("logging", "http")), "small")
    text = stdlib_text(corpus)
    assert text.train == tuple(file.text for file in corpus.of("train")) and text.fingerprint == "small"
    assert text.validation == tuple(file.text for file in corpus.of("validation"))


def test_text_comes_from_files_and_hub_by_one_path(tmp_path, monkeypatch):
    rows = {"train": ["first\n", "", "second"], "validation": ["third"]}
    for folder in ("lines", "table", "saved", "many/deep"):
        (tmp_path / folder).mkdir(parents=True)
    for split, texts in rows.items():
        lines = [json.dumps({"text": text}) for text in texts]
        (tmp_path / "lines" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        datasets.Dataset.from_dict({"text": texts}).to_parquet(str(tmp_path / "table" / f"{split}.parquet"))
    hub = datasets.DatasetDict({split: datasets.Dataset.from_dict({"text": texts}) for split, texts in rows.items()})
    hub.save_to_disk(str(tmp_path / "saved"))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", _answering(datasets.load_dataset, hub, asked))
    names = ["wikitext/wikitext-2-raw-v1", "owner/name", "owner/name/subset"]
    for name in [str(tmp_path / "lines"), str(tmp_path / "table"), str(tmp_path / "saved"), *names]:
        found = load_text(name)
        assert (found.train, found.validation) == (("first\n", "second"), ("third",))
    assert asked == [("wikitext", "wikitext-2-raw-v1"), ("owner/name",), ("owner/name", "subset")]
    for index in range(40):
        (tmp_path / "many" / ("deep" * (index % 2)) / f"{index}.txt").write_text(f"text {index}")
    found = load_text(str(tmp_path / "many"))
    assert len(found.train) + len(found.validation) == 40 and 2 <= len(found.validation) <= 16
    assert not set(found.train) & set(found.validation)


def _answering(original, answer, asked):
    def load(*arguments, **options):
        if options:  # local files
            return original(*arguments, **options)
        asked.append(arguments)
        return answer

    return load


def test_text_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "train.txt").write_text("text")
    (tmp_path / "validation.txt").write_text("")
    with pytest.raises(UserError, match="expected text in both splits, found none in validation"):
        load_text(str(tmp_path))
    (tmp_path / "validation.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="is not text in UTF-8"):
        load_text(str(tmp_path))
    (tmp_path / "rows").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "rows" / f"{split}.jsonl").write_text('{"label": 1}\n')
    with pytest.raises(UserError, match="expected a column named text, content or sentence; found label"):
        load_text(str(tmp_path / "rows"))


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text):
    """Makes the run directory of a dhc model."""
    path = tmp_path_factory.mktemp("runs") / "run"
    overrides = {key: str(value) for key, value in TINY.items()}
    train_run(make_spec("hyper_lm", "dhc", dataset=str(text), overrides=overrides), path)
    return path


def test_a_run_evaluates_every_few_steps_and_logs_its_layers(finished):
    metrics = read_metrics(finished)
    evaluations = [record for record in metrics if record["event"] == "eval"]
    assert [record["step"] for record in evaluations] == [3, 6, 9, 12]
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]
    for record in evaluations:
        assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
        assert list(record["gradient_norms"]) == ["embedding", "0", "1", "norm"]
        assert all(value > 0 for value in record["gradient_norms"].values())
        assert list(record["usage"]["similarity"]) == ["0.mlp", "1.attention", "1.mlp"]
        assert all(-1 <= value <= 1 for value in record["usage"]["similarity"].values())
    names = {name for record in metrics for name, _ in flatten(record)}
    assert not [name for name in names if "second" in name or "time" in name]
    timings = [json.loads(line) for line in (finished / "timings.jsonl").read_text().splitlines()]
    assert [record["steps"] for record in timings] == [3, 3, 3, 3]
    files = contents(finished)
    assert files["plots/curves.png"][:4] == files["plots/usage.png"][:4] == b"\x89PNG"
    assert "| tokens |" in (finished / "report.md").read_text()
    assert RunDirectory(finished).result()["tokens_per_step"] == 64


def test_gradients_of_layers_are_those_before_clipping(text, tmp_path):
    norms = {}
    for clip in (1e-3, 1e3):
        overrides = {key: str(value) for key, value in {**TINY, "max_steps": 1, "clip": clip}.items()}
        train_run(make_spec("hyper_lm", "mhc", dataset=str(text), overrides=overrides), tmp_path / str(clip))
        norms[clip] = read_metrics(tmp_path / str(clip))[-1]["gradient_norms"]
    assert norms[1e-3] == pytest.approx(norms[1e3], rel=1e-3)
    assert sum(value**2 for value in norms[1e3].values()) ** 0.5 > 1e-3


@pytest.mark.parametrize("options", [{"gradient_checkpointing": "true"}, {"accumulate": "2"}], ids=str)
def test_however_it_is_computed_it_is_the_same_run(finished, text, tmp_path, options):
    overrides = {**{key: str(value) for key, value in TINY.items()}, **options}
    train_run(make_spec("hyper_lm", "dhc", dataset=str(text), overrides=overrides), tmp_path / "run")
    losses = [[r["loss"] for r in read_metrics(path)] for path in (finished, tmp_path / "run")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_mixed_precision_trains(text, tmp_path):
    overrides = {**{key: str(value) for key, value in TINY.items()}, "dtype": "bfloat16"}
    for kind in ("dhc", "mhc"):
        result = train_run(make_spec("hyper_lm", kind, dataset=str(text), overrides=overrides), tmp_path / kind)
        assert result["loss"] < 5.6


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(finished, text, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    arguments = ["train", "hyper_lm", "--residual", "dhc", "--dataset", text, *settings()]
    finish(start_xlayer(*arguments, "--run-dir", tmp_path / "two", launcher=launcher))
    one, two = (read_metrics(path) for path in (finished, tmp_path / "two"))
    assert [record["event"] for record in one] == [record["event"] for record in two] and one != two
    assert [record["loss"] for record in one] == pytest.approx([record["loss"] for record in two], rel=1e-4)
    for left, right in zip(one, two, strict=True):
        assert left.get("gradient_norms", {}) == pytest.approx(right.get("gradient_norms", {}), rel=1e-3)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(text, tmp_path):
    arguments = ["train", "hyper_lm", "--residual", "dhc", "--dataset", text]
    arguments += settings(max_steps=40, eval_every=7, checkpoint_every=5, log_every=2, dropout=0.1, epochs=3)
    undisturbed = start_xlayer(*arguments, "--run-dir", tmp_path / "undisturbed")
    killed = start_xlayer(*arguments, "--run-dir", tmp_path / "killed")
    deadline, metrics = time.monotonic() + 100, tmp_path / "killed" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 14:
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    finish(undisturbed)
    assert RunDirectory(tmp_path / "killed").result() is None
    finish(start_xlayer(*arguments, "--run-dir", tmp_path / "killed", "--resume"))
    for name in ("metrics.jsonl", "model/hyper_lm.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


# ---- the command line ------------------------------------------------------------------------------------------------


def test_train_and_eval_from_the_command_line(text, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    train = ["train", "hyper_lm", "--residual", "mhc", "--streams", "2", "--dataset", text, "--quick", *settings()]
    assert run_xlayer(monkeypatch, *train, "--run-dir", run) == 0
    assert "nats per token" in capsys.readouterr().out
    config = RunDirectory(run).read_config()["run"]
    assert (config["preset"], config["config"]["residual"], config["config"]["expansion_rate"]) == ("mhc", "mhc", 2)
    assert run_xlayer(monkeypatch, "eval", run) == 0
    assert "(all of validation)" in capsys.readouterr().out
    before = contents(run)
    assert run_xlayer(monkeypatch, *train, "--run-dir", run, "--resume") == 0
    assert contents(run) == before


def test_a_language_model_goes_on_with_a_prompt(finished, monkeypatch, capsys):
    texts = []
    for options in (
        ["--tokens", "6"],
        ["--tokens", "0"],
        *2 * [["--tokens", "6", "--temperature", "2", "--seed", "4"]],
    ):
        assert run_xlayer(monkeypatch, "eval", finished, "--prompt", "def Value", *options) == 0
        texts.append(capsys.readouterr().out.removesuffix("\n"))
    assert texts[1] == "def Value" and texts[2] == texts[3]
    assert texts[0].startswith("def Value") and len(texts[0]) > len("def Value")
    assert run_xlayer(monkeypatch, "eval", finished, "--prompt", "x", "--top-k", "0", "--temperature", "1") == 2
    assert capsys.readouterr().err == "error: top_k must be at least 1, got 0\n"


def test_a_sweep_compares_kinds_over_seeds(text, tmp_path, monkeypatch, capsys):
    out = tmp_path / "sweep"
    sweep = ["sweep", "hyper_lm", "--residual", "plain,shc:expansion_rate=2", "--seeds", "0,1", "--dataset", text]
    assert run_xlayer(monkeypatch, *sweep, *settings(), "--out", out) == 0
    printed = capsys.readouterr().out
    assert "Student's t over 2 seeds" in printed and "tokens to plain's loss" in printed
    results = json.loads((out / "results.json").read_text())
    plain, shc = results["rows"]
    assert [row["name"] for row in results["rows"]] == ["plain", "shc:expansion_rate=2"]
    assert plain["speed_up"] == 1.0 and plain["difference"]["mean"] == 0.0
    losses = [run["loss"] for run in results["runs"]["shc:expansion_rate=2"]]
    assert shc["loss"] == pytest.approx(sum(losses) / 2) and shc["low"] < shc["loss"] < shc["high"]
    plain_losses = [run["loss"] for run in results["runs"]["plain"]]
    expected = sum(a - b for a, b in zip(losses, plain_losses, strict=True)) / 2
    assert shc["difference"]["mean"] == pytest.approx(expected) and len(shc["speed_up_per_seed"]) == 2
    report = (out / "report.md").read_text()
    assert "Per seed: plain 1.00×, 1.00×" in report
    for picture in ("curves.png", "layers.png", "usage-plain.png", "usage-shc-expansion_rate_2.png"):
        assert (out / picture).read_bytes()[:4] == b"\x89PNG" and f"({picture})" in report
    before = contents(out / "shc-expansion_rate_2-seed1")
    assert run_xlayer(monkeypatch, *sweep, *settings(), "--out", out, "--resume") == 0
    assert contents(out / "shc-expansion_rate_2-seed1") == before and capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--residual", "highway"], "unknown residual kind 'highway'; expected one of plain, shc, dhc, mhc"),
        (["--backbone", "roberta-large"], "unknown size 'roberta-large'; expected one of tiny, small, base, large"),
        (["--set", "encoder_lr=1"], "unknown setting 'encoder_lr'; expected one of accumulate"),
        (["--set", "vocab_size=100"], "vocab_size must be at least 261 (every byte), got 100"),
        (["--set", "hidden_size=18"], "hidden_size must be a multiple of 2·num_heads"),
        (["--set", "coefficients=none"], "unknown coefficients 'none'; expected one of paper, per_stream"),
        (["--set", "eval_every=0"], "eval_every must be at least 1, got 0"),
        (["--streams", "0"], "expansion_rate must be at least 1, got 0"),
        (["--dataset", "no-such-data"], "cannot load data set 'no-such-data'"),
        (["--set", "batch_size=100000"], "batch_size 100000 is more than the"),
    ],
)
def test_bad_input_is_one_line(text, tmp_path, monkeypatch, capsys, arguments, message):
    run = tmp_path / "run"
    command = ["train", "hyper_lm", "--dataset", text, *settings(num_heads=2), *arguments, "--run-dir", run]
    assert run_xlayer(monkeypatch, *command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not run.exists()


def test_saved_runs_hold_a_model_that_loads_alone(finished):
    model = HyperTransformer.from_pretrained(finished / "model")
    assert model.config.residual == "dhc" and model.config.vocab_size <= 300
    assert model.generate(torch.tensor([[2]]), 3).shape[1] == 4


# ---- tokens to a loss ------------------------------------------------------------------------------------------------

PLAIN = [(100, 5.0), (200, 4.0), (300, 3.5), (400, 3.0)]


def test_tokens_to_reach_a_loss_by_hand():
    assert tokens_to_reach(PLAIN, 4.5) == 150
    assert tokens_to_reach(PLAIN, 4.0) == 200
    assert tokens_to_reach(PLAIN, 3.0) == 400
    assert tokens_to_reach(PLAIN, 2.9) is None
    assert tokens_to_reach(PLAIN, 6.0) == 100
    assert tokens_to_reach([(1, 5.0), (2, 3.0), (3, 4.0), (4, 2.0)], 3.5) == 1.75  # the first time


@pytest.mark.parametrize(
    ("curve", "text", "tokens"),
    [
        (PLAIN, "1.00×", 400),
        ([(100, 4.5), (200, 3.0), (300, 2.5), (400, 2.0)], "2.00×", 200),
        ([(100, 4.0), (200, 3.2), (300, 2.8), (400, 2.6)], "1.60×", 250),
        ([(100, 5.0), (200, 4.5), (300, 4.0), (400, 3.5)], "<1.00×", None),
        ([(100, 2.0), (200, 1.5), (300, 1.2), (400, 1.0)], ">4.00×", 100),
    ],
)
def test_speed_up_by_hand(curve, text, tokens):
    found = speed_up(curve, PLAIN)
    assert format_speed_up(found) == text
    assert found["tokens"] == (None if tokens is None else pytest.approx(tokens))


def test_the_mean_curve_is_taken_point_by_point():
    assert mean_curve([[(1, 2.0), (2, 1.0)], [(1, 4.0), (2, 2.0)]]) == [(1, 3.0), (2, 1.5)]
