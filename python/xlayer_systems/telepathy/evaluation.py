"""Scores generated answers as counts, from which intervals are made."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from xlayer_systems.data.answers import AnswerExample, AnswerTask

ENTITY = re.compile(r"\d+(?:[.,]\d+)*|[A-Z]\w+")


def score(task: AnswerTask, generated: Sequence[str], examples: Sequence[AnswerExample]) -> dict[str, Any]:
    """Compares each text in ``generated`` with the answer of the example in the same place.

    Returns:
        ``correct``, ``total`` and ``invalid`` (texts that give no answer), all counts; ``diversity``, the distinct
        texts as a share of all; for a closed set of answers ``per_class``, label to ``[correct, total]`` for the labels
        that occur; for open answers ``entity_transfer``, see `entity_transfer`.

    Raises:
        ValueError: not one text per example, or none at all.
    """
    if len(generated) != len(examples) or not examples:
        raise ValueError(f"expected one generated text per example, got {len(generated)} and {len(examples)}")
    hits = [task.is_correct(text, example.answer) for text, example in zip(generated, examples, strict=True)]
    result: dict[str, Any] = {
        "correct": sum(hits),
        "total": len(examples),
        "invalid": sum(task.parse(text) is None for text in generated),
        "diversity": len({text.strip() for text in generated}) / len(examples),
    }
    if task.labels is None:
        result["entity_transfer"] = entity_transfer(generated, examples)
        return result
    per_class = {label: [0, 0] for label in task.labels}
    for hit, example in zip(hits, examples, strict=True):
        per_class[example.answer][0] += hit
        per_class[example.answer][1] += 1
    result["per_class"] = {label: counts for label, counts in per_class.items() if counts[1]}
    return result


def entity_transfer(generated: Sequence[str], examples: Sequence[AnswerExample]) -> float:
    """Returns the share of numbers and capitalized words of the examples' texts that the generated texts repeat.

    Every text counts a number or word once; the share is over all texts together, 0 where they have none.
    """
    found = total = 0
    for said, example in zip(generated, examples, strict=True):
        repeated, there = count_entities(said, example.text)
        found += repeated
        total += there
    return found / total if total else 0.0


def count_entities(generated: str, text: str) -> tuple[int, int]:
    """Returns how many of a text's numbers and capitalized words the generated text has, and how many there are."""
    wanted = set(ENTITY.findall(text))
    return len(wanted & set(ENTITY.findall(generated))), len(wanted)
