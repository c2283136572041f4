"""`attach()` of all systems: the same signature, the same kind of result, the same errors."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from xlayer_systems import bypass, hyper_lm, lformer, xlrb
from xlayer_systems.bypass.config import BypassConfig
from xlayer_systems.hf.layers import layers_of, stack_of
from xlayer_systems.hf.pretrained import Attachment
from xlayer_systems.hyper_lm.attach import AttachConfig
from xlayer_systems.lformer.config import ModelConfig
from xlayer_systems.xlrb.config import XLRBConfig

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}


def encoder() -> Any:
    return RobertaModel(RobertaConfig(vocab_size=50, **SIZES))


def decoder() -> Any:
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **SIZES)).eval()


CASES: dict[str, tuple[Any, Callable[[], Any], type, str, dict[str, Any]]] = {
    "xlrb": (xlrb.attach, encoder, XLRBConfig, "H9", {"proj_dim": 4}),
    "hyper_lm": (hyper_lm.attach, decoder, AttachConfig, "mhc", {"expansion_rate": 2}),
    "bypass": (bypass.attach, decoder, BypassConfig, "offset", {"latent": 4}),
    "lformer": (lformer.attach, decoder, ModelConfig, "gru", {"side_size": 16}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_config_a_name_or_nothing_and_options(name: str) -> None:
    attach, make, kind, preset, options = CASES[name]
    parameters = [(p.name, p.kind, p.default) for p in inspect.signature(attach).parameters.values()]
    empty = inspect.Parameter.empty
    assert parameters == [
        ("model", inspect.Parameter.POSITIONAL_OR_KEYWORD, empty),
        ("config", inspect.Parameter.POSITIONAL_OR_KEYWORD, None),
        ("options", inspect.Parameter.VAR_KEYWORD, empty),
    ]
    model = make()
    named = attach(model, preset, **options)
    assert isinstance(named, Attachment) and isinstance(named.config, kind)
    named.remove()
    given = attach(model, named.config)
    assert given.config == named.config
    given.remove()
    plain = attach(make())
    assert plain.config == kind()
    plain.remove()
    key, value = next(iter(options.items()))
    changed = attach(make(), named.config, **{key: 2 * value})
    assert changed.config == dataclasses.replace(named.config, **{key: 2 * value})


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_a_value_error(name: str) -> None:
    attach, make, _, _, options = CASES[name]
    key = next(iter(options))
    for call, message in (
        (lambda: attach(nn.Linear(2, 2)), "Linear"),
        (lambda: attach(make(), colour="red"), "attach has no option colour; expected some of "),
        (lambda: attach(make(), "no such name"), "no such name"),
        (lambda: attach(make(), **{key: 0}), f"{key} must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert type(caught.value) is ValueError and "\n" not in str(caught.value)
    model = make()
    attach(model)
    with pytest.raises(ValueError, match="already"):
        attach(model)


# ---- files -----------------------------------------------------------------------------------------------------------

SYSTEMS: dict[str, Any] = {"xlrb": xlrb, "hyper_lm": hyper_lm, "bypass": bypass, "lformer": lformer}
TOKENS = torch.arange(1, 13).view(2, 6)


def drawn(name: str, handle: Any) -> Any:
    """Draws the parameters of what was attached, not those of an L-Former's base."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in handle.named_parameters():
            if not (name == "lformer" and key.startswith("base.")):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return handle.eval()


@torch.no_grad()
def computed(name: str, model: Any, handle: Any) -> Any:
    if name == "lformer":
        return handle(TOKENS).states
    return model.eval()(TOKENS)[0]


@pytest.mark.parametrize("name", CASES)
def test_saved_with_the_model_and_loaded(name: str, tmp_path: Path) -> None:
    attach, make, _, preset, options = CASES[name]
    model = make()
    handle = drawn(name, attach(model, preset, **options))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle.save(tmp_path, include_model=True)
    again = type(model).from_pretrained(tmp_path)
    assert {key for key, _ in again.named_parameters()} == {key for key, _ in make().named_parameters()}
    loaded = SYSTEMS[name].load(again, tmp_path)
    assert type(loaded) is type(handle) and loaded.config == handle.config
    assert torch.equal(computed(name, again, loaded.eval()), computed(name, model, handle))
    assert (inspect.signature(SYSTEMS[name].load).parameters.keys()) == {"model", "folder"}
    with pytest.raises(ValueError, match="missing"):
        SYSTEMS[name].load(make(), tmp_path / "nowhere")


@pytest.mark.parametrize("name", CASES)
def test_saving_the_model_alone_warns(name: str, tmp_path: Path) -> None:
    attach, make, *_ = CASES[name]
    model = make()
    handle = attach(model)
    told = f"from_pretrained will not restore the {handle.part} attached to this model"
    for saved in (model, model.base_model, copy.deepcopy(model)):
        with pytest.warns(UserWarning, match=told) as caught:
            saved.save_pretrained(tmp_path / "alone")
        (warning,) = caught
        assert "\n" not in str(warning.message) and warning.filename == __file__
        assert "save(folder, include_model=True)" in str(warning.message) and "load(model" in str(warning.message)
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "alone")
    assert pickle.loads(pickle.dumps(model)).save_pretrained.__func__ is type(model).save_pretrained


def test_a_copy_saves_itself(tmp_path: Path) -> None:
    model = decoder()
    hyper_lm.attach(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.fill_(2.0)
    with pytest.warns(UserWarning, match="hyper-connections"):
        other.save_pretrained(tmp_path)
    assert (LlamaForCausalLM.from_pretrained(tmp_path).lm_head.weight == 2).all()


def test_two_systems_on_one_model_are_both_named(tmp_path: Path) -> None:
    model = decoder()
    handles = hyper_lm.attach(model), lformer.attach(model)
    with pytest.warns(UserWarning, match="the hyper-connections and side path attached"):
        model.save_pretrained(tmp_path)
    handles[0].remove()
    with pytest.warns(UserWarning, match="restore the side path attached"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_trainable_parameters_are_printed_as_peft_does(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    attach, make, *_ = CASES[name]
    model = make()
    base = set(model.parameters())
    handle = attach(model)
    every = base | set(handle.parameters())
    total = sum(parameter.numel() for parameter in every)
    trainable = total - sum(parameter.numel() for parameter in every if not parameter.requires_grad)
    assert handle.get_nb_trainable_parameters() == (trainable, total) and trainable > 0
    assert (trainable < total) == (name in ("bypass", "lformer"))  # which freeze the model
    handle.print_trainable_parameters()
    share = f"{100 * trainable / total:.4f}"
    told = f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share}\n"
    assert capsys.readouterr().out == told


# ---- models ----------------------------------------------------------------------------------------------------------


def test_a_model_with_a_head_is_taken_by_its_encoder() -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **SIZES)).eval()
    before = model(TOKENS).logits
    bridge = drawn("xlrb", xlrb.attach(model, "H9"))
    assert not torch.allclose(model(TOKENS).logits, before)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)
    bridge.remove()
    assert torch.equal(model(TOKENS).logits, before)
    xlrb.attach(model, "H21")  # which compares two sentences
    assert model(TOKENS, segment_ids=segments).logits.shape == (2, 3)
    with pytest.raises(ValueError, match="already"):
        xlrb.attach(model.bert)


def test_the_layers_of_a_model_are_found_by_its_config() -> None:
    model = decoder()
    assert stack_of(model) is model.model and layers_of(model.model) is model.model.layers
    assert layers_of(encoder())[3].attention.self.query.in_features == 32
    with pytest.raises(ValueError, match="expected an encoder or a decoder of Hugging Face; got Linear"):
        layers_of(nn.Linear(2, 2))
