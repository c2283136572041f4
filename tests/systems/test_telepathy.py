"""The receiver's input, the bridge, its losses and what is saved of it, between two tiny random decoders."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from telepathy_tools import SMALL, load_pair, make_data, make_model, save_pair
from xlayer_systems.data.blocks import IGNORED
from xlayer_systems.telepathy import (
    PRESETS,
    Pair,
    TelepathyConfig,
    TelepathyModel,
    generate_answers,
    preset,
    receiver_input,
    receiver_logits,
)
from xlayer_systems.telepathy.bridge import BridgeOutput
from xlayer_systems.telepathy.config import LOSSES
from xlayer_systems.telepathy.data import TelepathyData
from xlayer_systems.telepathy.usage import Messages

KINDS = ("continuous", "vq", "fsq", "dit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pair")


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    return load_pair(folder)


@pytest.fixture(scope="module")
def data(pair: Pair) -> TelepathyData:
    return make_data(pair)


def soft_tokens(pair: Pair, rows: int, count: int = 3) -> Tensor:
    return torch.randn(rows, count, pair.dimensions.target, generator=torch.Generator().manual_seed(3)) * 0.2


# ---- the receiver's input --------------------------------------------------------------------------------------------


def test_layout_of_soft_tokens_and_answers(pair: Pair) -> None:
    tokenizer, soft = pair.receiver_tokenizer, soft_tokens(pair, 2)
    answers = [[7, 8, 9], [10]]
    given = receiver_input(pair.receiver, tokenizer, soft, primer="Answer: ", answers=answers)
    table = pair.receiver.get_input_embeddings().weight
    primer = tokenizer("Answer: ", add_special_tokens=False)["input_ids"]
    n = len(primer)
    assert primer and given.labels is not None
    for row in range(2):
        assert torch.equal(given.inputs_embeds[row, :n], table[primer])
        assert torch.equal(given.inputs_embeds[row, n : n + 3], soft[row])
        assert torch.equal(given.inputs_embeds[row, n + 3], table[tokenizer.bos_token_id])
        said = [*answers[row], tokenizer.eos_token_id]
        start = n + 4
        assert torch.equal(given.inputs_embeds[row, start : start + len(said)], table[said])
        padding = 4 - len(said)
        assert given.labels[row].tolist() == [IGNORED] * start + said + [IGNORED] * padding
        assert given.attention_mask[row].tolist() == [1] * (start + len(said)) + [0] * padding


def test_layout_with_prompts_pads_on_the_left(pair: Pair) -> None:
    tokenizer, soft = pair.receiver_tokenizer, soft_tokens(pair, 2)
    prompts = [[11], [12, 13, 14]]
    given = receiver_input(pair.receiver, tokenizer, soft, primer="Answer: ", answers=[[7], [8]], prompts=prompts)
    table = pair.receiver.get_input_embeddings().weight
    n = len(tokenizer("Answer: ", add_special_tokens=False)["input_ids"])
    assert given.attention_mask.tolist() == [[0, 0] + [1] * (n + 7), [1] * (n + 9)]
    assert torch.equal(given.inputs_embeds[0, 2 + n : 5 + n], soft[0])
    assert torch.equal(given.inputs_embeds[0, 5 + n], table[11])
    assert torch.equal(given.inputs_embeds[:, -3], table[tokenizer.bos_token_id].expand(2, -1))
    assert torch.equal(given.inputs_embeds[1, n + 3 : n + 6], table[[12, 13, 14]])


def test_rows_that_disagree_are_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match=r"same number of rows, got \[2, 3\]"):
        receiver_input(pair.receiver, pair.receiver_tokenizer, soft_tokens(pair, 2), primer="", answers=[[1]] * 3)


@pytest.mark.parametrize("prompts", [None, [[11], [12, 13, 14]]], ids=["alone", "with prompts"])
def test_training_and_generation_see_the_same(pair: Pair, prompts: list[list[int]] | None) -> None:
    """The context is the same tensor, and the teacher-forced logits are those of each step of generation."""
    tokenizer, soft = pair.receiver_tokenizer, soft_tokens(pair, 2)
    context = receiver_input(pair.receiver, tokenizer, soft, primer="Answer: ", answers=None, prompts=prompts)
    found = pair.receiver.generate(
        inputs_embeds=context.inputs_embeds,
        attention_mask=context.attention_mask,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    forced = receiver_input(
        pair.receiver, tokenizer, soft, primer="Answer: ", answers=found.sequences.tolist(), prompts=prompts
    )
    length = context.inputs_embeds.shape[1]
    assert torch.equal(forced.inputs_embeds[:, :length], context.inputs_embeds)
    assert torch.equal(forced.attention_mask[:, :length], context.attention_mask)
    with torch.no_grad():
        logits = receiver_logits(pair.receiver, forced)
        assert torch.allclose(receiver_logits(pair.receiver, forced, 3), logits[:, -3:], atol=1e-5)
    for step, expected in enumerate(found.logits):
        torch.testing.assert_close(logits[:, length - 1 + step], expected, rtol=1e-4, atol=1e-5)


def test_a_short_row_says_the_same_beside_a_long_one(pair: Pair) -> None:
    tokenizer, soft = pair.receiver_tokenizer, soft_tokens(pair, 2)
    prompts = [[11], [12, 13, 14, 15]]

    def say(rows: slice) -> list[str]:
        given = receiver_input(
            pair.receiver, tokenizer, soft[rows], primer="Answer: ", answers=None, prompts=prompts[rows]
        )
        return generate_answers(pair.receiver, tokenizer, given, 5)

    assert say(slice(0, 2)) == say(slice(0, 1)) + say(slice(1, 2))


def test_generation_refuses_answers(pair: Pair) -> None:
    given = receiver_input(pair.receiver, pair.receiver_tokenizer, soft_tokens(pair, 1), primer="", answers=[[5]])
    with pytest.raises(ValueError, match="ends in BOS"):
        generate_answers(pair.receiver, pair.receiver_tokenizer, given, 3)


# ---- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_models_keep_their_bits(pair: Pair, data: TelepathyData, kind: str) -> None:
    model = make_model(pair, dataclasses.replace(SMALL, bridge=kind), data)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (pair.sender, pair.receiver)]
    bridge = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for start in (0, 8, 16):
        loss = model(**data.collate(data.train[start : start + 8])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for frozen, stored in zip((pair.sender, pair.receiver), before, strict=True):
        assert not frozen.training
        assert all(torch.equal(value, stored[name]) for name, value in frozen.state_dict().items())
        assert all(not p.requires_grad and p.grad is None for p in frozen.parameters())
    assert all(name.startswith("bridge.") for name in bridge)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, bridge[name])}
    assert changed >= {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_padding_of_the_text_changes_nothing(pair: Pair, data: TelepathyData, kind: str) -> None:
    model = make_model(pair, dataclasses.replace(SMALL, bridge=kind), data).eval()
    batch = data.collate(data.train[:4])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    padded = torch.nn.functional.pad(ids, (0, 5), value=17), torch.nn.functional.pad(mask, (0, 5))
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_message(*padded).soft, model.encode_message(ids, mask).soft, rtol=1e-4, atol=1e-5
        )


def test_soft_tokens_have_the_scale_of_the_embeddings(pair: Pair, data: TelepathyData) -> None:
    model = make_model(pair, SMALL, data).eval()
    batch = data.collate(data.train[:16])
    soft = model.encode_message(batch["input_ids"], batch["attention_mask"]).soft
    assert float(soft.detach().square().mean().sqrt()) == pytest.approx(pair.target_rms(), rel=1e-3)
    embedded = pair.receiver.get_input_embeddings().weight
    assert pair.target_rms() == pytest.approx(float(embedded.square().mean().sqrt()), rel=1e-5)


def test_source_layer(pair: Pair, data: TelepathyData) -> None:
    batch = data.collate(data.train[:2])
    states = pair.sender(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
    ).hidden_states
    for change, expected in (({}, 2), ({"source_layer": 1}, 1), ({"source_depth": 0.5}, 1), ({"source_layer": -3}, 0)):
        model = make_model(pair, dataclasses.replace(SMALL, **change), data)
        found = model.encode(batch["input_ids"], batch["attention_mask"])
        torch.testing.assert_close(found, states[expected])
    with pytest.raises(ValueError, match="source_layer must be between -3 and 2, got 3"):
        TelepathyConfig(source_layer=3).layer(2)


def test_loss_is_the_weighted_sum_of_its_parts(pair: Pair, data: TelepathyData) -> None:
    weights = {name: 0.1 + 0.2 * index for index, name in enumerate(LOSSES) if name != "flow"}
    model = make_model(pair, dataclasses.replace(SMALL, **weights), data).train()
    output = model(**data.collate(data.train[:8]))
    assert set(output.parts) == set(weights)
    expected = sum(weights[name] * float(part) for name, part in output.parts.items())
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_language_modelling_loss_is_that_of_the_whole_input(pair: Pair, data: TelepathyData) -> None:
    """Only the answers' logits are computed; the loss is as if all had been."""
    config = dataclasses.replace(SMALL, batch_diversity=0.0)
    model = make_model(pair, config, data).train()
    examples = data.train[:8]
    batch = data.collate(examples)
    soft = model.encode_message(batch["input_ids"], batch["attention_mask"]).soft
    given = model.receiver_input(soft, [example.answer_ids for example in examples])
    expected = pair.receiver(
        inputs_embeds=given.inputs_embeds, attention_mask=given.attention_mask, labels=given.labels
    ).loss
    torch.testing.assert_close(model(**batch).loss, expected, rtol=1e-5, atol=1e-6)


def test_evaluation_repeats_itself(pair: Pair, data: TelepathyData) -> None:
    """The diffusion draws the same noise each time, and dropout of the frozen models stays off."""
    model = make_model(pair, dataclasses.replace(SMALL, bridge="dit"), data).eval()
    batch = data.collate(data.validation[:8])
    with torch.no_grad():
        first, second = model(**batch), model(**batch)
    assert first.generated == second.generated and torch.equal(first.loss, second.loss)


# ---- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_bridge_is_saved(pair: Pair, data: TelepathyData, kind: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = make_model(pair, dataclasses.replace(SMALL, bridge=kind), data)
    batch = data.collate(data.train[:8])
    model.train()(**batch)
    model.save_pretrained(tmp_path / "bridge")
    assert sorted(p.name for p in (tmp_path / "bridge").iterdir()) == ["bridge.json", "bridge.safetensors"]
    assert load_file(tmp_path / "bridge" / "bridge.safetensors").keys() == model.bridge.state_dict().keys()
    loaded = TelepathyModel.from_pretrained(tmp_path / "bridge", pair).eval()
    assert loaded.config == model.config
    with torch.no_grad():
        assert torch.equal(loaded(**batch).loss, model.eval()(**batch).loss)


def test_another_pair_is_refused(pair: Pair, folder: Path, data: TelepathyData, tmp_path: Path) -> None:
    make_model(pair, SMALL, data).save_pretrained(tmp_path / "bridge")
    sender, receiver = save_pair(folder)
    with pytest.raises(ValueError) as caught:
        TelepathyModel.from_pretrained(tmp_path / "bridge", Pair.load(sender, sender))
    message = str(caught.value)
    assert message.startswith(f"this bridge was trained for the receiver {receiver}") and f"got {sender}" in message
    assert "\n" not in message
    with pytest.raises(ValueError, match=r"no bridge in .*: bridge.json, bridge.safetensors missing"):
        TelepathyModel.from_pretrained(tmp_path, pair)


# ---- presets and settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_a_training_step(pair: Pair, name: str) -> None:
    # The width of the report's diffusion transformer is for models 256 times as wide; heads must divide these widths.
    config = dataclasses.replace(PRESETS[name], hidden_size=None, num_heads=2, calibration_examples=20)
    data = make_data(pair, target=config.target)
    model = make_model(pair, config, data).train()
    output = model(**data.collate(data.train[:4]))
    output.loss.backward()
    assert torch.isfinite(output.loss)
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    weighed = {loss for loss in LOSSES if getattr(config, loss) > 0} - ({"flow"} if config.bridge != "dit" else set())
    assert set(output.parts) - {"quantizer"} == weighed


def test_presets_are_the_reports() -> None:
    assert len([name for name in PRESETS if name[1:].isdigit()]) == 15
    assert preset("classification") == TelepathyConfig()
    found = preset("v5")
    assert (found.soft_tokens, found.source_depth, found.anchor) == (256, 0.5, 2.0)
    assert preset("v11").first_weight == 100 and preset("v10").target == "question_answer"
    with pytest.raises(ValueError, match="unknown preset 'v16'; expected one of classification, v1"):
        preset("v16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"soft_tokens": 0}, "soft_tokens must be at least 1, got 0"),
        ({"anchor": -1.0}, "anchor must be finite and not negative"),
        ({"source_depth": 1.5}, "between 0 and 1, got 1.5"),
        ({"levels": (1, 8)}, "levels must be numbers, each at least 2"),
        ({"lm": 0.0, "flow": 0.0, "batch_diversity": 0.0}, "without a loss learns nothing"),
    ],
)
def test_wrong_settings_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TelepathyConfig(), **change)


def test_heads_must_divide_the_width(pair: Pair) -> None:
    with pytest.raises(ValueError, match="heads must divide the bridge's width 16, got 3"):
        TelepathyModel.build(pair, dataclasses.replace(SMALL, num_heads=3))


# ---- data and collapse -----------------------------------------------------------------------------------------------


def test_scores_and_metrics(pair: Pair, data: TelepathyData) -> None:
    examples = data.validation[:5]
    answers = [data.task.validation[e.number].answer for e in examples]
    batch = data.collate(examples)

    class Output:
        loss = torch.tensor(2.0)
        parts = {"lm": torch.tensor(1.5)}  # noqa: RUF012
        generated = [answers[0], answers[1] + " and more", "nonsense", "", answers[4].upper()]  # noqa: RUF012

    metrics = data.summarize(data.score(Output(), batch).sum(0))
    assert (metrics["correct"], metrics["total"], metrics["loss"]) == (3, 5, 1.5)
    assert metrics["accuracy"] == 0.6 and metrics["invalid"] == 0.4
    assert metrics["diversity"] == len(set(Output.generated)) / 5
    assert sum(there for _, there in metrics["per_class"].values()) == 5
    assert sum(right for right, _ in metrics["per_class"].values()) == 3


def test_question_and_answer_as_target(pair: Pair) -> None:
    data = make_data(pair, target="question_answer")
    example = data.train[0]
    text = pair.receiver_tokenizer.decode(example.target_ids)
    assert text == f"{data.task.train[0].text}\nAnswer: {data.task.train[0].answer}"
    assert data.said("the cat Answer: none\nAnswer: animal") == " animal"
    assert make_data(pair).said("Answer: animal") == "Answer: animal"


def test_collapse_is_visible() -> None:
    def sent(soft: Tensor, indices: Tensor | None = None) -> BridgeOutput:
        return BridgeOutput(soft, soft, soft, indices, soft.new_zeros(()))

    messages = Messages()
    one = torch.randn(1, 2, 8).expand(6, -1, -1)
    messages.add(sent(one[:4], torch.tensor([[0, 1]] * 4)))
    messages.add(sent(one[4:], torch.tensor([[0, 1]] * 2)))
    found = messages.summary(16)
    assert found["similarity"] == pytest.approx(1) and found["perplexity"] == pytest.approx(2)
    assert found["codes"] == 2 and found["used"] == 2 / 16
    different = Messages()
    soft = torch.randn(5, 2, 8)
    different.add(sent(soft, torch.arange(10).reshape(5, 2)))
    flat = torch.nn.functional.normalize(soft.flatten(1), dim=1).double()
    expected = float(((flat @ flat.T).sum() - 5) / 20)
    assert different.summary(None)["similarity"] == pytest.approx(expected, abs=1e-6)
    assert different.summary(None)["perplexity"] == pytest.approx(10)
    variance = soft.flatten(0, 1).double().var(0, unbiased=False).mean() / soft.double().square().mean()
    assert different.summary(None)["variance"] == pytest.approx(float(variance))
    assert Messages().summary(None) == {}
