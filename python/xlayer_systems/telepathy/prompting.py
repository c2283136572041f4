"""Text prompts for the baselines in which a model reads words: 0-shot, few-shot and summaries.

A prompt is cut to fit its context by cutting the texts in it, never the instruction, the labels or ``Answer:``. A
tokenizer with a chat template, that of an instruction-tuned model, gets the same as messages: such a model answers in a
sentence where it reads bare text, so its answers may also be longer, and are looked for inside of what it says.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from xlayer_systems.data.answers import AnswerExample, AnswerTask

CONTEXT = 384  # tokens of a few-shot prompt
SHORTEST = 12  # tokens that a text keeps at least, however many texts share the context
OPEN_ANSWER_TOKENS = 16
EXTRA_TOKENS = 2  # a space that is a token of its own, and the end
CHAT_TOKENS = 32  # what a chat model may say around an answer


def encode(tokenizer: Any, text: str, max_length: int | None = None) -> list[int]:
    """Returns token ids without special tokens, the first ``max_length`` of them."""
    cut = {} if max_length is None else {"truncation": True, "max_length": max_length}
    ids: list[int] = tokenizer(text, add_special_tokens=False, **cut)["input_ids"]
    return ids


def answer_tokens(task: AnswerTask, tokenizer: Any) -> int:
    """Returns how many new tokens an answer may take."""
    around = CHAT_TOKENS if is_chat(tokenizer) else 0
    if task.labels is None:
        return OPEN_ANSWER_TOKENS + around
    return max(len(encode(tokenizer, f" {label}")) for label in task.labels) + EXTRA_TOKENS + around


def is_chat(tokenizer: Any) -> bool:
    """Tells whether prompts are messages under the tokenizer's chat template."""
    return tokenizer.chat_template is not None


def chat_prompt(tokenizer: Any, messages: Sequence[str]) -> list[int]:
    """Returns token ids of messages of the user and the model in turn, up to where the model's next one begins."""
    turns = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(messages)]
    # Templates of models that think aloud know this variable; to others it means nothing.
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return encode(tokenizer, text)


def find_label(task: AnswerTask, said: str) -> tuple[str | None, str]:
    """Returns the label in a chat model's words, and how it was found: ``exact``, ``contained`` or ``none``.

    Exact: the text begins with it, as `AnswerTask.parse` asks for. Else the first label in the text as whole words, in
    any case; of labels that begin in one place the longest.
    """
    assert task.labels is not None
    label = task.parse(said)
    if label is not None:
        return label, "exact"
    found = [
        (match.start(), -len(label), label)
        for label in task.labels
        if (match := re.search(rf"(?<!\w){re.escape(label)}(?!\w)", said, re.IGNORECASE))
    ]
    return (min(found)[2], "contained") if found else (None, "none")


def few_shots(task: AnswerTask, shots: int, seed: int) -> list[AnswerExample]:
    """Draws examples from training, their labels as evenly spread as ``shots`` allows; no text is in validation as
    well."""
    draw = random.Random(f"few-shot/{task.name}/{seed}")
    hidden = {example.text for example in task.validation}
    pools: dict[str, list[AnswerExample]] = defaultdict(list)
    for example in task.train:
        if example.text not in hidden:
            pools[example.answer if task.labels is not None else ""].append(example)
    order = sorted(pools)
    draw.shuffle(order)
    for label in order:
        draw.shuffle(pools[label])
    chosen: list[AnswerExample] = []
    while len(chosen) < shots and any(pools.values()):
        chosen += [pools[label].pop() for label in order if pools[label]][: shots - len(chosen)]
    return chosen


def answer_prompts(
    task: AnswerTask, tokenizer: Any, texts: Sequence[str], shots: Sequence[AnswerExample], max_length: int
) -> list[list[int]]:
    """Returns token ids of BOS, instruction, labels, ``shots`` with their answers, and each text up to ``Answer:``.

    Args:
        max_length: tokens of a text without shots; with shots, all texts share a context of `CONTEXT` tokens evenly.
    """
    header = task.instruction + (f"\nOptions: {', '.join(task.labels)}" if task.labels else "") + "\n\n"
    if is_chat(tokenizer):
        return _chat_answer_prompts(task, tokenizer, header, texts, shots, max_length)
    start = [tokenizer.bos_token_id, *encode(tokenizer, header)]
    text_mark, answer_mark = encode(tokenizer, "Text: "), encode(tokenizer, "\nAnswer:")
    answers = [encode(tokenizer, f" {shot.answer}\n\n") for shot in shots]
    length = max_length
    if shots:
        fixed = len(start) + (len(shots) + 1) * (len(text_mark) + len(answer_mark)) + sum(map(len, answers))
        length = min(max_length, max(SHORTEST, (CONTEXT - fixed) // (len(shots) + 1)))

    def question(text: str) -> list[int]:
        return [*text_mark, *encode(tokenizer, text, length), *answer_mark]

    for shot, answer in zip(shots, answers, strict=True):
        start += [*question(shot.text), *answer]
    return [start + question(text) for text in texts]


def _chat_answer_prompts(
    task: AnswerTask,
    tokenizer: Any,
    header: str,
    texts: Sequence[str],
    shots: Sequence[AnswerExample],
    max_length: int,
) -> list[list[int]]:
    """Returns what `answer_prompts` does, as messages; every solved example is a turn of each side."""
    what = "one of the options" if task.labels else "the number"
    header = f"{header.rstrip()}\nAnswer with {what} and nothing else.\n\n"

    def prompt(text: str, length: int) -> list[int]:
        said = [part for shot in shots for part in (f"Text: {_cut(tokenizer, shot.text, length)}", shot.answer)]
        first, *others = [*said, f"Text: {_cut(tokenizer, text, length)}"]
        return chat_prompt(tokenizer, [header + first, *others])

    length = max_length
    if shots:
        fixed = len(prompt("", 0))
        length = min(max_length, max(SHORTEST, (CONTEXT - fixed) // (len(shots) + 1)))
    return [prompt(text, length) for text in texts]


def _cut(tokenizer: Any, text: str, length: int) -> str:
    """Returns the text of the first ``length`` tokens."""
    ids = encode(tokenizer, text)
    if len(ids) <= length:
        return text
    kept: str = tokenizer.decode(ids[:length], clean_up_tokenization_spaces=False)
    return kept


def summary_prompts(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Returns token ids of BOS and a request to summarize each text, of which ``max_length`` tokens are kept."""
    if is_chat(tokenizer):
        asked = "Summarize this text in one sentence.\n\nText: "
        return [chat_prompt(tokenizer, [asked + _cut(tokenizer, text, max_length)]) for text in texts]
    before = [tokenizer.bos_token_id, *encode(tokenizer, "Summarize this text in one sentence.\n\nText: ")]
    after = encode(tokenizer, "\nSummary:")
    return [[*before, *encode(tokenizer, text, max_length), *after] for text in texts]


@torch.no_grad()
def rank_labels(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], labels: Sequence[str], batch_size: int
) -> list[str]:
    """Returns the most likely label after each prompt under ``model``, by the mean log-probability of its tokens.

    This scores labels without generating them: a small model hardly ever answers in the requested words.
    """
    # A message begins without a space, an answer behind "Answer:" with one.
    tails = [encode(tokenizer, label if is_chat(tokenizer) else f" {label}") for label in labels]
    # Backwards twice: padded on the right.
    tail, of_tail = (x.flip(1) for x in _left_padded([t[::-1] for t in tails], tokenizer.pad_token_id, model.device))
    chosen: list[str] = []
    count = max(1, batch_size // len(tails))
    for first in range(0, len(prompts), count):
        ids, mask = _left_padded(prompts[first : first + count], tokenizer.pad_token_id, model.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        # Once over the prompts, and from their keys and values over each label behind each of them.
        output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
        cache, rows = output.past_key_values, len(ids)
        cache.batch_repeat_interleave(len(tails))
        masks = torch.cat([mask.repeat_interleave(len(tails), 0), of_tail.repeat(rows, 1)], dim=1)
        behind = positions[:, -1:].repeat_interleave(len(tails), 0) + torch.arange(1, tail.shape[1] + 1).to(mask)
        logits = model(
            input_ids=tail.repeat(rows, 1), attention_mask=masks, position_ids=behind, past_key_values=cache
        ).logits
        before = torch.cat([output.logits.repeat_interleave(len(tails), 0), logits[:, :-1]], dim=1)
        each = before.float().log_softmax(-1).gather(2, tail.repeat(rows, 1)[..., None]).squeeze(2)
        means = each.where(of_tail.repeat(rows, 1).bool(), 0).sum(1) / of_tail.sum(1).repeat(rows)
        best = means.view(rows, len(tails)).argmax(1)
        chosen += [labels[index] for index in best.tolist()]
    return chosen


@torch.no_grad()
def complete(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int
) -> list[str]:
    """Continues ``prompts`` greedily, each up to its first line break; padded on the left, batch by batch.

    A chat model may begin with a line of its own, so its whole message is returned, on one line.
    """
    texts: list[str] = []
    end = tokenizer.eos_token_id
    if is_chat(tokenizer):  # some end a message with another token than a text
        of_model = model.generation_config.eos_token_id
        end = sorted({end, *(of_model if isinstance(of_model, list) else [end if of_model is None else of_model])})
    for first in range(0, len(prompts), batch_size):
        ids, mask = _left_padded(prompts[first : first + batch_size], tokenizer.pad_token_id, model.device)
        said = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id,
        )
        decoded = tokenizer.batch_decode(
            said[:, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        chat = is_chat(tokenizer)
        texts += [" ".join(text.split()) if chat else text.strip().partition("\n")[0] for text in decoded]
    return texts


def _left_padded(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads token lists on the left; returns ids and mask ``[B, T]``."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), fill, device=device)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row, device=device)
        mask[i, width - len(row) :] = 1
    return ids, mask
