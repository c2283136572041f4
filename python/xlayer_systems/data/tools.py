"""Requests that need a tool: which one, what its result is, and the steps that lead there.

A request is made of a frame ("Instead of …, compute …."), a verb, what is asked for ("17 groups of 5") and, half of the
time, something to do with the result. Tools share all verbs and frames and most words of what is asked for; two frames
in three also name what is *not* asked for, with another tool. Which tool it is has to be read from how the words stand
together. Validation has frames, verbs, wordings and numbers of its own.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xlayer_systems.data.hub import load_splits
from xlayer_systems.data.tasks import words
from xlayer_systems.errors import UserError

NAME = "tools"
TRAIN, VALIDATION = 8000, 800
HELD_OUT_NUMBERS = 20  # of 2 … 99

# Per tool: wordings of training, wordings of validation. a is the first operand, b the second, wherever they stand.
WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "add": (
        (
            "the sum of {a} and {b}", "{a} plus {b}", "{a} + {b}", "the total of {a} and {b}", "{a} increased by {b}",
            "{b} more than {a}", "what {a} and {b} make together", "{b} added to {a}", "the number {b} above {a}",
            "{a} together with {b}", "the whole of two parts, {a} and {b}",
        ),
        ("the total when {b} is added to {a}", "{a} and {b} together", "what is {b} more than {a}"),
    ),
    "subtract": (
        (
            "the difference of {a} and {b}", "{a} minus {b}", "{a} - {b}", "{b} less than {a}", "{a} decreased by {b}",
            "{b} taken from {a}", "the number {b} below {a}", "what is left of {a} without {b}",
            "how much more {a} is than {b}", "{a} without {b}", "what is missing from {b} to {a}",
        ),
        ("the difference when {b} is taken from {a}", "how much {b} is below {a}", "what is left without {b} of {a}"),
    ),
    "multiply": (
        (
            "the product of {a} and {b}", "{a} times {b}", "{a} * {b}", "{a} multiplied by {b}",
            "the total of {a} groups of {b}", "{b} taken {a} times", "the area of a field of {a} by {b}",
            "{a} rows with {b} in each row", "what {a} parts of {b} make together", "{b} for each of {a}",
            "the sum of {b} taken {a} times",
        ),
        ("the product when {a} is multiplied by {b}", "the total of {a} rows of {b}", "what {a} groups of {b} make"),
    ),
    "divide": (
        (
            "the quotient of {a} and {b}", "{a} divided by {b}", "{a} / {b}", "{a} over {b}", "{a} shared among {b}",
            "how many groups of {b} there are in {a}", "the size of each part of {a} cut in {b} parts",
            "how often {b} goes into {a}", "what each of {b} gets of {a}", "the ratio of {a} to {b}",
            "how many times {b} fits in {a}",
        ),
        (
            "the quotient when {a} is divided by {b}", "how many times {b} goes into {a}",
            "the size of each part when {a} is shared among {b}",
        ),
    ),
    "remainder": (
        (
            "the remainder of {a} by {b}", "{a} modulo {b}", "{a} % {b}", "what is left over of {a} divided by {b}",
            "the rest of {a} after groups of {b}", "what remains of {a} after it is shared among {b}",
            "the rest when {b} goes into {a}", "what is left of {a} when each of {b} got the same",
            "the remainder when {a} is cut in {b} parts", "what does not fit when {a} goes in groups of {b}",
            "{a} mod {b}",
        ),
        (
            "the remainder when {a} is divided by {b}", "what is left over when {a} is shared among {b}",
            "the rest of {a} after it is cut in {b} parts",
        ),
    ),
    "percent": (
        (
            "{a} percent of {b}", "a share of {a} percent in {b}", "{a}% of {b}", "{a} hundredths of {b}",
            "the part of {b} that {a} percent make", "{b} times {a} percent", "{a} parts in a hundred of {b}",
            "how much {a} in every hundred of {b} is", "a tax of {a} percent on {b}",
            "the interest on {b} at {a} percent", "{b} taken at {a} percent",
        ),
        ("the share of {b} that {a} percent make", "{a} in every hundred of {b}", "the part of {b} at {a} percent"),
    ),
}  # fmt: skip
RESULTS: dict[str, Callable[[int, int], float]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "remainder": lambda a, b: a % b,
    "percent": lambda a, b: a * b / 100,
}
ORDERED = ("subtract", "divide", "remainder", "percent")  # it matters which operand is named first
FRAMES = (
    (
        "{Verb} {right}{then}.", "Please {verb} {right}{then}.", "Could you {verb} {right}{then}?",
        "What is asked is {right}: {verb} it{then}.", "{Verb} {right}{then}, not {wrong}.",
        "Do not {verb} {wrong}; {verb} {right}{then}.", "Instead of {wrong}, {verb} {right}{then}.",
        "Tom asked for {wrong}, but you should {verb} {right}{then}.", "We need {right}, not {wrong}: {verb} it{then}.",
        "The question is not {wrong} but {right}, so {verb} that{then}.",
        "We know {wrong} already, so {verb} {right}{then}.", "Leave {wrong} alone and {verb} {right}{then}.",
    ),
    (
        "Now {verb} {right}{then}.", "You should {verb} {right}{then}.", "{Verb} {right}{then} and not {wrong}.",
        "Tom asked not for {wrong} but for {right}: {verb} it{then}.",
        "Do not {verb} {wrong}, but {verb} {right}{then}.",
        "Leave {wrong}; what we need is {right}, so {verb} it{then}.",
    ),
)  # fmt: skip
VERBS = (
    ("compute", "find", "calculate", "determine", "work out", "tell me", "write down", "give", "check", "report"),
    ("evaluate", "return", "get", "show", "print"),
)
# What may happen to the result: wordings in training and in validation, and what they do.
AFTERWARDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "double": ((", then double it", " and take the result twice"), (" and double the result",)),
    "halve": ((", then halve it", " and take half of the result"), (" and halve the result",)),
    "negate": ((", then negate it", " and change the sign of the result"), (" and negate the result",)),
}
CHANGES: dict[str, Callable[[float], float]] = {
    "double": lambda x: 2 * x, "halve": lambda x: x / 2, "negate": lambda x: -x
}  # fmt: skip
STEPS = ("read", "swap", *WORDINGS, *AFTERWARDS, "answer")


@dataclass(frozen=True)
class ToolExample:
    """Holds a request, the index of its tool, the result, and the steps of its plan by their indices."""

    text: str
    tool: int
    value: float
    plan: tuple[int, ...]


@dataclass(frozen=True)
class ToolTask:
    """Requests in two splits; ``tools`` and ``steps`` are names, ``fingerprint`` identifies the data."""

    name: str
    train: tuple[ToolExample, ...]
    validation: tuple[ToolExample, ...]
    tools: tuple[str, ...]
    steps: tuple[str, ...]
    fingerprint: str

    def majority(self) -> tuple[int, int]:
        """Returns right answers and examples in validation for always taking training's most frequent tool."""
        tool = Counter(example.tool for example in self.train).most_common(1)[0][0]
        return sum(example.tool == tool for example in self.validation), len(self.validation)

    def keyword(self) -> tuple[int, int]:
        """Returns the same for a rule of one word: the request's word that identified a tool best in training."""
        seen: dict[str, Counter[int]] = defaultdict(Counter)
        for example in self.train:
            for word in set(words(example.text)):
                seen[word][example.tool] += 1
        sure: dict[str, tuple[float, int]] = {}
        for word, counts in seen.items():
            tool, hits = counts.most_common(1)[0]
            sure[word] = ((hits + 1) / (counts.total() + len(self.tools)), tool)
        usual = (0.0, Counter(example.tool for example in self.train).most_common(1)[0][0])
        chosen = (max((sure[word] for word in words(e.text) if word in sure), default=usual) for e in self.validation)
        return sum(c[1] == e.tool for c, e in zip(chosen, self.validation, strict=True)), len(self.validation)


def load_tool_task(name: str) -> ToolTask:
    """Returns the task ``name``; one that cannot be used raises `UserError`.

    * ``tools``: the requests that are made here;
    * a folder with a train and a validation file (.jsonl, .csv or .parquet) or a data set of the hub with columns
      ``text`` and ``tool`` (a name), and perhaps ``value`` (a number) and ``plan`` (names of steps).
    """
    if name == NAME:
        train, validation = requests()
        return _task(name, train, validation, tuple(WORDINGS), STEPS)
    splits = [list(rows) for rows in load_splits(name)[:2]]
    for row in (row for rows in splits for row in rows):
        if not isinstance(row.get("text"), str) or not isinstance(row.get("tool"), str):
            raise UserError(f"data set {name!r}: expected columns text and tool, both text, got {', '.join(row)}")
    tools = tuple(sorted({row["tool"] for row in splits[0]}))
    steps = tuple(sorted({step for row in splits[0] for step in row.get("plan") or ()})) or ("answer",)
    read = [_read(name, rows, tools, steps) for rows in splits]
    return _task(name, read[0], read[1], tools, steps)


def requests(
    seed: int = 0, train: int = TRAIN, validation: int = VALIDATION
) -> tuple[list[ToolExample], list[ToolExample]]:
    """Returns training and validation examples, no request twice."""
    draw = random.Random(f"tools/{seed}")
    numbers = list(range(2, 100))
    draw.shuffle(numbers)
    kept_apart = (numbers[HELD_OUT_NUMBERS:], numbers[:HELD_OUT_NUMBERS])
    made: dict[str, ToolExample] = {}
    for split, until in ((0, train), (1, train + validation)):
        while len(made) < until:
            example = _request(draw, split, kept_apart[split])
            made.setdefault(example.text, example)
    examples = list(made.values())
    return examples[:train], examples[train:]


def signed_log(value: float) -> float:
    """Computes ``sign(v)·log(1 + |v|)``, the target of the value head, so that products do not dominate the loss."""
    return math.copysign(math.log1p(abs(value)), value)


def _request(draw: random.Random, split: int, numbers: Sequence[int]) -> ToolExample:
    tool, other = draw.sample(list(WORDINGS), 2)
    a, b, *others = (draw.choice(numbers) for _ in range(4))
    wording = draw.choice(WORDINGS[tool][split])
    value, steps, then = RESULTS[tool](a, b), ["read"], ""
    if tool in ORDERED and wording.index("{b}") < wording.index("{a}"):
        steps.append("swap")
    steps.append(tool)
    if draw.random() < 0.5:
        afterwards = draw.choice(list(AFTERWARDS))
        then, value = draw.choice(AFTERWARDS[afterwards][split]), CHANGES[afterwards](value)
        steps.append(afterwards)
    verb = draw.choice(VERBS[split])
    text = draw.choice(FRAMES[split]).format(
        verb=verb, Verb=verb.capitalize(), then=then, right=wording.format(a=a, b=b),
        wrong=draw.choice(WORDINGS[other][split]).format(a=others[0], b=others[1]),
    )  # fmt: skip
    plan = tuple(STEPS.index(step) for step in [*steps, "answer"])
    return ToolExample(text, list(WORDINGS).index(tool), value, plan)


def _read(
    name: str, rows: Iterable[Mapping[str, Any]], tools: tuple[str, ...], steps: tuple[str, ...]
) -> list[ToolExample]:
    examples = []
    for row in rows:
        plan = tuple(row.get("plan") or ())
        unknown = ({row["tool"]} - set(tools)) | (set(plan) - set(steps))
        if unknown:
            raise UserError(f"data set {name!r}: {', '.join(sorted(unknown))} is in validation and not in training")
        value = row.get("value")
        number = float("nan") if value is None else float(value)
        examples.append(ToolExample(row["text"], tools.index(row["tool"]), number, tuple(map(steps.index, plan))))
    return examples


def _task(
    name: str, train: Sequence[ToolExample], validation: Sequence[ToolExample], tools: tuple[str, ...],
    steps: tuple[str, ...],
) -> ToolTask:  # fmt: skip
    digest = hashlib.sha256(repr((tools, steps, train, validation)).encode()).hexdigest()[:16]
    return ToolTask(name, tuple(train), tuple(validation), tools, steps, digest)
