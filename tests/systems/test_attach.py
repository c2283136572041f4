"""`attach()` of all systems: the same signature, the same kind of result, the same errors."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaModel

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


def test_the_layers_of_a_model_are_found_by_its_config() -> None:
    model = decoder()
    assert stack_of(model) is model.model and layers_of(model.model) is model.model.layers
    assert layers_of(encoder())[3].attention.self.query.in_features == 32
    with pytest.raises(ValueError, match="expected an encoder or a decoder of Hugging Face; got Linear"):
        layers_of(nn.Linear(2, 2))
