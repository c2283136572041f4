"""The embedded data are honest: splits by path, no text in both; and every loader gives one format."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training_tools import rte_rows, save_backbone, save_rte
from xlayer_systems.data import load_task
from xlayer_systems.data.batches import ClassificationData, encode, epoch_batches
from xlayer_systems.data.corpus import load_corpus, split_of
from xlayer_systems.data.embedded import MIN_WORDS, near_copy_of
from xlayer_systems.data.tasks import Example, TextTask, words
from xlayer_systems.errors import UserError
from xlayer_systems.hf.encoders import load_tokenizer
from xlayer_systems.pretraining.encoder import PassagePairs, passages

SOURCE = '''"""A module about boats and harbours."""
class Boat:
    """Something that floats on water."""
    def sail(self, wind):
        """Move the boat as far as the wind takes it."""
        distance = wind * 2  # roughly
        return self.move(distance)
    def anchor(self): return None
'''


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(str(save_backbone(tmp_path_factory.mktemp("backbone"))))


@pytest.fixture
def library(tmp_path):
    for name in ("boats/sail.py", "site-packages/x.py", "test/y.py", "z.py", "_sysconfigdata_linux.py", "boats/bad.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("def broken(:" if name.endswith("bad.py") else SOURCE)
    return tmp_path


def test_the_corpus_is_the_library_without_what_depends_on_packaging(library):
    assert [file.path for file in load_corpus(library).files] == ["boats/bad.py", "boats/sail.py", "z.py"]


def test_definitions_separate_docstrings_from_bodies(library):
    files = {file.path: file for file in load_corpus(library).files}
    module, boat, sail, anchor = files["boats/sail.py"].definitions
    assert module.docstring == "A module about boats and harbours." and module.body == ""
    assert boat.docstring == "Something that floats on water." and boat.body == ""
    assert sail.docstring.startswith("Move the boat")
    assert sail.body == "distance = wind * 2  # roughly\nreturn self.move(distance)"
    assert anchor.docstring == "" and anchor.body == ""
    assert files["boats/bad.py"].definitions == ()


def test_the_hash_covers_names_and_contents(library):
    before = load_corpus(library).hash
    load_corpus.cache_clear()
    assert load_corpus(library).hash == before
    load_corpus.cache_clear()
    (library / "z.py").write_text(SOURCE + "\n")
    changed = load_corpus(library).hash
    load_corpus.cache_clear()
    (library / "z.py").rename(library / "w.py")
    assert len({before, changed, load_corpus(library).hash}) == 3


def test_a_library_without_source_is_refused(tmp_path):
    with pytest.raises(UserError, match="no Python source"):
        load_corpus(tmp_path)


def test_the_split_is_a_function_of_the_path_and_never_changes():
    paths = [f"package/module{index}.py" for index in range(4000)]
    held_out = sum(split_of(path) == "validation" for path in paths)
    assert 0.17 < held_out / len(paths) < 0.23
    # With another split the shipped backbone would have read validation text, so this one is pinned.
    pinned = {
        "tkinter/__init__.py": "train",
        "logging/__init__.py": "train",
        "logging/handlers.py": "validation",
        "asyncio/events.py": "train",
        "email/message.py": "train",
    }
    assert {path: split_of(path) for path in pinned} == pinned


def test_topics_have_ten_packages_on_both_sides_and_a_low_majority():
    task = load_task("stdlib-topics")
    for split in (task.train, task.validation):
        assert {example.label for example in split} == set(range(10))
        assert all(example.second is None and len(words(example.first)) >= MIN_WORDS for example in split)
    correct, total = task.majority()
    assert total == len(task.validation) > 400 and correct / total < 0.30
    assert task.lexical() is None


def test_topics_come_from_the_docstrings_of_their_split_and_package():
    task, corpus = load_task("stdlib-topics"), load_corpus()
    for name, examples in (("train", task.train), ("validation", task.validation)):
        sources = {(d.docstring, file.package) for file in corpus.of(name) for d in file.definitions if d.docstring}
        assert all((example.first, task.labels[example.label]) in sources for example in examples)


def test_no_validation_text_is_in_training_or_in_what_the_backbone_reads():
    task, corpus = load_task("stdlib-topics"), load_corpus()
    read = {tuple(words(text)) for file in corpus.of("train") for pair in passages(file) for text in pair}
    assert not read & {tuple(words(example.first)) for example in task.validation}
    # Near copies too, found here the slow way for a sample.
    triples = [_triples(example.first) for example in task.train]
    for example in task.validation[::10]:
        found = _triples(example.first)
        assert max(len(found & other) / len(found | other) for other in triples) < 0.7
    pairs = load_task("stdlib-pairs")
    assert not {e.first for e in pairs.train} & {e.first for e in pairs.validation}


def _triples(text: str) -> set[tuple[str, ...]]:
    parts = words(text)
    return {tuple(parts[i : i + 3]) for i in range(max(1, len(parts) - 2))}


def test_near_copies_are_found_and_others_are_not():
    is_copy = near_copy_of(["Return the name of the file that was opened first", "one two three four five six seven"])
    assert is_copy("return the name of the file that was opened last.")
    assert is_copy("One two three: four five six seven!")
    assert not is_copy("Return the size of the file")


def test_pairs_are_balanced_and_their_negatives_share_the_file():
    task, corpus = load_task("stdlib-pairs"), load_corpus()
    homes = defaultdict(set)
    for file in corpus.files:
        for definition in file.definitions:
            homes[definition.body].add(file.path)
    for examples in (task.train, task.validation):
        assert sum(example.label for example in examples) * 2 == len(examples)
        for true, false in zip(examples[::2], examples[1::2], strict=True):
            assert (true.label, false.label) == (0, 1) and true.first == false.first and true.second != false.second
            assert homes[true.second] & homes[false.second]
    lexical = task.lexical()
    assert lexical is not None and lexical[0] / lexical[1] > 0.55


def test_pretraining_reads_training_files_only(tokenizer):
    corpus = load_corpus()
    small = type(corpus)(tuple(file for file in corpus.files if file.package == "logging"), "x")
    pairs = PassagePairs(small, tokenizer, max_length=64, seed=0)
    allowed = [tokenizer(text, truncation=True, max_length=64)["input_ids"] for f in small.of("train")
               for pair in passages(f) for text in pair if text]  # fmt: skip
    assert len(pairs.train) > 50
    assert all(
        pair.first in allowed and pair.second in allowed and pair.first != pair.second for pair in pairs.train[:80]
    )


def test_majority_and_lexical_rows_by_hand():
    train = (Example("a b", "a b", 0), Example("a b", "c d", 1), Example("a b", "b a", 0))
    validation = (Example("x y", "y x", 0), Example("x y", "z", 1), Example("x", "x", 1))
    task = TextTask("t", train, validation, ("yes", "no"), "h")
    assert task.majority() == (1, 3)
    assert task.lexical() == (2, 3)


def test_batches_of_pairs_have_the_agreed_format(tokenizer):
    examples = [Example("the cat eats", "the dog", 0), Example("the bird sees the fish", "the horse likes", 1)]
    data = ClassificationData(TextTask("t", tuple(examples), tuple(examples), ("a", "b"), "h"), tokenizer, 64)
    batch = data.collate(data.train)
    shape = batch["input_ids"].shape
    assert set(batch) == {"input_ids", "attention_mask", "segment_ids", "special_tokens_mask", "labels"}
    assert all(batch[key].shape == shape and batch[key].dtype == torch.int64 for key in set(batch) - {"labels"})
    assert batch["labels"].tolist() == [0, 1]
    lengths = batch["attention_mask"].sum(1)
    assert lengths.max() == shape[1] and (batch["attention_mask"][0, : lengths[0]] == 1).all()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()
    is_special = batch["segment_ids"] == -1
    assert torch.equal(is_special, batch["special_tokens_mask"] == 1)
    assert is_special[0].tolist()[: lengths[0]].count(True) == 4  # <s> first </s></s> second </s>
    for row, example in enumerate(examples):
        for segment, text in ((0, example.first), (1, example.second)):
            assert tokenizer.decode(batch["input_ids"][row][batch["segment_ids"][row] == segment]).strip() == text


def test_single_texts_are_one_segment_and_long_ones_are_cut(tokenizer):
    encoded = encode([Example("the cat eats the dog and the bird", None, 0)], tokenizer, 6)[0]
    assert len(encoded.input_ids) == 6 and encoded.segment_ids == [0] * 6
    assert encoded.special == [1, 0, 0, 0, 0, 1]


def test_scores_add_up_to_accuracy_f1_and_loss(tokenizer):
    examples = tuple(Example("the cat", None, label) for label in (0, 0, 1, 1))
    data = ClassificationData(TextTask("t", examples, examples, ("a", "b"), "h"), tokenizer, 16)
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 2.0], [0.0, 2.0]])
    batch = data.collate(data.validation)
    metrics = data.summarize(data.score(type("Output", (), {"logits": logits}), batch).sum(0))
    assert (metrics["correct"], metrics["total"], metrics["accuracy"]) == (3, 4, 0.75)
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert metrics["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, batch["labels"]).item())


@given(
    lengths=st.lists(st.integers(1, 50), max_size=200),
    size=st.integers(1, 9),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)
def test_an_epoch_visits_each_example_at_most_once_in_full_batches(lengths, size, seed, epoch):
    batches = epoch_batches(lengths, size, seed, epoch)
    visited = [index for batch in batches for index in batch]
    assert all(len(batch) == size for batch in batches)
    assert len(set(visited)) == len(visited) == len(lengths) - len(lengths) % size
    assert batches == epoch_batches(lengths, size, seed, epoch)


def test_epochs_and_seeds_differ_and_batches_are_of_similar_length():
    lengths = [index % 64 + 1 for index in range(640)]
    first = epoch_batches(lengths, 8, 0, 0)
    assert first != epoch_batches(lengths, 8, 0, 1) and first != epoch_batches(lengths, 8, 1, 0)
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in first]
    assert sum(spread) / len(spread) < 10


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "save_to_disk"])
def test_local_data_sets_with_rtes_columns(tmp_path, form):
    folder = tmp_path / "rte"
    if form == "jsonl":
        save_rte(folder, train=6, validation=4)
    else:
        rows = {"train": rte_rows(6, 0), "validation": rte_rows(4, 1)}
        _save_as(form, folder, rows)
    task = load_task(str(folder))
    expected = [Example(row["sentence1"], row["sentence2"], row["label"]) for row in rte_rows(6, 0)]
    assert list(task.train) == expected and len(task.validation) == 4
    assert task.labels == ("0", "1") and len(task.fingerprint) == 16


def _save_as(form: str, folder: Path, rows: dict) -> None:
    if form == "csv":
        folder.mkdir()
        for name, content in rows.items():
            with (folder / f"{name}.csv").open("w", newline="") as stream:
                writer = csv.DictWriter(stream, content[0].keys())
                writer.writeheader()
                writer.writerows(content)
        return
    splits = datasets.DatasetDict({name: datasets.Dataset.from_list(content) for name, content in rows.items()})
    if form == "save_to_disk":
        splits.save_to_disk(str(folder))
        return
    folder.mkdir()
    for name, split in splits.items():
        split.to_parquet(str(folder / f"{name}.parquet"))


def test_named_labels_and_hidden_test_labels(tmp_path):
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    rows = {"sentence": ["a", "b", "c"], "label": [1, -1, 0]}
    split = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": split, "validation": split}).save_to_disk(str(tmp_path / "d"))
    task = load_task(str(tmp_path / "d"))
    assert task.labels == ("bad", "good")
    assert task.train == (Example("a", None, 1), Example("c", None, 0))


def test_bad_data_sets_say_what_was_expected(tmp_path):
    folder = save_rte(tmp_path / "rte")
    (folder / "train.jsonl").write_text('{"premiss": "a", "hypothese": "b", "gold": 1}\n')
    with pytest.raises(UserError, match=r"expected the columns sentence1, sentence2, label .* found premiss, hyp"):
        load_task(str(folder))
    (folder / "train.jsonl").unlink()
    with pytest.raises(UserError, match=r"expected a train and a validation file .* found validation\.jsonl"):
        load_task(str(folder))
    with pytest.raises(UserError, match=r"cannot load data set 'no/such/thing'; expected stdlib-topics"):
        load_task("no/such/thing")
    with pytest.raises(UserError, match="stdlib-lm is a corpus"):
        load_task("stdlib-lm")
