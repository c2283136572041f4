"""Tasks with text answers: what they hold, how answers are read, and the hub's column layouts on local rows."""

from __future__ import annotations

import re

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from xlayer_systems.data import answers_hub, hub, load_task
from xlayer_systems.data.answers import AnswerExample, AnswerTask, load_answer_task
from xlayer_systems.data.synthetic import passkeys, sums
from xlayer_systems.errors import UserError


def task(labels=None, train=(), validation=()):
    return AnswerTask("made up", tuple(train), tuple(validation), labels, "?", "0")


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        ("email", "email"),
        (' "Email" is the package', "email"),
        ("(email).\nemail", "email"),
        ("\n'EMAIL TOOLS'", "email tools"),
        ("email tool", "email"),
        ("emails", None),
        ("email_x", None),
        ("the email package", None),
        ("", None),
        ('"" ', None),
    ],
)
def test_labels_are_read_from_the_start(generated, expected):
    assert task(("email", "email tools", "json")).parse(generated) == expected


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        ("85", "85"),
        ("37 + 48 = 85.", "85"),
        ("It costs $1,234,567", "1234567"),
        ("-12", "-12"),
        ("12-5", "5"),
        ("3.50", "3.5"),
        ("3.0", "3"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_last_number_counts(generated, expected):
    assert task().parse(generated) == expected


def test_correct_and_majority():
    labelled = task(("no", "yes"), [AnswerExample("", a) for a in ("yes", "no", "yes")], [AnswerExample("", "yes")] * 2)
    assert labelled.majority() == (2, 2)
    assert labelled.is_correct("Yes!", "yes") and not labelled.is_correct("maybe", "yes")
    assert not labelled.is_correct("no", "yes")
    assert task().is_correct("so 1,000.0", "1000") and not task().is_correct("nothing", "1000")


def test_stdlib_topics_are_the_classification_task():
    answers, labelled = load_answer_task("stdlib-topics"), load_task("stdlib-topics")
    assert answers.labels == labelled.labels and answers.fingerprint == labelled.fingerprint
    assert answers.majority() == labelled.majority()
    for mine, theirs in zip(answers.validation, labelled.validation, strict=True):
        assert mine == AnswerExample(theirs.first, labelled.labels[theirs.label])
    assert all(answers.parse(label) == label for label in answers.labels)


def test_stdlib_pairs_show_both_texts():
    example, original = load_answer_task("stdlib-pairs").train[0], load_task("stdlib-pairs").train[0]
    assert original.first in example.text and original.second in example.text


@pytest.mark.parametrize("make", [passkeys, sums])
def test_synthetic_tasks_repeat_and_do_not_leak(make):
    train, validation = make(3)
    assert (train, validation) == make(3) and (train, validation) != make(4)
    assert len(train) == 4000 and len(validation) == 500
    assert len({text for text, _ in train + validation}) == 4500
    assert not {_content(text) for text, _ in train} & {_content(text) for text, _ in validation}


def test_a_passkey_is_in_its_text_once_and_in_many_places():
    train = load_answer_task("passkey").train
    for example in train:
        assert re.findall(r"\d+", example.text) == [example.answer] and len(example.answer) == 5
    assert len({example.text.index(example.answer) for example in train}) > 100


def test_sums_are_right():
    loaded = load_answer_task("arithmetic")
    for example in loaded.train + loaded.validation:
        total = sum(int(part.replace(" ", "")) for part in re.findall(r"[+-]? ?\d+", example.text))
        assert str(total) == example.answer and loaded.is_correct(f"the answer is {total}", example.answer)


def test_fingerprints_differ():
    assert len({load_answer_task(name).fingerprint for name in ("passkey", "arithmetic", "stdlib-topics")}) == 3


@pytest.mark.parametrize(
    ("name", "column", "names", "expected"),
    [
        ("glue/sst2", "label", ["negative", "positive"], ("negative", "positive")),
        (
            "ag_news",
            "label",
            ["World", "Sports", "Business", "Sci/Tech"],
            ("World", "Sports", "Business", "Technology"),
        ),
        ("trec", "coarse_label", ["ABBR", "ENTY", "NUM"], ("abbreviation", "entity", "number")),
        ("banking77", "label", ["card_arrival", "lost_or_stolen_card"], ("card arrival", "lost or stolen card")),
    ],
)
def test_classification_sets_have_readable_labels(monkeypatch, name, column, names, expected):
    text = "sentence" if name == "glue/sst2" else "text"
    features = Features({text: Value("string"), column: ClassLabel(names=names)})
    rows = {text: [f"text {i}" for i in range(len(names))], column: list(range(len(names)))}
    split = Dataset.from_dict(rows, features=features)
    held_out = "validation" if name == "glue/sst2" else "test"
    monkeypatch.setattr(hub, "_load", lambda asked: {"train": split, held_out: split} if asked == name else {})
    loaded = load_answer_task(name)
    assert loaded.labels == expected
    assert [(e.text, e.answer) for e in loaded.validation] == [(f"text {i}", label) for i, label in enumerate(expected)]
    assert loaded.instruction and "\n" not in loaded.instruction


def test_a_saved_data_set_loads_by_path(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a_b", "c"])})
    split = Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}, features=features)
    DatasetDict({"train": split, "validation": split}).save_to_disk(str(tmp_path / "saved"))
    loaded = load_answer_task(str(tmp_path / "saved"))
    assert loaded.labels == ("a b", "c") and loaded.train[0] == AnswerExample("x", "a b")
    assert "a b, c" in loaded.instruction


HUB_ROWS = {
    "gsm8k": ({"question": ["How many?"], "answer": ["2 + 2 = <<2+2=4>>4 thousands\n#### 4,000"]}, None, "4000"),
    "boolq": ({"question": ["is it"], "passage": ["It is."], "answer": [True]}, ("no", "yes"), "yes"),
    "piqa": ({"goal": ["sit", "x"], "sol1": ["up", "x"], "sol2": ["down", "x"], "label": [1, -1]}, ("A", "B"), "B"),
    "commonsense_qa": (
        {
            "question": ["Where?", "x"],
            "choices": [{"label": list("ABCDE"), "text": ["here", "there", "up", "down", "out"]}] * 2,
            "answerKey": ["C", ""],
        },
        tuple("ABCDE"),
        "C",
    ),
}


@pytest.mark.parametrize("name", HUB_ROWS)
def test_question_sets_in_the_hubs_columns(monkeypatch, name):
    rows, labels, answer = HUB_ROWS[name]
    split = Dataset.from_dict(rows)
    monkeypatch.setattr(answers_hub, "load_splits", lambda address: (split, split, "validation"))
    loaded = load_answer_task(name)
    assert loaded.labels == labels and len(loaded.train) == len(loaded.validation) == 1
    example = loaded.train[0]
    assert example.answer == answer and loaded.is_correct(answer, example.answer)
    texts = [
        text for column, (text, *_) in rows.items() if isinstance(text, str) and column not in ("answer", "answerKey")
    ]
    assert all(text in example.text for text in texts)
    if name == "commonsense_qa":
        assert "C: up" in example.text
    if name == "piqa":
        assert "A: up\nB: down" in example.text


def test_wrong_columns_and_unknown_names_are_refused(monkeypatch):
    split = Dataset.from_dict({"other": ["x"]})
    monkeypatch.setattr(answers_hub, "load_splits", lambda address: (split, split, "validation"))
    with pytest.raises(UserError, match="expected in train the columns question, answer; found other"):
        load_answer_task("gsm8k")
    with pytest.raises(UserError, match="cannot load data set"):
        load_answer_task("no-such-folder/nowhere")


def test_labels_that_fall_together_are_refused():
    with pytest.raises(UserError, match="labels that differ"):
        answers_hub.readable("mine", ["a_b", "a b"])


def _content(text):
    numbers = [int(n) for n in re.findall(r"\d+", text)]
    return (*sorted(numbers[:2]), *re.findall(r"[+-]", text), *numbers[2:])
