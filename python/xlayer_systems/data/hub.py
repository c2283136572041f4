"""Data sets by name or path through ``datasets``: one loader for the hub, a saved data set and local files."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlayer_systems.data.tasks import Example, TextTask
from xlayer_systems.errors import UserError

# Column names in the order in which they are looked for; a pair comes before a single text.
PAIR_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "passage"),
    ("question1", "question2"),
)
TEXT_COLUMNS = ("sentence", "text")
LABEL_COLUMNS = ("label", "coarse_label", "answer")
VALIDATION_SPLITS = ("validation", "dev", "validation_matched", "test")
# "glue/rte" names a subset; elsewhere "a/b" is an owner and a name, and "a/b/c" a subset of it.
COLLECTIONS = ("glue", "super_glue", "wikitext")
FILE_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class _Columns:
    first: str
    second: str | None
    label: str


def load_named(name: str) -> TextTask:
    """Loads ``glue/rte`` or any other hub name, a folder written by ``save_to_disk``, or a folder of files.

    A folder of files holds one ``train`` and one ``validation`` file, as .jsonl, .csv or .parquet. Rows whose label is
    missing or -1 (GLUE's hidden test labels) are left out.
    """
    train, held_out, validation = load_splits(name)
    columns = _find_columns(name, train.column_names)
    if _find_columns(name, held_out.column_names) != columns:
        expected = f"the columns of training, {', '.join(train.column_names)}"
        raise UserError(
            f"data set {name!r}: expected in {validation} {expected}; found {', '.join(held_out.column_names)}"
        )
    labels, index_of = _labels(train, columns.label)
    examples = [_examples(name, split, columns, index_of) for split in (train, held_out)]
    digest = hashlib.sha256(repr((labels, examples)).encode()).hexdigest()[:16]
    return TextTask(name, examples[0], examples[1], labels, digest)


def load_splits(name: str) -> tuple[Any, Any, str]:
    """Returns training rows, validation rows, and the name of the split of the latter."""
    splits = _load(name)
    if "train" not in splits:
        raise UserError(f"data set {name!r}: expected a split named train, found {', '.join(splits)}")
    validation = next((split for split in VALIDATION_SPLITS if split in splits), None)
    if validation is None:
        raise UserError(f"data set {name!r}: expected a split named validation, found {', '.join(splits)}")
    return splits["train"], splits[validation], validation


def _load(name: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # the error below reports the cause in one line
    path = Path(name)
    if (path.is_absolute() or name.startswith(".")) and not path.exists():
        # Not a name of the hub; `datasets` would look through everything in its first folder.
        raise UserError(f"data set {name!r}: there is no such folder")
    try:
        if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
            loaded = datasets.load_from_disk(name)
            return loaded if isinstance(loaded, dict) else {"train": loaded}
        if path.is_dir():
            # One by one: files that disagree in their columns then reach the check below instead of failing inside.
            return {
                split: datasets.load_dataset(FILE_LOADERS[file.suffix], data_files=str(file), split="train")
                for split, file in _split_files(path).items()
            }
        collection, _, subset = name.partition("/")
        if collection not in COLLECTIONS:  # "owner/name", or "owner/name/subset"
            collection, subset = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
        return datasets.load_dataset(collection, subset) if subset else datasets.load_dataset(collection)
    except UserError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        expected = "stdlib-topics, stdlib-pairs, a hub data set such as glue/rte or a local folder"
        raise UserError(f"cannot load data set {name!r}; expected {expected} ({reason})") from error


def _split_files(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for split in ("train", *VALIDATION_SPLITS):
        matches = [folder / f"{split}{suffix}" for suffix in FILE_LOADERS if (folder / f"{split}{suffix}").is_file()]
        if matches:
            found[split] = matches[0]
    if "train" not in found:
        present = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        expected = "a train and a validation file (.jsonl, .csv or .parquet)"
        raise UserError(f"data set folder {folder}: expected {expected}, found {present}")
    return found


def _find_columns(name: str, found: list[str]) -> _Columns:
    label = next((column for column in LABEL_COLUMNS if column in found), None)
    pair = next((pair for pair in PAIR_COLUMNS if set(pair) <= set(found)), None)
    text = next((column for column in TEXT_COLUMNS if column in found), None)
    if label and pair:
        return _Columns(pair[0], pair[1], label)
    if label and text:
        return _Columns(text, None, label)
    expected = "sentence1, sentence2, label (a pair) or sentence, label (one text)"
    raise UserError(f"data set {name!r}: expected the columns {expected}; found {', '.join(found)}")


def _labels(train: Any, column: str) -> tuple[tuple[str, ...], dict[Any, int]]:
    names = getattr(train.features[column], "names", None)
    if names:
        return tuple(names), {index: index for index in range(len(names))}
    values = sorted({value for value in train[column] if value is not None and value != -1})
    return tuple(str(value) for value in values), {value: index for index, value in enumerate(values)}


def _examples(name: str, rows: Any, columns: _Columns, index_of: dict[Any, int]) -> tuple[Example, ...]:
    found: list[Example] = []
    for row in rows:
        label = row[columns.label]
        if label is None or label == -1:
            continue
        if label not in index_of:
            raise UserError(f"data set {name!r}: validation has the label {label!r}, which training does not have")
        second = None if columns.second is None else str(row[columns.second])
        found.append(Example(str(row[columns.first]), second, index_of[label]))
    if not found:
        raise UserError(f"data set {name!r}: a split has no labelled row")
    return tuple(found)
