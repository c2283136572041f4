"""Data sets by name: the embedded ones, and everything that ``datasets`` can load."""

from __future__ import annotations

from xlayer_systems.data.embedded import stdlib_pairs, stdlib_topics
from xlayer_systems.data.hub import load_named
from xlayer_systems.data.tasks import Example, TextTask
from xlayer_systems.errors import UserError

EMBEDDED = {"stdlib-topics": stdlib_topics, "stdlib-pairs": stdlib_pairs}

__all__ = ["EMBEDDED", "Example", "TextTask", "load_task"]


def load_task(name: str) -> TextTask:
    """Returns the classification task ``name``; an unknown name raises `UserError` saying what was expected."""
    if name in EMBEDDED:
        return EMBEDDED[name]()
    if name == "stdlib-lm":
        raise UserError(
            "stdlib-lm is a corpus for `xlayer pretrain`; expected a classification data set such as stdlib-topics"
        )
    return load_named(name)
