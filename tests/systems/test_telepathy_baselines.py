"""Baselines, scores and latencies of telepathy, on a toy task and two tiny models with random parameters."""

from __future__ import annotations

import random

import pytest
import torch

from xlayer_systems.data.answers import AnswerExample, AnswerTask
from xlayer_systems.hf.tokenizer import train_tokenizer
from xlayer_systems.pretraining.decoder import DecoderShape, make_decoder
from xlayer_systems.telepathy import baselines, prompting, receiver
from xlayer_systems.telepathy.baselines import run_baselines
from xlayer_systems.telepathy.config import TelepathyConfig, TelepathyOptions
from xlayer_systems.telepathy.evaluation import entity_transfer, score
from xlayer_systems.telepathy.latency import ROUTES, format_latency, measure_latency
from xlayer_systems.telepathy.model import Pair, TelepathyModel
from xlayer_systems.telepathy.probe import Pooled, fit_probe, pool
from xlayer_systems.telepathy.prompt_tuning import Schedule, tune_prompt
from xlayer_systems.telepathy.prompting import (
    answer_prompts,
    answer_tokens,
    complete,
    encode,
    few_shots,
    find_label,
    rank_labels,
    summary_prompts,
)

LABELS = ("red", "green", "blue")
WORDS = {"red": "rose fire brick", "green": "leaf grass moss", "blue": "sky sea ink"}
OPTIONS = TelepathyOptions(epochs=1, max_steps=6, batch_size=8, max_length=24, learning_rate=1e-2)
CONFIG = TelepathyConfig(soft_tokens=3, num_layers=1, num_heads=2)
NAMES = {
    "majority", "random", "sender_text", "sender_text_5shot", "receiver_text", "receiver_text_5shot", "text_relay",
    "text_relay_5shot", "prompt_tuning", "prompt_tuning_text", "linear_probe", "noise", *baselines.RANKED,
}  # fmt: skip


def make_task(train: int = 60, validation: int = 21, labels: tuple[str, ...] | None = LABELS) -> AnswerTask:
    draw = random.Random(0)
    examples = []
    for number in range(train + validation):
        label = draw.choices(LABELS, (3, 2, 1))[0]
        text = f"Number {number} saw {draw.choice(WORDS[label].split())} and {draw.choice(WORDS[label].split())}"
        examples.append(AnswerExample(text, label if labels else str(number)))
    split = tuple(examples[:train]), tuple(examples[train:])
    return AnswerTask("toy", *split, labels, "Which colour is it?", "toy")


@pytest.fixture(scope="module")
def task():
    return make_task()


@pytest.fixture(scope="module")
def model(task):
    texts = [f"{example.text} {example.answer}" for example in task.train]
    parts = []
    for seed, (vocabulary, width) in enumerate([(300, 32), (280, 32)]):
        tokenizer = train_tokenizer(texts, vocabulary, 512, keep_text=True)
        torch.manual_seed(seed)
        shape = DecoderShape(
            vocabulary, hidden_size=width, intermediate_size=48, num_layers=2, num_heads=2, max_position_embeddings=512
        )
        parts += [make_decoder(shape, tokenizer), tokenizer]
    torch.manual_seed(2)
    return TelepathyModel.build(Pair("a", "b", *parts, "1", "2"), CONFIG, max_new_tokens=3).eval()


@pytest.fixture(scope="module")
def rows(task, model):
    return run_baselines(task, CONFIG, OPTIONS, model, seed=0)


def without_times(rows):
    return {name: {key: value for key, value in row.items() if key != "seconds"} for name, row in rows.items()}


def test_scores_of_labels():
    task = make_task(validation=4)
    examples = [AnswerExample("", answer) for answer in ("red", "red", "green", "blue")]
    result = score(task, [" Red.", "blue", "greenish", "blue"], examples)
    assert result == {
        "correct": 2, "total": 4, "invalid": 1, "diversity": 0.75,
        "per_class": {"red": [1, 2], "green": [0, 1], "blue": [1, 1]},
    }  # fmt: skip
    with pytest.raises(ValueError, match="1 and 4"):
        score(task, ["red"], examples)


def test_scores_of_numbers():
    task = make_task(labels=None)
    examples = [AnswerExample("Ann has 3 cats and 1,200 mice, said Ann", "1203"), AnswerExample("no name", "7")]
    result = score(task, ["Ann: 1,203", "none"], examples)
    assert result == {"correct": 1, "total": 2, "invalid": 1, "diversity": 1.0, "entity_transfer": 1 / 3}
    assert entity_transfer(["1,200 and 3"], examples[:1]) == 2 / 3
    assert entity_transfer(["7"], examples[1:]) == 0.0


def test_rows(task, rows):
    assert set(rows) == NAMES
    for row in rows.values():
        assert row["total"] == 21 and 0 <= row["correct"] <= 21 and 0 <= row["invalid"] <= 21
        assert sum(right for right, _ in row["per_class"].values()) == row["correct"]
        assert sum(there for _, there in row["per_class"].values()) == 21
    assert (rows["majority"]["correct"], 21) == task.majority()
    assert rows["majority"]["diversity"] == rows["prompt_tuning"]["diversity"] == 1 / 21
    assert rows["random"]["invalid"] == rows["linear_probe"]["invalid"] == 0


def test_same_seed_same_rows_and_models_stay(task, model, rows):
    before = [parameter.clone() for parameter in (*model.sender.parameters(), *model.receiver.parameters())]
    assert without_times(run_baselines(task, CONFIG, OPTIONS, model, seed=0)) == without_times(rows)
    after = [*model.sender.parameters(), *model.receiver.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_open_answers_and_limit(model, monkeypatch, caplog):
    task = make_task(labels=None)
    monkeypatch.setattr(baselines, "READING", 5)
    caplog.set_level("INFO")
    rows = run_baselines(task, CONFIG, OPTIONS, model, seed=1, limit=9)
    assert set(rows) == NAMES - {"linear_probe", *baselines.RANKED}
    said = "baselines left out, since the answers are open: "
    left_out = [line.removeprefix(said).split(", ") for line in caplog.messages if line.startswith(said)]
    assert [set(names) for names in left_out] == [{"linear_probe", *baselines.RANKED}]
    assert {name for name, row in rows.items() if row["total"] == 5} == set(baselines.TEXT)
    assert all(row["total"] in (5, 9) and "entity_transfer" in row for row in rows.values())


def test_soft_tokens_only_through_receiver_input(task, model, monkeypatch):
    calls = []
    original = receiver.receiver_input

    def counted(*args, **kwargs):
        calls.append((args[2].shape[1], kwargs["primer"], kwargs["answers"] is not None, kwargs["prompts"] is not None))
        return original(*args, **kwargs)

    monkeypatch.setattr(receiver, "receiver_input", counted)
    run = baselines._Run(task, CONFIG, OPTIONS, model, 0, None)
    run.noise()
    assert calls == [(3, CONFIG.primer, False, False)]
    calls.clear()
    run.prompt_tuning(with_text=False)
    assert calls == 6 * [(3, CONFIG.primer, True, False)] + [(3, CONFIG.primer, False, False)]
    calls.clear()
    run.prompt_tuning(with_text=True)
    assert calls == 6 * [(3, CONFIG.primer, True, True)] + [(3, CONFIG.primer, False, True)]
    calls.clear()
    run.relay(shots=True)
    assert not calls


def test_noise_has_the_rms_of_the_bridge(task, model, monkeypatch):
    given = []
    original = receiver.generate_answers
    monkeypatch.setattr(receiver, "generate_answers", lambda *args: given.append(args[2]) or original(*args))
    run = baselines._Run(task, CONFIG, OPTIONS, model, 0, None)
    _, notes = run.noise()
    ids, mask = run.sender_batch(run.texts)
    soft = model.encode_message(ids, mask).soft
    primer = len(encode(model.pair.receiver_tokenizer, CONFIG.primer))
    noise = given[0].inputs_embeds[:, primer : primer + 3]
    assert noise.shape == soft.shape and not torch.allclose(noise, soft)
    rms = soft.square().mean().sqrt().item()
    assert notes["rms"] == pytest.approx(rms) and noise.square().mean().sqrt().item() == pytest.approx(rms, rel=0.06)


def test_few_shots_are_balanced_and_from_training(task):
    shots = few_shots(task, 5, seed=3)
    assert len(shots) == len({shot.text for shot in shots}) == 5 and set(shots) <= set(task.train)
    counts = [sum(shot.answer == label for shot in shots) for label in LABELS]
    assert sorted(counts) == [1, 2, 2]
    assert few_shots(task, 5, seed=3) == shots != few_shots(task, 5, seed=4)


def test_few_shots_never_hold_validation_texts(task, model):
    leaked = AnswerTask("toy", task.train[:8] + task.validation, task.validation, LABELS, "Which?", "leaked")
    for seed in range(20):
        shots = few_shots(leaked, 5, seed)
        assert not {shot.text for shot in shots} & {example.text for example in task.validation}
    tokenizer = model.pair.receiver_tokenizer
    (prompt,) = answer_prompts(leaked, tokenizer, ["which one"], shots, 24)
    text = tokenizer.decode(prompt)
    assert not any(example.text in text for example in task.validation)


def test_prompt_layout(task, model):
    tokenizer = model.pair.sender_tokenizer
    (plain,) = answer_prompts(task, tokenizer, ["a rose"], [], 24)
    header = "<s>Which colour is it?\nOptions: red, green, blue\n\n"
    assert tokenizer.decode(plain) == f"{header}Text: a rose\nAnswer:"
    (solved,) = answer_prompts(task, tokenizer, ["a rose"], [AnswerExample("a leaf", "green")], 24)
    assert tokenizer.decode(solved) == f"{header}Text: a leaf\nAnswer: green\n\nText: a rose\nAnswer:"


TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def chat(model, monkeypatch):
    """Gives both tokenizers a chat template; returns the receiver's."""
    for tokenizer in (model.pair.sender_tokenizer, model.pair.receiver_tokenizer):
        monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    return model.pair.receiver_tokenizer


def test_a_chat_template_makes_messages(task, chat):
    (plain,) = answer_prompts(task, chat, ["a rose"], [], 24)
    asked = (
        "[user] Which colour is it?\nOptions: red, green, blue\nAnswer with one of the options and nothing else.\n\n"
    )
    assert chat.decode(plain) == f"{asked}Text: a rose</s>[assistant] "
    (solved,) = answer_prompts(task, chat, ["a rose"], [AnswerExample("a leaf", "green")], 24)
    assert chat.decode(solved) == f"{asked}Text: a leaf</s>[assistant] green</s>[user] Text: a rose</s>[assistant] "
    assert solved.count(chat.eos_token_id) == 3  # one token each, no text
    (summary,) = summary_prompts(chat, ["a rose"], 24)
    assert chat.decode(summary) == "[user] Summarize this text in one sentence.\n\nText: a rose</s>[assistant] "
    (long,) = answer_prompts(task, chat, ["word " * 2000], [AnswerExample("word " * 2000, "red")] * 5, 1000)
    assert prompting.CONTEXT - 12 < len(long) <= prompting.CONTEXT + 6
    assert answer_tokens(task, chat) > 20


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("Blue.", ("blue", "exact")),
        ("The answer is **Green**.", ("green", "contained")),
        ("It is red rather than blue", ("red", "contained")),
        ("I would call it reddish", (None, "none")),
    ],
)
def test_a_label_is_found_in_the_words_of_a_chat_model(task, said, found):
    assert find_label(task, said) == found


def test_a_chat_model_always_has_an_answer(task, model, chat, monkeypatch):
    generated = complete(model.receiver, chat, answer_prompts(task, chat, ["a rose"], [], 24), 4, 1)
    assert len(generated) == 1 and "\n" not in generated[0]
    said = {"sender": 0, "receiver": 0}

    def talk(model_, tokenizer, prompts, max_new_tokens, batch_size):
        del said["sender" if tokenizer is not chat else "receiver"]
        return ["Sure! It is green.", "red", "no idea"] * (len(prompts) // 3)

    monkeypatch.setattr(baselines, "complete", talk)
    options = TelepathyOptions(baselines="sender_text,receiver_text", max_length=24)
    rows = run_baselines(task, CONFIG, options, model, seed=0)
    assert list(rows) == ["sender_text", "receiver_text"] and not said
    for row in rows.values():
        assert row["invalid"] == 0 and row["found"] == {"contained": 7, "exact": 7, "ranked": 7}


def test_long_texts_fit_the_context(task, model):
    tokenizer = model.pair.sender_tokenizer
    long = "word " * 2000
    shots = [AnswerExample(long, "red")] * 5
    (prompt,) = answer_prompts(task, tokenizer, [long], shots, 1000)
    assert prompting.CONTEXT - 6 < len(prompt) <= prompting.CONTEXT
    assert tokenizer.decode(prompt).endswith("\nAnswer:") and tokenizer.decode(prompt).count("Answer: red") == 5


def test_batching_changes_no_text(task, model):
    prompts = answer_prompts(task, model.pair.sender_tokenizer, [e.text for e in task.validation], [], 24)
    prompts[0] = prompts[0][-7:]  # so that others in its batch are longer
    arguments = (model.sender, model.pair.sender_tokenizer, prompts, 4)
    assert complete(*arguments, batch_size=8) == complete(*arguments, batch_size=1)


def test_ranking_takes_the_likeliest_label(task, model):
    tokenizer = model.pair.sender_tokenizer
    prompts = answer_prompts(task, tokenizer, [e.text for e in task.validation][:5], [], 24)
    prompts[0] = prompts[0][-7:]
    expected = []
    for prompt in prompts:
        means = []
        for label in task.labels:
            tail = encode(tokenizer, f" {label}")
            logits = model.sender(torch.tensor([[*prompt, *tail]])).logits[0, -len(tail) - 1 : -1]
            means.append(logits.log_softmax(-1)[torch.arange(len(tail)), torch.tensor(tail)].mean())
        expected.append(task.labels[int(torch.stack(means).argmax())])
    for batch_size in (1, 64):
        assert rank_labels(model.sender, tokenizer, prompts, task.labels, batch_size) == expected


def test_probe_learns_what_is_linear():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (200,), generator=generator)
    informative = torch.randn(3, 12, generator=generator)[labels] + 0.1 * torch.randn(200, 12, generator=generator)
    useless = torch.randn(200, 12, generator=generator)
    probe = fit_probe(Pooled(useless[:150], informative[:150]), labels[:150].tolist(), 3, seed=0)
    assert probe.features in ("last", "both") and probe.held_out == 1.0
    assert probe.predict(Pooled(useless[150:], informative[150:])) == labels[150:].tolist()


def test_probe_pools_real_tokens_only():
    states = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    pooled = pool(states, mask)
    torch.testing.assert_close(pooled.mean, torch.stack([states[0, :2].mean(0), states[1].mean(0)]))
    assert torch.equal(pooled.last, torch.stack([states[0, 1], states[1, 3]]))


def test_probe_on_the_sender(task, rows):
    assert rows["linear_probe"]["correct"] > rows["majority"]["correct"]  # its words give the answer away


def test_prompt_tuning_learns(model):
    tokenizer, losses = model.pair.receiver_tokenizer, []
    answers = [encode(tokenizer, label) for label in LABELS]
    schedule = Schedule(steps=60, batch_size=3, learning_rate=0.05)
    soft = tune_prompt(
        model.receiver, tokenizer, 3, "", answers, None, schedule, 0, lambda _, loss: losses.append(loss)
    )
    assert soft.shape == (3, 32) and not soft.requires_grad
    assert losses[-1] < losses[0] - 0.5  # nats; random models do not learn more


def test_latency(task, model):
    latency = measure_latency(model, task, examples=3, warmup=1, max_length=24)
    assert {route: tuple(stages) for route, stages in latency.items()} == {
        route: (*stages, "total") for route, stages in ROUTES.items()
    }
    assert all(value > 0 for stages in latency.values() for value in stages.values())
    lines = format_latency(latency).splitlines()
    assert len(lines) == 4 and "1.00" in lines[1] and "summarize" in lines[2]
