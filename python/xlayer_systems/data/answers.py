"""Tasks whose answer is a text: one model reads, another must generate the answer."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from xlayer_systems.data import EMBEDDED, answers_hub, load_task
from xlayer_systems.data.synthetic import Rows, passkeys, sums
from xlayer_systems.data.tasks import Example, TextTask

# A minus sign after a digit or letter is none: "12-5" and "page-3".
NUMBER = re.compile(r"(?:(?<!\w)-)?\d+(?:,\d{3})*(?:\.\d+)?")
STRIPPED = " \t\r\n\"'`“”‘’*([{"
INSTRUCTIONS = {
    "stdlib-topics": "Which package is this docstring from?",
    "passkey": "What is the passkey in this text?",
    "arithmetic": "What is the result?",
    "glue/sst2": "Is the sentiment of this review negative or positive?",
    "ag_news": "Is this news about World, Sports, Business or Technology?",
    "trec": "What does this question ask for?",
    "banking77": "What does this bank customer want?",
    "gsm8k": "Solve this problem. What is the final number?",
    "boolq": "Answer the question about this passage with yes or no.",
    "piqa": "Which solution reaches the goal? Answer with its letter.",
    "commonsense_qa": "Which choice answers the question? Answer with its letter.",
}


@dataclass(frozen=True)
class AnswerExample:
    """Holds the sender's input ``text`` and the receiver's expected output ``answer``."""

    text: str
    answer: str


@dataclass(frozen=True)
class AnswerTask:
    """Holds a task with text answers in two splits.

    Attributes:
        labels: the closed set of answers, or None where the answer is any number.
        instruction: one line for prompts.
        fingerprint: identifies the data.
    """

    name: str
    train: tuple[AnswerExample, ...]
    validation: tuple[AnswerExample, ...]
    labels: tuple[str, ...] | None
    instruction: str
    fingerprint: str

    def majority(self) -> tuple[int, int]:
        """Returns correct answers and examples in validation for always giving training's commonest answer."""
        answer = Counter(example.answer for example in self.train).most_common(1)[0][0]
        return sum(self.is_correct(answer, example.answer) for example in self.validation), len(self.validation)

    def parse(self, generated: str) -> str | None:
        """Returns the answer in a generated text, or None.

        One of ``labels``: the longest that the text begins with as whole words, in any case, after white space, quotes
        and opening brackets. A number: the last one in the text, without the commas between thousands.
        """
        if self.labels is None:
            found = NUMBER.findall(generated)
            return _plain_number(found[-1]) if found else None
        text = generated.lstrip(STRIPPED).casefold()
        for label in sorted(self.labels, key=len, reverse=True):
            wanted = label.casefold()
            after = text[len(wanted) : len(wanted) + 1]
            if text.startswith(wanted) and not (after.isalnum() or after == "_"):
                return label
        return None

    def is_correct(self, generated: str, answer: str) -> bool:
        """Tells whether ``generated`` gives ``answer``."""
        parsed = self.parse(generated)
        return parsed is not None and parsed == (_plain_number(answer) if self.labels is None else answer)


def load_answer_task(name: str) -> AnswerTask:
    """Returns the task ``name``; one that cannot be used raises `UserError`.

    * embedded: ``stdlib-topics`` (and ``stdlib-pairs``), ``passkey``, ``arithmetic``;
    * from the hub: ``glue/sst2``, ``ag_news``, ``trec``, ``banking77``, ``gsm8k`` (Cobbe et al., 2021), ``boolq``
      (Clark et al., 2019), ``piqa`` (Bisk et al., 2020), ``commonsense_qa`` (Talmor et al., 2019);
    * every other classification data set that `load_task` knows, with its labels' names as answers.
    """
    if name in SYNTHETIC:
        train, validation = SYNTHETIC[name]()
        return _task(name, train, validation, None)
    if name in answers_hub.READERS:
        train, validation, labels = answers_hub.READERS[name]()
        return _task(name, train, validation, labels)
    task = load_task(name)
    return _from_labels(task, task.fingerprint if name in EMBEDDED else None)


def _from_labels(task: TextTask, fingerprint: str | None) -> AnswerTask:
    labels = answers_hub.readable(task.name, task.labels) if task.name not in EMBEDDED else task.labels

    def rows(examples: Iterable[Example]) -> Rows:
        return [("\n".join(t for t in (e.first, e.second) if t is not None), labels[e.label]) for e in examples]

    return _task(task.name, rows(task.train), rows(task.validation), labels, fingerprint)


def _task(
    name: str, train: Rows, validation: Rows, labels: tuple[str, ...] | None, fingerprint: str | None = None
) -> AnswerTask:
    instruction = INSTRUCTIONS.get(name) or f"Which of these is it: {', '.join(labels or ())}?"
    digest = fingerprint or hashlib.sha256(repr((labels, train, validation)).encode()).hexdigest()[:16]
    splits = [tuple(AnswerExample(*row) for row in rows) for rows in (train, validation)]
    return AnswerTask(name, splits[0], splits[1], labels, instruction, digest)


def _plain_number(text: str) -> str:
    whole, point, fraction = text.replace(",", "").partition(".")
    fraction = fraction.rstrip("0")
    return whole + point * bool(fraction) + fraction


SYNTHETIC: dict[str, Callable[[], tuple[Rows, Rows]]] = {"passkey": passkeys, "arithmetic": sums}
