"""Made-up tasks with exact answers: a passkey to be found in filler text, and small sums."""

from __future__ import annotations

import random

TRAIN, VALIDATION = 4000, 500
Rows = list[tuple[str, str]]  # text, answer

FILLERS = (
    "The grass is green and the sky is blue.",
    "A train left the station early in the morning.",
    "Nobody remembers who painted the old bridge.",
    "The baker sells bread and three kinds of cake.",
    "Rain fell on the hills for most of the week.",
    "Two cats sleep on the wall behind the school.",
    "The river runs slowly past the empty mill.",
    "She closed the window because of the wind.",
    "Most of the books on this shelf are about birds.",
    "They waited for the ferry until it was dark.",
    "The clock in the hall has been wrong for years.",
    "A letter without a stamp lay on the table.",
)
KEY_SENTENCES = (
    "The passkey is {key}.",
    "Remember the number {key}, it is the passkey.",
    "The secret code is {key}.",
    "Use {key} as the passkey.",
    "{key} is the passkey, do not forget it.",
    "To open the door, enter {key}.",
)
SUMS = ("{sum} =", "What is {sum}?", "Compute {sum}.")


def passkeys(seed: int = 0) -> tuple[Rows, Rows]:
    """Makes training and validation rows: a five-digit number in two to six filler sentences; no key occurs twice."""
    draw = random.Random(f"passkey/{seed}")
    keys = draw.sample(range(10_000, 100_000), TRAIN + VALIDATION)
    rows = []
    for key in keys:
        sentences = draw.sample(FILLERS, draw.randint(2, 6))
        sentences.insert(draw.randint(0, len(sentences)), draw.choice(KEY_SENTENCES).format(key=key))
        rows.append((" ".join(sentences), str(key)))
    return rows[:TRAIN], rows[TRAIN:]


def sums(seed: int = 0) -> tuple[Rows, Rows]:
    """Returns training and validation rows: two or three numbers to be added or subtracted; answers may be negative.

    A validation problem's numbers and signs are in training under no wording and in no order of its first two numbers.
    """
    draw = random.Random(f"arithmetic/{seed}")
    seen: set[tuple[int | str, ...]] = set()
    rows: Rows = []
    while len(rows) < TRAIN + VALIDATION:
        numbers = [draw.randint(1, 99) for _ in range(draw.choice((2, 3)))]
        signs = [draw.choice("+-") for _ in numbers[1:]]
        key: tuple[int | str, ...] = (*sorted(numbers[:2]), *signs, *numbers[2:])
        if key in seen:
            continue
        seen.add(key)
        parts = [str(numbers[0]), *(f"{sign} {number}" for sign, number in zip(signs, numbers[1:], strict=True))]
        result = numbers[0] + sum(n if sign == "+" else -n for sign, n in zip(signs, numbers[1:], strict=True))
        rows.append((draw.choice(SUMS).format(sum=" ".join(parts)), str(result)))
    return rows[:TRAIN], rows[TRAIN:]
