"""Files that the version before a renaming wrote, kept in ``earlier_names``: they load under the present names.

``<system>/`` holds the config.json and run.yaml of a run, ``models/<system>/`` what a saved model left. The options
that were renamed have values other than their defaults in them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaModel

import bypass_tools
import lformer_tools
import telepathy_tools
import xlayer_systems
from hyper_lm_tools import save_text
from training_tools import contents, evaluate_run, read_metrics, run_xlayer, save_backbone, save_rte
from xlayer_systems import bypass
from xlayer_systems.cli.runs import run_of
from xlayer_systems.data.corpus import Corpus, load_corpus
from xlayer_systems.errors import UserError
from xlayer_systems.hyper_lm import HyperTransformer
from xlayer_systems.hyper_lm.attach import AttachConfig, HyperAttachment
from xlayer_systems.hyper_lm.config import HyperLMConfig
from xlayer_systems.lformer import LFormer, ModelConfig
from xlayer_systems.pretraining.decoder import DecoderPretraining, DecoderShape
from xlayer_systems.pretraining.encoder import EncoderConfig, EncoderPretraining
from xlayer_systems.registry import get_system
from xlayer_systems.runs.execute import train_run
from xlayer_systems.runs.system import System
from xlayer_systems.telepathy import TelepathyConfig
from xlayer_systems.telepathy.bridge import TelepathyBridge
from xlayer_systems.training.directory import RunDirectory
from xlayer_systems.training.options import earlier_names, with_current_names
from xlayer_systems.xlrb import XLRBClassifier, XLRBConfig

KEPT = Path(__file__).parent / "earlier_names"
CONFIGS = {
    "xlrb": XLRBConfig,
    "hyper_lm": HyperLMConfig,
    "hyper_attachment": AttachConfig,
    "lformer": ModelConfig,
    "telepathy": TelepathyConfig,
    "encoder": EncoderConfig,
    "decoder": DecoderShape,
}
RUNS = ("xlrb", "hyper_lm", "bypass", "lformer", "telepathy", "encoder", "decoder")
# What the options that were renamed have in the kept files, by their present names.
VALUES: dict[str, dict[str, Any]] = {
    "xlrb": {"top_k": 2, "route_pooling": "cls", "attn_mask": "cross"},
    "hyper_lm": {"intermediate_size": 24},
    "bypass": {"latent": 6, "layers": (0, 2)},
    "lformer": {
        "hidden_size": 24, "num_layers": 4, "num_heads": 2, "intermediate_size": 32, "side_size": 8,
        "aggregator_heads": 2, "window": 3, "num_tools": 6, "num_steps": 7,
    },
    "telepathy": {"num_layers": 1, "num_heads": 2, "hidden_size": 12, "threshold_ema_dead_code": 0.5},
    "encoder": {
        "vocab_size": 400, "num_layers": 2, "num_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64
    },
    "decoder": {
        "vocab_size": 400, "num_layers": 2, "num_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64
    },
}  # fmt: skip


def stored_run(name: str) -> dict[str, Any]:
    """``run`` of a kept config.json."""
    run: dict[str, Any] = json.loads((KEPT / name / "config.json").read_text())["run"]
    return run


@pytest.mark.parametrize("kind", CONFIGS.values(), ids=CONFIGS)
def test_earlier_names_are_of_fields_and_no_longer_fields(kind: Any) -> None:
    fields = {field.name for field in dataclasses.fields(kind)}
    assert earlier_names(kind) and set(earlier_names(kind).values()) <= fields and not set(earlier_names(kind)) & fields
    assert len(set(earlier_names(kind).values())) == len(earlier_names(kind))


def test_a_field_by_two_names_is_an_error_in_one_sentence() -> None:
    assert with_current_names(XLRBConfig, {"topk": 2, "proj_dim": 4}) == {"top_k": 2, "proj_dim": 4}
    with pytest.raises(
        ValueError, match=r"^top_k is given twice, also by its earlier name topk; expected one of them$"
    ):
        XLRBConfig.from_dict({"top_k": 2, "topk": 2})
    with pytest.raises(UserError, match=r"^top_k is given twice"):
        get_system("xlrb").make_spec(overrides={"topk": "2"}, config={"topk": "2", "top_k": "3"})


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_the_config_of_a_run_is_read(name: str) -> None:
    stored = stored_run(name)
    spec = get_system(name).read_spec(stored)
    assert {key: getattr(spec.config, key) for key in VALUES[name]} == VALUES[name]
    assert spec.options.max_steps == 2
    present = spec.to_dict()
    kind = type(spec.config)
    assert json.loads(json.dumps(present["config"])) == with_current_names(kind, stored["config"])
    assert not set(present["config"]) & set(earlier_names(kind))


@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("encoder", "decoder")])
def test_a_run_file_gives_the_run_of_its_config(name: str) -> None:
    given = ("system", "preset", "dataset", "backbone", "seed", "epochs", "quick", "run_dir", "resume")
    command = dict.fromkeys(given)
    _, spec, _ = run_of(command, {}, {}, KEPT / name / "run.yaml")
    expected = get_system(name).read_spec(stored_run(name))
    assert dataclasses.replace(spec, backbone_weights="") == dataclasses.replace(expected, backbone_weights="")


def test_the_command_line_takes_earlier_names_and_wins(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    file = KEPT / "xlrb" / "run.yaml"
    command = dict.fromkeys(("system", "preset", "dataset", "backbone", "seed", "epochs", "quick", "run_dir", "resume"))
    for overrides in ({"topk": "3"}, {"top_k": "3"}):
        assert run_of(command, {}, overrides, file)[1].config.top_k == 3
    content = yaml.safe_load(file.read_text())
    content["config"]["top_k"] = 3
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(content))
    assert run_xlayer(monkeypatch, "train", "--config", tmp_path / "both.yaml") == 2
    printed = capsys.readouterr().err
    assert printed == "error: top_k is given twice, also by its earlier name topk; expected one of them\n"


def small_corpus() -> Corpus:
    files = [file for file in load_corpus().files if file.package in ("logging", "http", "wsgiref")]
    return Corpus(tuple(files), "a small corpus")


def prepare_xlrb(patch: pytest.MonkeyPatch) -> System:
    save_backbone(Path("encoder"))
    save_rte(Path("rte"))
    return get_system("xlrb")


def prepare_hyper_lm(patch: pytest.MonkeyPatch) -> System:
    save_text(Path("text"))
    return get_system("hyper_lm")


def prepare_bypass(patch: pytest.MonkeyPatch) -> System:
    bypass_tools.save_decoder.__wrapped__(Path("bypass"))
    return get_system("bypass")


def prepare_lformer(patch: pytest.MonkeyPatch) -> System:
    lformer_tools.use_toy_task(patch)
    lformer_tools.save_base.__wrapped__(Path("lformer"))
    return get_system("lformer")


def prepare_telepathy(patch: pytest.MonkeyPatch) -> System:
    telepathy_tools.use_toy_task(patch)
    telepathy_tools.save_pair.__wrapped__(Path("telepathy"))
    return get_system("telepathy")


PREPARE: dict[str, Callable[[pytest.MonkeyPatch], System]] = {
    "xlrb": prepare_xlrb,
    "hyper_lm": prepare_hyper_lm,
    "bypass": prepare_bypass,
    "lformer": prepare_lformer,
    "telepathy": prepare_telepathy,
    "encoder": lambda patch: EncoderPretraining(small_corpus()),
    "decoder": lambda patch: DecoderPretraining(small_corpus()),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_directory_is_evaluated_and_resumed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory is of this version, on this machine's data, with the config.json that the other one wrote."""
    monkeypatch.chdir(tmp_path)
    system = PREPARE[name](monkeypatch)
    run, stored = tmp_path / "run", stored_run(name)
    stored["backbone_weights"] = system.fingerprint(stored["backbone"])
    spec = system.read_spec(stored)
    result = json.loads(json.dumps(train_run(system, spec, run)))
    written = json.loads((run / "config.json").read_text())
    translated = system.translate(stored, spec.config, spec.options)
    newer = {name: value for name, value in written["run"]["options"].items() if name not in translated["options"]}
    assert not any(newer.values())  # options that came later are off
    assert written["run"] == {**translated, "options": translated["options"] | newer}
    assert (written["run"] == stored) == (name == "bypass")  # which has no option of another name
    (run / "config.json").write_text(json.dumps({**written, "run": stored}))
    before = contents(run)
    assert train_run(system, spec, run, resume=True) == result
    if name in ("xlrb", "hyper_lm", "lformer", "telepathy"):
        metric = "loss" if name == "hyper_lm" else "accuracy"
        again = evaluate_run(run)[metric]
        assert math.isfinite(again) if name == "hyper_lm" else again == result[metric]  # hyper_lm: on more blocks
    assert contents(run) == before
    (run / "result.json").unlink()
    finished = json.loads(json.dumps(train_run(system, spec, run, resume=True)))  # from its last checkpoint
    times = {"seconds": 0, "total_seconds": 0}
    assert finished | times == result | times
    assert read_metrics(run) == [json.loads(line) for line in before["metrics.jsonl"].splitlines()]
    with pytest.raises(UserError, match="its seed is 3, this command's is 4"):
        train_run(system, dataclasses.replace(spec, seed=4), run, resume=True)


def test_a_run_directory_with_a_field_by_two_names_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = json.loads((KEPT / "hyper_lm" / "config.json").read_text())
    stored["run"]["config"]["intermediate_size"] = 24
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert run_xlayer(monkeypatch, "eval", tmp_path) == 2
    told = "intermediate_size is given twice, also by its earlier name feed_forward; expected one of them"
    assert capsys.readouterr().err == f"error: {told}\n"
    system = get_system("hyper_lm")
    spec = system.read_spec(stored_run("hyper_lm"))
    with pytest.raises(UserError, match=told):
        RunDirectory(tmp_path).check_resumable(
            spec.to_dict(), stored["environment"], lambda run: system.translate(run, spec.config, spec.options)
        )


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_the_recipe_beside_a_backbone_is_read(name: str) -> None:
    recipe = json.loads((KEPT / name / "recipe.json").read_text())
    spec = get_system(name).read_spec(recipe["run"])
    assert {key: getattr(spec.config, key) for key in VALUES[name]} == VALUES[name]


@pytest.mark.parametrize("asset", ["encoder-small", "decoder-sender", "decoder-receiver"])
def test_the_recipes_of_the_shipped_backbones_are_read(asset: str) -> None:
    folder = Path(xlayer_systems.__file__).parent / "assets" / asset
    stored = json.loads((folder / "recipe.json").read_text())["run"]
    config = get_system(asset.split("-")[0]).read_spec(stored).config
    shipped = json.loads((folder / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "intermediate_size")
    assert {name: getattr(config, name) for name in names} == {name: shipped[name] for name in names}
    assert (config.num_layers, config.num_heads) == (shipped["num_hidden_layers"], shipped["num_attention_heads"])


# ---- saved models ----------------------------------------------------------------------------------------------------


def tiny_llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=12, max_position_embeddings=32, **sizes, **ends)).eval()


def assert_holds(model: nn.Module, weights: Path, own: Callable[[], dict[str, Any]] | None = None) -> None:
    """Every tensor of the file is in the model, and no other."""
    stored, found = load_file(weights), (own or model.state_dict)()
    assert stored.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in stored.items())


def test_a_hyper_connected_model_loads() -> None:
    folder = KEPT / "models" / "hyper_lm"
    model = HyperTransformer.from_pretrained(folder)
    assert model.config.intermediate_size == 12 and model(torch.arange(6).view(1, 6)).shape == (1, 6, 12)
    assert_holds(model, folder / "hyper_lm.safetensors")


def test_hyper_connections_load_onto_their_decoder() -> None:
    folder = KEPT / "models" / "hyper_attachment"
    attached = HyperAttachment.from_pretrained(tiny_llama(), folder)
    assert attached.config.sinkhorn_iters == 3 and attached.layers[0].attention.sinkhorn_iters == 3
    assert_holds(attached, folder / "hyper_attachment.safetensors")


def test_an_lformer_loads(tmp_path: Path) -> None:
    folder = KEPT / "models" / "lformer"
    model = LFormer.from_pretrained(folder).eval()
    config = model.config
    assert (config.hidden_size, config.side_size, config.aggregator_heads, config.window) == (8, 4, 2, 1)
    assert model(torch.arange(6).view(1, 6)).logits_tools.shape == (1, 3)
    assert_holds(model, folder / "lformer.safetensors", model.own_state)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "lformer_config.json").read_text())["config"]
    assert written == dataclasses.asdict(config) and not set(written) & set(earlier_names(ModelConfig))


@pytest.mark.parametrize("kind", ["vq", "dit"])
def test_a_bridge_loads(kind: str) -> None:
    folder = KEPT / "models" / f"telepathy-{kind}"
    pair = {role: {"name": role, "fingerprint": role} for role in ("sender", "receiver")}
    bridge = TelepathyBridge.from_pretrained(folder, pair)
    assert (bridge.config.num_layers, bridge.config.num_heads, bridge.config.hidden_size) == (1, 2, 4)
    assert_holds(bridge, folder / "bridge.safetensors")


def test_a_bypass_loads() -> None:
    folder = KEPT / "models" / "bypass"
    made = bypass.Bypass.from_pretrained(tiny_llama(), folder)
    assert made.config.latent == 3 and made.config.layers == (0, 1)
    assert_holds(made, folder / "bypass.safetensors")


def test_a_classifier_loads(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12}
    encoder = RobertaModel(RobertaConfig(vocab_size=12, max_position_embeddings=16, **sizes))
    kept = KEPT / "models" / "xlrb" / "xlrb_config.json"
    config = XLRBConfig.from_dict(json.loads(kept.read_text())["config"])
    assert (config.top_k, config.route_pooling, config.attn_mask) == (2, "cls", "cross")
    model = XLRBClassifier(encoder, config, 2)
    model.save_pretrained(tmp_path)
    model.bridge.remove()
    written = json.loads((tmp_path / "xlrb_config.json").read_text())["config"]
    assert not set(written) & set(earlier_names(XLRBConfig))
    shutil.copy(kept, tmp_path)
    loaded = XLRBClassifier.from_pretrained(tmp_path, encoder, config)
    assert_holds(loaded, tmp_path / "xlrb.safetensors", lambda: _without_encoder(loaded))


def _without_encoder(model: nn.Module) -> dict[str, Any]:
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("encoder.")}
