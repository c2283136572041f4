"""Measures how long an answer takes: through the bridge, through a summary in words, and from the text itself.

One example at a time. Text-relay has to write its summary token by token before the receiver can begin; a bridge reads
once. All three end with the same receiver giving the same kind of answer.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from statistics import median
from typing import TypeVar

import torch

from xlayer_systems.data.answers import AnswerTask
from xlayer_systems.reporting.tables import table
from xlayer_systems.telepathy.model import TelepathyModel
from xlayer_systems.telepathy.prompting import answer_prompts, answer_tokens, complete, encode, summary_prompts

SUMMARY_TOKENS = 32
ROUTES = {
    "bridge": ("encode", "bridge", "decode"),
    "text_relay": ("summarize", "answer"),
    "direct_text": ("answer",),
}
Value = TypeVar("Value")


@torch.no_grad()
def measure_latency(
    model: TelepathyModel, task: AnswerTask, examples: int, warmup: int = 3, max_length: int = 64
) -> dict[str, dict[str, float]]:
    """Returns the median milliseconds per example and stage, batch size 1, each route on the same validation texts.

    Args:
        warmup: examples before the first that counts.
        max_length: tokens of a text that a model reads.

    Returns:
        Route (`ROUTES`) to its stages and their ``total``, the median of the sums, tokenizing included.
    """
    model.eval()
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    chosen = [task.validation[i % len(task.validation)].text for i in range(warmup + examples)]
    for number, text in enumerate(chosen):
        stages = _one(model, task, text, max_length)
        if number >= warmup:
            for key, milliseconds in stages.items():
                times[key].append(milliseconds)
    result: dict[str, dict[str, float]] = {}
    for route, names in ROUTES.items():
        per_stage = [times[route, name] for name in names]
        result[route] = {name: median(values) for name, values in zip(names, per_stage, strict=True)}
        result[route]["total"] = median(map(sum, zip(*per_stage, strict=True)))
    return result


def format_latency(latency: Mapping[str, Mapping[str, float]]) -> str:
    """Formats the result of `measure_latency` as a table, in units of the bridge's total in the last column."""
    unit = latency["bridge"]["total"]
    rows = [("ms per example (median)", "total", "x bridge", "stages")]
    for route, stages in latency.items():
        parts = ", ".join(f"{name} {value:.2f}" for name, value in stages.items() if name != "total")
        rows.append((route, f"{stages['total']:.2f}", f"{stages['total'] / unit:.2f}", parts))
    return "\n".join(table(rows))


def _one(model: TelepathyModel, task: AnswerTask, text: str, max_length: int) -> dict[tuple[str, str], float]:
    """Returns the milliseconds of every stage of every route for one text."""
    took: dict[tuple[str, str], float] = {}
    device = next(model.bridge.parameters()).device

    def timed(route: str, stage: str, work: Callable[[], Value]) -> Value:
        _wait(device)
        started = time.perf_counter()
        value = work()
        _wait(device)
        took[route, stage] = 1e3 * (time.perf_counter() - started)
        return value

    sender, receiver, tokenizer = model.sender, model.receiver, model.pair.sender_tokenizer

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        ids = [tokenizer.bos_token_id, *encode(tokenizer, text, max_length - 1)]
        mask = torch.ones(1, len(ids), dtype=torch.int64, device=device)
        return model.encode(torch.tensor([ids], device=device), mask), mask.bool()

    states, mask = timed("bridge", "encode", read)
    soft = timed("bridge", "bridge", lambda: model.bridge(states, mask).soft)
    timed("bridge", "decode", lambda: model.answer(soft))

    def summarize() -> str:
        return complete(sender, tokenizer, summary_prompts(tokenizer, [text], max_length), SUMMARY_TOKENS, 1)[0]

    def answer(given: str) -> list[str]:
        tokenizer = model.pair.receiver_tokenizer
        prompts = answer_prompts(task, tokenizer, [given], [], max_length)
        return complete(receiver, tokenizer, prompts, answer_tokens(task, tokenizer), 1)

    summary = timed("text_relay", "summarize", summarize)
    timed("text_relay", "answer", lambda: answer(summary))
    timed("direct_text", "answer", lambda: answer(text))
    return took


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
