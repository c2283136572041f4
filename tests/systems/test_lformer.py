"""L-Former as a model: phases, blending without look ahead, heads, saving; attached to two architectures."""

from __future__ import annotations

import copy
import doctest
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from safetensors.torch import load_file
from torch import Tensor, nn

from lformer_tools import LAYERS, OPTIONS, WIDTH, make_base, make_model, tokens, toy_data
from xlayer_systems.lformer import AGGREGATORS, LFormer, ModelConfig, attach
from xlayer_systems.lformer.path import count

BASES = ("gpt2", "llama")
BLENDED: dict[str, dict[str, Any]] = {
    "ema": {},
    "tree": {"tree_checkpoint": 2},
    "every other": {"tap_every": 2},
    "gru": {"aggregator": "gru"},
    "attn": {"aggregator": "attn"},
    "sparse": {"gate_l1": 0.1, "gate_l2": 0.1},
}
TARGETS: dict[str, Tensor] = {
    "tools": torch.tensor([0, 3, 2]),
    "values": torch.tensor([1.0, -2.0, 5.0]),
    "plan": torch.tensor([[1, 2, -100], [0, 0, 3], [4, -100, -100]]),
}


def blended(base: str, name: str, **options: Any) -> LFormer:
    return make_model(base, blend_into_lm=True, plan_decoder=True, **BLENDED[name], **options)


def touched(model: LFormer) -> set[str]:
    """Names of the base's parameters that have a gradient."""
    return {name for name, p in model.base.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


def last_layers(model: LFormer, count: int) -> set[str]:
    """Names of the base's parameters in its last ``count`` layers."""
    numbers = [f".{LAYERS - 1 - index}." for index in range(count)]
    return {name for name, _ in model.base.named_parameters() if any(number in name for number in numbers)}


# ---- What it gives ---------------------------------------------------------------------------------------------------


def test_wrappers_can_take_the_output_apart() -> None:
    output = make_model("gpt2")(tokens(3, 9), **TARGETS)
    leaves, structure = pytree.tree_flatten(output)
    again = pytree.tree_unflatten(leaves, structure)
    assert type(again) is type(output) and list(again) == list(output)
    assert again.values is output.values and again.losses.keys() == output.losses.keys()


def test_a_model_of_its_own_gives_everything() -> None:
    model = LFormer(ModelConfig.tiny(plan_decoder=True))
    ids, labels = tokens(3, 10), tokens(3, 10, seed=5)
    output = model(ids, labels=labels, **TARGETS)
    shapes = {"logits_lm": (3, 10, 1000), "logits_tools": (3, 5), "values": (3,), "plan": (3, 8), "states": (1, 3, 32)}
    assert {name: tuple(output[name].shape) for name in shapes} == shapes
    losses = output["losses"]
    assert set(losses) == {"lm", "tool", "value", "plan"}
    torch.testing.assert_close(
        output.loss, losses["lm"] + losses["tool"] + losses["value"] + 0.2 * losses["plan"], rtol=1e-6, atol=0
    )
    torch.testing.assert_close(losses["lm"], F.cross_entropy(output.logits_lm.flatten(0, 1), labels.flatten()))
    torch.testing.assert_close(losses["tool"], F.cross_entropy(output.logits_tools, TARGETS["tools"]))
    assert set(model(ids).keys()) == {"losses", "logits_lm", "logits_tools", "values", "plan", "states"}
    assert model.eval()(ids).states.shape == (4, 3, 32)


def test_heads_and_logits_can_be_left_out() -> None:
    model = make_model(use_value_head=False)
    assert "values" not in model(tokens()) and "plan" not in model(tokens())
    assert "logits_lm" not in model(tokens(), logits=False)
    assert set(model(tokens(), reason=False).keys()) == {"losses", "logits_lm"}
    with_head = make_model(use_tool_head=False)(tokens(), tools=TARGETS["tools"])
    assert with_head.loss is None and "logits_tools" not in with_head


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("tap_every", "taps"), [(1, [1, 2, 3, 4]), (2, [2, 4]), (3, [1, 4]), (9, [4])])
def test_the_state_is_made_of_the_tapped_layers(base: str, tap_every: int, taps: list[int]) -> None:
    model = make_model(base, tap_every=tap_every, pooling="last")
    ids = tokens()
    hidden = model.base(ids, output_hidden_states=True).hidden_states
    expected = model.path.aggregator(model.path.projector([hidden[tap] for tap in taps]))
    assert torch.equal(model(ids).states, expected)
    assert "hidden_states" not in model.base(ids)


@pytest.mark.parametrize("options", [{}, {"sequence_wise": False}, {"blend_into_lm": True}])
def test_padding_does_not_reach_the_heads(options: dict[str, Any]) -> None:
    for pooling in ("mean", "first", "last", "attention"):
        model = make_model(pooling=pooling, plan_decoder=True, **options)
        ids = tokens(2, 7)
        padded, mask = F.pad(ids, (0, 3), value=1), torch.tensor([[1] * 7 + [0] * 3] * 2)
        wanted, found = model(ids), model(padded, mask)
        torch.testing.assert_close(found.logits_tools, wanted.logits_tools)
        torch.testing.assert_close(found.values, wanted.values)
        assert torch.equal(found.plan, wanted.plan)
        other = model(padded.masked_fill(mask == 0, 7), mask)
        assert torch.equal(other.logits_tools, found.logits_tools)


def test_values_are_standardized_inside() -> None:
    model = make_model()
    values = torch.tensor([100.0, 110.0, 120.0])
    model.heads.calibrate(values)
    output = model(tokens(), values=values)
    torch.testing.assert_close(output.losses["value"], ((output.values - values) / 10).square().mean())
    assert (output.values - 110).abs().max() < 40
    unknown = model(tokens(), values=torch.tensor([float("nan"), 110.0, float("nan")]))
    torch.testing.assert_close(unknown.losses["value"], ((output.values[1] - 110) / 10).square())
    nothing = model(tokens(), values=torch.full((3,), float("nan"))).losses["value"]
    assert nothing == 0 and torch.autograd.grad(nothing, model.heads.value.bias)[0] == 0


def test_plans_are_learned_word_by_word() -> None:
    torch.manual_seed(0)
    heads = make_model(plan_decoder=True, plan_length=4).heads
    decoder, state, plan = heads.plan, torch.randn(3, 8), TARGETS["plan"]
    logits = decoder(state, plan)
    assert logits.shape == (3, 4, 17)
    by_hand = []
    for row, steps in zip(logits, plan, strict=True):
        said = [*steps[steps >= 0].tolist(), decoder.end]
        by_hand.append(F.cross_entropy(row[: len(said)], torch.tensor(said)))
    torch.testing.assert_close(decoder.loss(state, plan), torch.stack(by_hand).mean())
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        decoder.loss(state, plan).backward()
        optimizer.step()
    assert torch.equal(decoder.decode(state), F.pad(plan, (0, 1), value=-100))


@pytest.mark.parametrize("like", AGGREGATORS[:3])
def test_the_baseline_has_as_many_parameters(like: str) -> None:
    side = make_model(aggregator=like, side_size=32)
    head = make_model(aggregator="head_only", equal_to=like, side_size=32)
    assert count(head.path) == pytest.approx(count(side.path), rel=0.02)
    ids = tokens()
    hidden = head.base(ids, output_hidden_states=True).hidden_states[-1]
    normed = F.layer_norm(hidden, (WIDTH,)).mean(1)
    width = normed @ head.path.projector.weight[0].T + head.path.projector.bias[0]
    torch.testing.assert_close(head(ids).states[0], head.path.mlp[1](F.gelu(width)))


def test_gates_are_penalized() -> None:
    model = make_model(gate_l1=0.5, gate_l2=0.25)
    loss = model(tokens(), tools=TARGETS["tools"]).losses["gates"]
    gate = torch.sigmoid(torch.tensor(-2.0))
    torch.testing.assert_close(loss, LAYERS * (0.5 * gate + 0.25 * gate**2))
    loss.backward()
    assert (model.path.aggregator.gate_logits.grad > 0).all()


# ---- Phases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", BLENDED)
def test_phase_a_gives_no_gradient_to_the_base(base: str, name: str) -> None:
    model = blended(base, name, last_k_unfreeze=2).train()
    assert model.phase == "a" and not model.base.training
    # Even while its layers are trainable, as the training loop leaves those that phase B will train.
    for is_trainable in (False, True):
        for name, parameter in model.base.named_parameters():
            parameter.requires_grad_(is_trainable and name in last_layers(model, LAYERS))
        model.zero_grad()
        model(tokens(), labels=tokens(seed=5), **TARGETS).loss.backward()
        assert not touched(model)
        own = {n: p for n, p in model.named_parameters() if not n.startswith("base.")}
        still = {n for n, p in own.items() if p.grad is None or not p.grad.abs().max() > 0}
        # The first state of attention is 0, and so is its query; all taps take part from the second on.
        assert not still, still


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("last_k", [0, 1, 3])
def test_phase_b_reaches_the_last_layers_alone(base: str, last_k: int) -> None:
    for blend in (False, True):
        model = make_model(base, blend_into_lm=blend, plan_decoder=True, last_k_unfreeze=last_k).set_phase("b").train()
        trainable = {name for name, p in model.base.named_parameters() if p.requires_grad}
        assert trainable == last_layers(model, last_k)
        model(tokens(), **TARGETS).loss.backward()  # no language-modelling loss: the side path's alone
        assert touched(model) <= trainable and len(touched(model)) >= 0.7 * len(trainable)


def test_jointly_trained_taps_are_detached_where_asked() -> None:
    for detach in (True, False):
        model = LFormer(ModelConfig.tiny(detach_taps=detach))
        assert model.phase == "joint"
        model(tokens(), **{name: TARGETS[name] for name in ("tools", "values")}).loss.backward()
        assert bool(touched(model)) != detach
        model.zero_grad()
        model(tokens(), labels=tokens(seed=5)).loss.backward()
        assert touched(model) == {name for name, _ in model.base.named_parameters()}


def test_phases_are_checked() -> None:
    with pytest.raises(ValueError, match="phase must be one of joint, a, b; got 'c'"):
        make_model().set_phase("c")


# ---- Blending --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", BLENDED)
def test_a_closed_gate_changes_no_bit(base: str, name: str) -> None:
    plain, ids = make_base(base), tokens()
    before = plain(ids).logits
    model = make_model(base, base=plain, moved=False, blend_into_lm=True, **BLENDED[name])
    assert torch.equal(model(ids).logits_lm, before)
    assert torch.equal(plain(ids).logits, before)
    model.blend_gate.data.fill_(0.8)
    assert (model(ids).logits_lm - before).abs().max() > 1e-2
    assert torch.equal(model(ids).logits_lm, plain(ids).logits)  # a call of the base itself blends the state in too
    assert torch.equal(model.remove()(ids).logits, before)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", [*BLENDED, "pooled", "per token", "baseline"])
def test_no_look_ahead(base: str, name: str) -> None:
    options: dict[str, dict[str, Any]] = {
        "pooled": {"sequence_wise": True},
        "per token": {"sequence_wise": False},
        "baseline": {"aggregator": "head_only"},
    }
    model = make_model(base, **options[name]) if name in options else blended(base, name)
    ids = tokens(2, 12)
    logits = model(ids).logits_lm
    for t in (0, 4, 10):
        other = ids.clone()
        other[:, t + 1 :] = 2 + (other[:, t + 1 :] + 5) % 50
        changed = model(other).logits_lm
        assert torch.equal(changed[:, : t + 1], logits[:, : t + 1])
        assert not torch.equal(changed[:, t + 1 :], logits[:, t + 1 :])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", BLENDED)
def test_generation_with_a_cache_gives_the_teacher_forced_logits(base: str, name: str) -> None:
    model, ids = blended(base, name), tokens(2, 5)
    told: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "eos_token_id": None}
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), pad_token_id=1, return_dict_in_generate=True, **told
    )
    forced = model(made.sequences).logits_lm[:, 4:-1]
    torch.testing.assert_close(torch.stack(made.logits, 1), forced, rtol=1e-4, atol=1e-4)
    assert made.sequences.shape == (2, 11) and made.past_key_values is not None
    padded = F.pad(ids, (2, 0), value=1)
    mask = (padded != 1).long()
    mask[:, 2:] = 1
    again = model.generate(padded, attention_mask=mask, pad_token_id=1, return_dict_in_generate=True, **told)
    torch.testing.assert_close(torch.stack(again.logits, 1), torch.stack(made.logits, 1), rtol=1e-4, atol=1e-4)


def test_a_copy_blends_its_own_state() -> None:
    model = blended("llama", "ema")
    other, ids = copy.deepcopy(model), tokens()
    before = model(ids).logits_lm
    assert torch.equal(other(ids).logits_lm, before)
    other.blend_gate.data.fill_(-0.8)
    assert torch.equal(model(ids).logits_lm, before) and not torch.equal(other(ids).logits_lm, before)
    assert torch.equal(other.base(ids).logits, other(ids).logits_lm)


@pytest.mark.parametrize("base", BASES)
def test_recomputation_gives_the_same_gradients(base: str) -> None:
    found = []
    for recompute in (False, True):
        model = blended(base, "ema", last_k_unfreeze=2).set_phase("b").train()
        if recompute:
            model.gradient_checkpointing_enable()
        model(tokens(), labels=tokens(seed=5), **TARGETS).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-7)


def test_autocast_and_a_base_in_bfloat16() -> None:
    model, ids = blended("llama", "ema"), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids, labels=tokens(seed=5), **TARGETS)
    torch.testing.assert_close(output.logits_lm.float(), model(ids).logits_lm, rtol=0.1, atol=0.2)
    output.loss.backward()
    half = attach(make_base().bfloat16(), ModelConfig(**OPTIONS, blend_into_lm=True, plan_decoder=True))
    output = half(ids, **TARGETS)
    assert output.logits_lm.dtype == torch.bfloat16 and output.values.dtype == torch.float32
    output.loss.backward()


# ---- Options and saving ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"blend_into_lm": True, "sequence_wise": True}, "blend_into_lm needs sequence_wise=False"),
        ({"blend_into_lm": True, "aggregator": "head_only"}, "blend_into_lm needs a side path"),
        ({"aggregator": "lstm"}, "aggregator must be one of ema, gru, attn, head_only, got 'lstm'"),
        ({"aggregator": {"num_heads": 2}}, "aggregator must have a type"),
        ({"aggregator": "gru", "tree_checkpoint": 2}, "are for ema, got aggregator 'gru'"),
        ({"aggregator": "attn", "gate_l1": 0.1}, "are for ema, got aggregator 'attn'"),
        ({"pooling": "cls"}, "pooling must be one of mean, first, last, attention, got 'cls'"),
        ({"side_size": 0}, "side_size must be at least 1, got 0"),
        ({"lambda_lm": -1.0}, "lambda_lm must be finite and not negative"),
        ({"dropout": 1.0}, "dropout must be at least 0 and less than 1"),
        ({"equal_to": "head_only"}, "equal_to must be one of ema, gru, attn"),
    ],
)
def test_bad_options_are_named_in_one_line(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        ModelConfig(**options)
    assert "\n" not in str(error.value)


def test_the_aggregator_may_be_a_mapping() -> None:
    config = ModelConfig(aggregator={"type": "attn", "num_heads": 2, "window": 3})
    assert (config.aggregator, config.aggregator_heads, config.window) == ("attn", 2, 3)
    assert ModelConfig().is_sequence_wise and not ModelConfig(blend_into_lm=True).is_sequence_wise


def test_what_a_side_path_cannot_be_attached_to() -> None:
    base = make_base()
    for wrong in (nn.Linear(2, 2), base.model):
        with pytest.raises(ValueError, match="for Hugging Face's causal language models, got"):
            attach(wrong)
    with pytest.raises(ValueError, match="last_k_unfreeze must be at most the base's 4 layers, got 5"):
        attach(base, last_k_unfreeze=5)
    with pytest.raises(ValueError, match="attach has no option d_sied"):
        attach(base, d_sied=5)
    with pytest.raises(ValueError, match="side_size must be at least 1, got 0"):
        attach(base, ModelConfig(), side_size=0)
    base.train().lm_head.requires_grad_(False)
    attach(base, **OPTIONS).eval().remove()
    assert base.training and [n for n, p in base.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    attach(base, **OPTIONS)
    with pytest.raises(ValueError, match="has a side path already"):
        attach(base, **OPTIONS)


@pytest.mark.parametrize("base", BASES)
def test_own_parameters_are_saved_and_another_base_is_refused(base: str, tmp_path: Path) -> None:
    model = blended(base, "tree", last_k_unfreeze=1)
    for parameter in model.unfrozen():
        parameter.data += 0.1  # as phase B would
    model.heads.calibrate(torch.tensor([3.0, 5.0]))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "lformer.safetensors")
    assert {name.removeprefix("base.") for name in saved if name.startswith("base.")} == last_layers(model, 1)
    wanted, ids = model(tokens()), tokens()
    fresh = make_base(base)
    loaded = LFormer.from_pretrained(tmp_path, fresh).eval()
    assert loaded.config == model.config and loaded.phase == "a"
    found = loaded(ids)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted if name != "losses")
    other = make_base(base, seed=9)
    before = other(ids).logits
    with pytest.raises(ValueError, match="was made for a model with weights"):
        LFormer.from_pretrained(tmp_path, other)
    assert torch.equal(other(ids).logits, before) and all(p.requires_grad for p in other.parameters())
    with pytest.raises(ValueError, match=r"was made for a model with (model_type|vocab_size)"):
        LFormer.from_pretrained(tmp_path, make_base("gpt2" if base == "llama" else "llama", vocabulary=70))
    with pytest.raises(ValueError, match="needs the base that it was attached to"):
        LFormer.from_pretrained(tmp_path)


def test_a_model_of_its_own_is_saved_whole(tmp_path: Path) -> None:
    model = LFormer(ModelConfig.tiny(aggregator="gru")).eval()
    model.save_pretrained(tmp_path / "saved")
    loaded = LFormer.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(loaded(tokens()).logits_lm, model(tokens()).logits_lm) and loaded.phase == "joint"
    with pytest.raises(ValueError, match="brings its own base, and takes no other"):
        LFormer.from_pretrained(tmp_path / "saved", make_base())
    with pytest.raises(ValueError, match=r"no L-Former in .*: lformer_config.json, lformer.safetensors missing"):
        LFormer.from_pretrained(tmp_path)
    settings = json.loads((tmp_path / "saved" / "lformer_config.json").read_text())
    settings["config"]["side_size"] = 16
    (tmp_path / "saved" / "lformer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="do not fit their configuration"):
        LFormer.from_pretrained(tmp_path / "saved")
    settings["config"]["colour"] = "red"
    (tmp_path / "saved" / "lformer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="options that this version does not know: colour"):
        LFormer.from_pretrained(tmp_path / "saved")


def test_examples_in_the_docstrings() -> None:
    result = doctest.testmod(importlib.import_module("xlayer_systems.lformer.model"))
    assert result.attempted >= 5 and not result.failed


def test_data_is_the_same_whatever_the_tokenizer_was_last_asked_for() -> None:
    """Truncation and padding of requests stay with the tokenizer, and must not cut the documents of later data."""
    first = toy_data()
    first.tokenizer(["a b c", "d"], truncation=True, max_length=2, padding="max_length")
    second = toy_data()
    assert torch.equal(first.text.train, second.text.train) and len(first.text.train) > 10
    assert torch.equal(first.text.validation, second.text.validation)
    assert first.fingerprint == second.fingerprint
