"""The requests that need a tool: what is in them is right, and what is held out is held out."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path

import pytest

from xlayer_systems.data.tools import (
    AFTERWARDS,
    CHANGES,
    FRAMES,
    HELD_OUT_NUMBERS,
    ORDERED,
    RESULTS,
    STEPS,
    TRAIN,
    VALIDATION,
    VERBS,
    WORDINGS,
    load_tool_task,
    requests,
    signed_log,
)
from xlayer_systems.errors import UserError

NUMBER = re.compile(r"\d+")


@pytest.fixture(scope="module")
def task():
    return load_tool_task("tools")


def test_splits_have_no_request_in_common_and_no_number(task) -> None:
    assert (len(task.train), len(task.validation)) == (TRAIN, VALIDATION)
    texts = {example.text for example in task.train + task.validation}
    assert len(texts) == TRAIN + VALIDATION
    seen, held_out = ({n for e in split for n in NUMBER.findall(e.text)} for split in (task.train, task.validation))
    assert not seen & held_out and len(held_out) == HELD_OUT_NUMBERS and len(seen) == 98 - HELD_OUT_NUMBERS


def test_wordings_frames_and_verbs_are_held_out() -> None:
    for train, validation in (FRAMES, VERBS, *WORDINGS.values(), *AFTERWARDS.values()):
        assert train and validation and not set(train) & set(validation)
    wordings = [wording for pair in WORDINGS.values() for part in pair for wording in part]
    assert len(set(wordings)) == len(wordings) >= 6 * 13
    assert len(WORDINGS) >= 5 and min(len(pair[0]) for pair in WORDINGS.values()) >= 10
    for text in wordings:
        assert sorted(field for _, field, _, _ in string.Formatter().parse(text) if field) == ["a", "b"]


def test_every_word_of_a_held_out_wording_is_in_training(task) -> None:
    known = {word for example in task.train for word in re.findall("[a-z]+", example.text.lower())}
    for _, held_out in WORDINGS.values():
        for wording in held_out:
            assert set(re.findall("[a-z]+", wording.format(a=1, b=2).lower())) <= known, wording


def test_no_word_gives_the_tool_away(task) -> None:
    right, total = task.keyword()
    assert 0.2 < right / total < 0.5
    usual, total = task.majority()
    assert total == VALIDATION and 0.1 < usual / total < 0.25


def matches(text: str, wording: str) -> list[tuple[int, int]]:
    """Finds the operands a, b wherever ``wording`` occurs in ``text``."""
    pattern = re.escape(wording).replace(r"\{a\}", r"(?P<a>\d+)").replace(r"\{b\}", r"(?P<b>\d+)")
    return [(int(m["a"]), int(m["b"])) for m in re.finditer(rf"(?<![\w%]){pattern}(?![\w%])", text)]


def test_values_and_plans_follow_from_the_text(task) -> None:
    """Parsed again, every text contains a wording of its tool with operands that give its value and plan."""
    for split, examples in ((0, task.train[::7]), (1, task.validation[::2])):
        for example in examples:
            tool = task.tools[example.tool]
            steps = [STEPS[step] for step in example.plan]
            assert steps[0] == "read" and steps[-1] == "answer" and tool in steps
            change = CHANGES[steps[-2]] if steps[-2] in AFTERWARDS else float
            assert (steps[-2] in AFTERWARDS) == any(
                then in example.text for pair in AFTERWARDS.values() for then in pair[split]
            )
            told = [
                (wording, a, b) for wording in WORDINGS[tool][split] for a, b in matches(example.text, wording)
            ]  # fmt: skip
            fitting = [
                wording for wording, a, b in told
                if change(RESULTS[tool](a, b)) == example.value
                and ("swap" in steps) == (tool in ORDERED and wording.index("{b}") < wording.index("{a}"))
            ]  # fmt: skip
            assert fitting, (example.text, tool, example.value, steps)


def test_the_data_are_the_same_every_time(task) -> None:
    again = requests()
    assert tuple(again[0]) == task.train and tuple(again[1]) == task.validation
    assert requests(seed=1)[0][0] != task.train[0]
    assert load_tool_task("tools").fingerprint == task.fingerprint
    assert len(task.fingerprint) == 16


def test_signed_logarithm() -> None:
    assert signed_log(0) == 0 and signed_log(-5) == -signed_log(5)
    assert signed_log(1.718281828459045) == pytest.approx(1)


def save_rows(folder: Path, train: list[dict], validation: list[dict]) -> str:
    folder.mkdir()
    for name, rows in (("train", train), ("validation", validation)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_a_folder_of_requests(tmp_path: Path) -> None:
    rows = [
        {"text": "how warm is it", "tool": "weather", "value": 21.5, "plan": ["ask", "tell"]},
        {"text": "who wrote this", "tool": "search", "value": None, "plan": ["look", "tell"]},
    ]
    task = load_tool_task(save_rows(tmp_path / "rows", rows * 3, rows))
    assert task.tools == ("search", "weather") and task.steps == ("ask", "look", "tell")
    assert [e.tool for e in task.validation] == [1, 0]
    assert task.validation[0].value == 21.5 and task.validation[1].value != task.validation[1].value
    assert task.validation[0].plan == (0, 2)
    plain = [{"text": row["text"], "tool": row["tool"]} for row in rows]
    task = load_tool_task(save_rows(tmp_path / "plain", plain, plain))
    assert task.train[0].plan == () and task.train[0].value != task.train[0].value


def test_data_that_cannot_be_used_are_told_in_one_line(tmp_path: Path) -> None:
    row = {"text": "how warm is it", "tool": "weather"}
    for name, train, validation, told in (
        ("a", [{"text": "x", "label": 1}], [row], "expected columns text and tool"),
        ("b", [row], [{**row, "tool": "search"}], "search is in validation and not in training"),
    ):
        with pytest.raises(UserError, match=told) as error:
            load_tool_task(save_rows(tmp_path / name, train, validation))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot load data set"):
        load_tool_task("no-such-requests")
    with pytest.raises(UserError, match="there is no such folder"):
        load_tool_task(str(tmp_path / "c"))
