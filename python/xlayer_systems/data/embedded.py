"""The embedded classification tasks, cut from the corpus: ``stdlib-topics`` and ``stdlib-pairs``."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

from xlayer_systems.data.corpus import Corpus, Definition, load_corpus
from xlayer_systems.data.tasks import Example, TextTask, words
from xlayer_systems.errors import UserError

TOPICS = 10
MIN_WORDS = 4
DUPLICATE_SIMILARITY = 0.7
MIN_BODY_CHARACTERS = 40


@lru_cache(maxsize=2)
def stdlib_topics(corpus: Corpus | None = None) -> TextTask:
    """Makes the task: which of ten packages does this docstring come from?

    The ten packages with the most docstrings, among those that have files in both splits. The input is the docstring's
    text and nothing else. A docstring that occurs twice is used once, and a validation docstring that is a near copy of
    any training docstring (of any package: the small backbone has read them all) is dropped.
    """
    corpus = corpus or load_corpus()
    packages = _largest_packages(corpus)
    if len(packages) < TOPICS:
        raise UserError(f"stdlib-topics needs {TOPICS} packages in both splits; this library has {len(packages)}")
    label_of = {package: index for index, package in enumerate(packages)}

    def examples(split: str) -> Iterator[Example]:
        for file in corpus.of(split):
            if file.package in label_of:
                yield from (Example(d.docstring, None, label_of[file.package]) for d in _documented(file.definitions))

    train = _first_of_each(examples("train"))
    everything_read = (d.docstring for file in corpus.of("train") for d in file.definitions if d.docstring)
    is_copy = near_copy_of(everything_read)
    validation = tuple(e for e in _first_of_each(examples("validation")) if not is_copy(e.first))
    return TextTask("stdlib-topics", train, validation, packages, corpus.hash)


@lru_cache(maxsize=2)
def stdlib_pairs(corpus: Corpus | None = None) -> TextTask:
    """Makes sentence pairs in the shape of RTE: does this docstring describe this function body?

    Each documented function gives one true pair (label 0, "entailment") and one false pair (label 1) whose body belongs
    to the next documented function of the same file, so the file's vocabulary does not give the answer away.
    """
    corpus = corpus or load_corpus()
    everything_read = (d.docstring for file in corpus.of("train") for d in file.definitions if d.docstring)
    is_copy = near_copy_of(everything_read)

    def examples(split: str) -> Iterator[Example]:
        for file in corpus.of(split):
            functions = [d for d in _documented(file.definitions) if len(d.body) >= MIN_BODY_CHARACTERS]
            if split == "validation":
                functions = [d for d in functions if not is_copy(d.docstring)]
            for index, function in enumerate(functions):
                other = functions[(index + 1) % len(functions)]
                if other.body != function.body:
                    yield Example(function.docstring, function.body, 0)
                    yield Example(function.docstring, other.body, 1)

    labels = ("entailment", "not_entailment")
    return TextTask("stdlib-pairs", tuple(examples("train")), tuple(examples("validation")), labels, corpus.hash)


def near_copy_of(texts: Iterable[str]) -> Callable[[str], bool]:
    """Makes a test for near copies of ``texts``: Jaccard similarity of word triples ≥ ``DUPLICATE_SIMILARITY``."""
    sizes: list[int] = []
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, text in enumerate(texts):
        shingles = _shingles(text)
        sizes.append(len(shingles))
        for shingle in shingles:
            holders[shingle].append(index)

    def is_copy(text: str) -> bool:
        shingles = _shingles(text)
        shared = Counter(index for shingle in shingles for index in holders.get(shingle, ()))
        return any(n >= DUPLICATE_SIMILARITY * (len(shingles) + sizes[index] - n) for index, n in shared.items())

    return is_copy


def _largest_packages(corpus: Corpus) -> tuple[str, ...]:
    counts: Counter[str] = Counter()
    splits: dict[str, set[str]] = defaultdict(set)
    for file in corpus.files:
        found = sum(1 for _ in _documented(file.definitions))
        if file.package and found:
            counts[file.package] += found
            splits[file.package].add(file.split)
    eligible = [package for package in counts if len(splits[package]) == 2]
    return tuple(sorted(sorted(eligible, key=lambda package: (-counts[package], package))[:TOPICS]))


def _documented(definitions: Iterable[Definition]) -> Iterator[Definition]:
    return (d for d in definitions if len(words(d.docstring)) >= MIN_WORDS)


def _first_of_each(examples: Iterable[Example]) -> tuple[Example, ...]:
    unique: dict[tuple[str, ...], Example] = {}
    for example in examples:
        unique.setdefault(tuple(words(example.first)), example)
    return tuple(unique.values())


def _shingles(text: str) -> set[tuple[str, ...]]:
    parts = words(text)
    return {tuple(parts[i : i + 3]) for i in range(max(1, len(parts) - 2))}
