"""Text corpora for language models by name: the embedded one, local files, and what ``datasets`` can load."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlayer_systems.data.corpus import Corpus, load_corpus, split_of
from xlayer_systems.data.hub import load_splits
from xlayer_systems.errors import UserError

STDLIB = "stdlib-lm"
COLUMNS = ("text", "content", "sentence")


@dataclass(frozen=True)
class TextCorpus:
    """Documents in two splits; ``fingerprint`` identifies them."""

    name: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    fingerprint: str


def load_text(name: str) -> TextCorpus:
    """Returns the corpus ``name``; one that cannot be used raises `UserError`.

    * ``stdlib-lm``: the source of the Python standard library on this machine;
    * a folder of ``.txt`` files, a document each. Without ``train.txt`` and ``validation.txt`` the hash of a file's
      path says which split it belongs to, a fifth of the files for validation;
    * a folder with a ``train`` and a ``validation`` file (.jsonl, .csv or .parquet), or a data set of the hub such as
      ``wikitext/wikitext-2-raw-v1``: every row with a text is a document.
    """
    if name == STDLIB:
        return stdlib_text(load_corpus())
    folder = Path(name)
    if folder.is_dir() and (files := sorted(folder.rglob("*.txt"))):
        train, validation = _split_files(folder, files)
    else:
        rows = load_splits(name)[:2]
        train, validation = (_texts(name, split) for split in rows)
    for split, texts in (("train", train), ("validation", validation)):
        if not texts:
            raise UserError(f"data set {name!r}: expected text in both splits, found none in {split}")
    digest = hashlib.sha256(repr((train, validation)).encode()).hexdigest()[:16]
    return TextCorpus(name, train, validation, digest)


def stdlib_text(corpus: Corpus) -> TextCorpus:
    """Returns the files of the embedded corpus as documents."""
    train, validation = (tuple(file.text for file in corpus.of(split)) for split in ("train", "validation"))
    return TextCorpus(STDLIB, train, validation, corpus.hash)


def _split_files(folder: Path, files: list[Path]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    named = {file.stem: file for file in files if file.parent == folder}
    if {"train", "validation"} <= named.keys():
        return _read([named["train"]]), _read([named["validation"]])
    paths = {file: split_of(file.relative_to(folder).as_posix()) for file in files}
    train, validation = ([file for file in files if paths[file] == split] for split in ("train", "validation"))
    return _read(train), _read(validation)


def _read(files: Iterable[Path]) -> tuple[str, ...]:
    texts = []
    for file in files:
        try:
            texts.append(file.read_text("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not text in UTF-8") from error
    return tuple(text for text in texts if text)


def _texts(name: str, rows: Any) -> tuple[str, ...]:
    column = next((column for column in COLUMNS if column in rows.column_names), None)
    if column is None:
        expected = f"a column named {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}"
        raise UserError(f"data set {name!r}: expected {expected}; found {', '.join(rows.column_names)}")
    return tuple(text for text in rows[column] if text)
