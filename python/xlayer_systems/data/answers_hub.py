"""Question answering sets of the hub that are no plain classification, and labels as words that a model can
generate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from xlayer_systems.data.hub import load_splits
from xlayer_systems.data.synthetic import Rows
from xlayer_systems.errors import UserError

Read = tuple[Rows, Rows, tuple[str, ...] | None]
LETTERS = ("A", "B", "C", "D", "E")
# Abbreviated labels of the data sets, written out.
LABEL_WORDS = {
    "Sci/Tech": "Technology",
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "human",
    "LOC": "location",
    "NUM": "number",
}


def readable(name: str, labels: Iterable[str]) -> tuple[str, ...]:
    """Turns labels into words: abbreviations written out, underscores as spaces; two that become the same are
    refused."""
    found = tuple(LABEL_WORDS.get(label, label.replace("_", " ").strip()) for label in labels)
    if len(set(found)) < len(found):
        raise UserError(f"data set {name!r}: expected labels that differ as words, got {', '.join(found)}")
    return found


def gsm8k() -> Read:
    """Loads word problems; the answer is the number after ``####`` of the worked solution."""

    def read(row: Mapping[str, Any]) -> tuple[str, str] | None:
        _, mark, number = row["answer"].rpartition("####")
        return (row["question"], number.strip().replace(",", "")) if mark and number.strip() else None

    return (*_rows("gsm8k", "openai/gsm8k/main", ("question", "answer"), read), None)


def boolq() -> Read:
    """Loads questions about a passage; the answer is yes or no."""

    def read(row: Mapping[str, Any]) -> tuple[str, str] | None:
        return f"{row['passage']}\nQuestion: {row['question']}?", "yes" if row["answer"] else "no"

    return (*_rows("boolq", "google/boolq", ("question", "passage", "answer"), read), ("no", "yes"))


def piqa() -> Read:
    """Returns a goal and two ways to it; the letter of the right one."""

    def read(row: Mapping[str, Any]) -> tuple[str, str] | None:
        if row["label"] not in (0, 1):
            return None  # hidden labels are -1
        return f"{row['goal']}\nA: {row['sol1']}\nB: {row['sol2']}", LETTERS[row["label"]]

    return (*_rows("piqa", "ybisk/piqa", ("goal", "sol1", "sol2", "label"), read), LETTERS[:2])


def commonsense_qa() -> Read:
    """Returns a question with five choices; the letter of the right one."""

    def read(row: Mapping[str, Any]) -> tuple[str, str] | None:
        choices = zip(row["choices"]["label"], row["choices"]["text"], strict=True)
        lines = [row["question"], *(f"{letter}: {text}" for letter, text in choices)]
        return ("\n".join(lines), row["answerKey"]) if row["answerKey"] else None

    columns = ("question", "choices", "answerKey")
    return (*_rows("commonsense_qa", "tau/commonsense_qa", columns, read), LETTERS)


READERS: dict[str, Callable[[], Read]] = {
    "gsm8k": gsm8k,
    "boolq": boolq,
    "piqa": piqa,
    "commonsense_qa": commonsense_qa,
}


def _rows(
    name: str, address: str, columns: tuple[str, ...], read: Callable[[Mapping[str, Any]], tuple[str, str] | None]
) -> tuple[Rows, Rows]:
    train, held_out, validation = load_splits(address)
    found = []
    for split, rows in (("train", train), (validation, held_out)):
        if not set(columns) <= set(rows.column_names):
            present = ", ".join(rows.column_names)
            raise UserError(f"data set {name!r}: expected in {split} the columns {', '.join(columns)}; found {present}")
        kept = [pair for row in rows if (pair := read(row)) is not None]
        if not kept:
            raise UserError(f"data set {name!r}: {split} has no row with an answer")
        found.append(kept)
    return found[0], found[1]
