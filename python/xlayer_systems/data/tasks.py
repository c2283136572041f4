"""Defines a data set: examples of text with labels, in two splits."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """Holds one text (``second`` is None) or a pair of texts, with the index of its label."""

    first: str
    second: str | None
    label: int


@dataclass(frozen=True)
class TextTask:
    """Holds a classification task in two splits.

    ``fingerprint`` identifies the data (for embedded tasks the corpus hash); a run can only be resumed on the same one.
    """

    name: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    labels: tuple[str, ...]
    fingerprint: str

    @property
    def has_pairs(self) -> bool:
        """Tells whether the examples are pairs of texts."""
        return self.train[0].second is not None

    def majority(self) -> tuple[int, int]:
        """Returns correct answers and examples in validation for always answering training's most frequent label."""
        label = Counter(example.label for example in self.train).most_common(1)[0][0]
        return sum(example.label == label for example in self.validation), len(self.validation)

    def lexical(self) -> tuple[int, int] | None:
        """Returns the same for one threshold on the words that the pair shares, set on training; None for single texts.

        The score of a pair is the share of the shorter text's words that the other one has too.
        """
        if not self.has_pairs or len(self.labels) != 2:
            return None
        ranked = sorted((_overlap(example), example.label) for example in self.train)
        # Scanning thresholds upwards: everything below the threshold is answered ``below``, the rest 1 - ``below``.
        best = (-1, 0.0, 0)
        for below in (0, 1):
            hits = sum(label != below for _, label in ranked)
            for index, (score, label) in enumerate(ranked):
                if (index == 0 or ranked[index - 1][0] != score) and hits > best[0]:
                    best = (hits, score, below)
                hits += 1 if label == below else -1
        _, threshold, below = best
        correct = sum((below if _overlap(e) < threshold else 1 - below) == e.label for e in self.validation)
        return correct, len(self.validation)


def words(text: str) -> list[str]:
    """Returns the lower-cased words of a text: maximal runs of letters and digits, so ``read_file`` is two words."""
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def _overlap(example: Example) -> float:
    first, second = set(words(example.first)), set(words(example.second or ""))
    return len(first & second) / max(1, min(len(first), len(second)))
