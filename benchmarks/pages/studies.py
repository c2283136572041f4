"""The page docs/studies.md and its figures, from the committed results of runs and sweeps."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.pages import facts, figures, text
from benchmarks.pages.facts import quick
from benchmarks.pages.figures import COLOURS, Bar, Dot, Line
from benchmarks.pages.text import figure, interval, minutes, part, percent, power, signed, span, study, table


def page() -> str:
    """Builds docs/studies.md."""
    return text.page(
        """# Studies

Each section is one committed result in `benchmarks/results`, made by the command that it names on two CPU cores
with the data and the small models that ship with the package. `make results` writes this page, and a test fails
when page and results differ. How to run them again: [reproduce the numbers](guides/reproduce.md).

Intervals are 95 %: Wilson's for the accuracy of one run, Student's t over
seeds for a sweep, which for few seeds that differ much can reach beyond the range of an accuracy. These models are
orders of magnitude smaller than those of the papers, so a study shows that a system trains and what it does here.
It does not confirm or refute a paper.""",
        f"## Hyper-connections on Python source\n\n{hyper_lm()}",
        f"## Telepathy: one language model speaks to another\n\n{telepathy()}",
        f"## L-Former: tools from a side path\n\n{lformer()}",
        f"## Bypass: all layers in one latent\n\n{bypass()}",
        f"## XLRB on real text\n\n{xlrb()}",
    )


def pictures() -> dict[str, str]:
    """Draws the figures of the page by name."""
    return {
        "hyper_lm": _hyper_lm_figure(),
        "telepathy-baselines": _telepathy_figure(),
        "telepathy-tokens": _tokens_figure(),
        "telepathy-bridges": _bridges_figure(),
        "lformer-kinds": _lformer_figure(),
        "bypass-layers": _bypass_figure(),
        "xlrb": _xlrb_figure(),
    }


def seeds(name: str) -> str:
    return f"{len(next(iter(study(name)['runs'].values())))} seeds"


def _over_seeds(name: str) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Pairs the rows of a sweep with the results of their runs, baselines left out."""
    found = study(name)
    return [(row, found["runs"][row["name"]]) for row in found["rows"] if row["name"] in found["runs"]]


def _majority(name: str) -> float:
    return float(study(name)["rows"][0]["mean"])


def _mean(runs: list[dict[str, Any]], *keys: str) -> float | None:
    values = []
    for run in runs:
        value: Any = run
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            return None
        values.append(value)
    return float(sum(values) / len(values))


# ---- hyper-connections -----------------------------------------------------------------------------------------------

RESIDUALS = {"plain": "plain", "shc": "SHC", "dhc": "DHC", "mhc": "mHC"}


def hyper_lm() -> str:
    from xlayer_systems.hyper_lm import SIZES, HyperLMConfig

    found, n = study("hyper_lm-stdlib-lm"), HyperLMConfig().expansion_rate
    size, options = SIZES["tiny"], quick("hyper_lm")
    lines = []
    for row in found["rows"]:
        name, tokens = RESIDUALS[row["name"]], f"{row['tokens']:,.0f}"
        rest = (
            ["", tokens, ""] if name == "plain" else [signed(row["difference"], 3), tokens, f"{row['speed_up']:.2f}×"]
        )
        shown = name if name == "plain" else f"{name}, n = {n}"
        lines.append([shown, f"{row['loss']:.3f}", f"{row['low']:.3f} – {row['high']:.3f}", *rest])
    head = "residual | validation loss, nats per token | 95 % interval | minus plain, paired by seed"
    runs = [run["seconds"] / 60 for runs in found["runs"].values() for run in runs]
    return part(
        "hyper_lm",
        f"""`stdlib-lm` is the source of the Python standard library as a corpus. Models have {size["num_layers"]}
layers of width {size["hidden_size"]}, and train for {options.max_steps} steps of {options.batch_size} ×
{options.max_length} tokens, with {seeds("hyper_lm-stdlib-lm")}; two runs at a time, {span(runs, ".1f")} minutes
each. The loss is that of {options.eval_blocks} blocks of the validation files.""",
        "```sh\nxlayer sweep hyper_lm --residual plain,shc,dhc,mhc --seeds 0,1,2 --quick\n```",
        table(head + " | tokens to plain's final loss | fewer", lines),
        figure("hyper_lm", "Validation loss of plain residuals, SHC, DHC and mHC with intervals"),
        f"""The learning rate, {power(options.learning_rate)}, was chosen with plain residuals on this validation
set, and nothing was tuned for the connections. It falls to 0 at the end of a run, so a kind that is early reaches
plain's loss at a higher rate than plain did. The paper reports 1.8× fewer tokens, for far larger models.""",
    )


def _hyper_lm_figure() -> str:
    rows = study("hyper_lm-stdlib-lm")["rows"]
    values = [
        Dot(RESIDUALS[row["name"]], row["loss"], row["low"], row["high"], f"{row['loss']:.3f}", COLOURS[row["name"]])
        for row in rows
    ]
    return figures.dots("Validation loss, nats per token (lower is better)", values)


# ---- telepathy -------------------------------------------------------------------------------------------------------

BASELINES = {
    "majority": "majority class",
    "random": "random answer",
    "sender_text": "sender reads and answers",
    "sender_text_5shot": "the same, 5 examples",
    "receiver_text": "receiver reads and answers",
    "receiver_text_5shot": "the same, 5 examples",
    "text_relay": "text relay: sender summarizes, receiver answers",
    "text_relay_5shot": "the same, 5 examples",
    "sender_text_ranked": "sender, most likely label",
    "receiver_text_ranked": "receiver, most likely label",
    "text_relay_ranked": "text relay, most likely label",
    "prompt_tuning": "prompt tuning, without the text",
    "prompt_tuning_text": "prompt tuning, before the text",
    "linear_probe": "linear probe on the sender",
    "noise": "noise in place of the message",
}


def bridges() -> dict[str, str]:
    """Names the bridges of the study."""
    from xlayer_systems.telepathy import TelepathyConfig

    config = TelepathyConfig()
    return {
        "continuous": "continuous",
        "vq": f"VQ, {config.codebook_size} codes",
        "vq:revive_below=0.1": "VQ, dead codes revived",
        "fsq": f"FSQ, {len(config.levels)} dimensions of {config.levels[0]} levels",
        "fsq:variance_diversity=0.1": "FSQ, variance loss 0.1",
        "dit:dit_steps=4": "rectified flow, 4 Euler steps",
    }


def telepathy() -> str:
    found = study("telepathy-stdlib-topics")
    bridge, options = found["accuracy"], quick("telepathy")
    name = f"**bridge, {found['soft_tokens']} soft tokens**"
    measured = [f"**{percent(bridge['mean'])}**", interval(bridge), percent(found["invalid"]), str(bridge["total"])]
    lines = [[name, *measured]]
    for key, label in BASELINES.items():
        row = found["baselines"][key]
        invalid = percent(row["invalid"] / row["total"])
        lines.append([label, percent(row["mean"]), interval(row), invalid, str(row["total"])])
    above = 100 * (bridge["mean"] - found["baselines"]["linear_probe"]["mean"])
    total = minutes(found["seconds"] + sum(row["seconds"] for row in found["baselines"].values()))
    latency = []
    for kind, stages in found["latency"].items():
        parts = ", ".join(f"{stage} {time:.1f}" for stage, time in stages.items() if stage != "total")
        latency.append([kind.replace("_", " "), f"{stages['total']:.1f}", parts])
    return part(
        "telepathy",
        f"""Two decoders ship with the package, with different tokenizers and widths: a sender of
{facts.parameters("decoder-sender")} and a receiver of {facts.parameters("decoder-receiver")}, pretrained by
`xlayer pretrain decoder` on the training files only. Both stay frozen. The sender reads a docstring, a bridge turns
its hidden states into soft tokens, and the receiver, which sees nothing else, must name the package of the standard
library that it comes from, one of {len(found["per_class"])}. With all baselines that takes {total}.""",
        "```sh\nxlayer train telepathy --quick --seed 1\n```",
        table(" | accuracy | 95 % interval (Wilson) | no valid answer | of", lines),
        figure("telepathy-baselines", "Accuracy of the bridge and of its strongest baselines"),
        f"""The bridge is {above:.1f} points above the linear probe, whose features and penalty are chosen on
training examples alone. Decoders of this size do not follow a prompt, so their generated answers are not valid
ones; the rows "most likely label" show what they know nevertheless. Prompt tuning before the text had not learned
to answer when it ended, at {found["baselines"]["prompt_tuning_text"]["loss"]:.2f} nats per token. The learning
rate, {power(options.learning_rate)}, was chosen with another seed on this validation set, and the decoders have
read training docstrings beside the paths of their files.""",
        "### Latency",
        table("milliseconds per example | total | stages", latency),
        "### Number of soft tokens",
        f"""{seeds("telepathy-tokens")} each, {options.max_steps} steps, no baselines; the majority class is
{percent(_majority("telepathy-tokens"))}.""",
        "```sh\nxlayer sweep telepathy --soft-tokens 4,8,16,32,64,128 --seeds 1,2,3 --quick\n```",
        _tokens_table(),
        figure("telepathy-tokens", "Accuracy over the number of soft tokens"),
        """In the experiments that this system repeats, from Llama 3.1 8B to Mistral 7B with 77 classes, accuracy
fell with the number of soft tokens and was at chance with 128. Here it is flat from 16 on, and messages differ more
from each other with more tokens. Both models are far smaller, and the task has fewer answers.""",
        "### Kinds of bridge",
        _bridges_table(),
        figure("telepathy-bridges", "Accuracy of six kinds of bridge with intervals"),
        _bridges_text(),
    )


def _tokens_table() -> str:
    lines = [
        [row["name"].split("=")[-1], percent(row["mean"]), interval(row), f"{_mean(runs, 'usage', 'similarity'):.3f}"]
        for row, runs in _over_seeds("telepathy-tokens")
    ]
    return table("soft tokens | accuracy | 95 % interval | similarity of messages", lines)


def _bridge_rows() -> list[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    return [
        (row["name"].removeprefix("classification:bridge="), row, runs)
        for row, runs in _over_seeds("telepathy-bridges")
    ]


def _bridges_table() -> str:
    lines, names = [], bridges()
    for key, row, runs in _bridge_rows():
        each = ", ".join(f"{100 * run['accuracy']['mean']:.1f}" for run in runs)
        codes = _mean(runs, "usage", "perplexity")
        measured = [f"{_mean(runs, 'usage', 'similarity'):.3f}", "" if codes is None else f"{codes:.1f}"]
        lines.append([names[key], percent(row["mean"]), interval(row), each, *measured])
    head = "bridge | accuracy | 95 % interval | per seed | similarity of messages | code perplexity"
    return table(head, lines)


def _bridges_text() -> str:
    from xlayer_systems.telepathy import TelepathyConfig

    runs = study("telepathy-bridges")["runs"]
    codes = span((run["usage"]["codes"] for run in runs["classification:bridge=vq"]), "d")
    fsq = runs["classification:bridge=fsq"]
    above = sum(run["accuracy"]["low"] > run["majority"]["mean"] for run in fsq)
    return f"""Discrete bridges collapsed in the experiments that this system repeats, and do so here, at the
settings of the continuous one; nothing was tuned for them. VQ ends with {codes} of its
{TelepathyConfig().codebook_size} codes in use, and the receiver gives every text the same answer. Reviving dead
codes brings codes back into use but not the message: messages stay as alike as before. FSQ uses many codes and is
above the majority class, beyond its interval, in {above} of {len(fsq)} seeds; the variance loss leaves it fewer
codes, not more. The flow, trained through its Euler steps, stays at the majority class."""


def _telepathy_figure() -> str:
    found = study("telepathy-stdlib-topics")
    bridge, baselines = found["accuracy"], found["baselines"]
    values = [
        Dot("bridge", bridge["mean"], bridge["low"], bridge["high"], percent(bridge["mean"]), COLOURS["continuous"])
    ]
    labels = {
        "linear_probe": "linear probe on the sender",
        "prompt_tuning": "prompt tuning, no text",
        "receiver_text_ranked": "receiver, most likely label",
        "sender_text_ranked": "sender, most likely label",
        "text_relay_ranked": "text relay, most likely label",
    }
    for key, label in labels.items():
        row = baselines[key]
        values.append(Dot(label, row["mean"], row["low"], row["high"], percent(row["mean"]), figures.GREY))
    return figures.dots("Accuracy on validation docstrings", values, (baselines["majority"]["mean"], "majority class"))


def _tokens_figure() -> str:
    rows = [row for row, _ in _over_seeds("telepathy-tokens")]
    majority = _majority("telepathy-tokens")
    mean, low, high = ([100 * row[key] for row in rows] for key in ("mean", "low", "high"))
    names = [row["name"].split("=")[-1] for row in rows]
    values = [
        Line("bridge", mean, COLOURS["continuous"], low, high),
        Line("majority", [100 * majority] * len(rows), figures.GREY),
    ]
    return figures.lines("Accuracy in %, with 95 % intervals over seeds", names, values, "soft tokens", ".0f")


def _bridges_figure() -> str:
    labels = {
        "continuous": "continuous",
        "vq": "VQ",
        "vq:revive_below=0.1": "VQ, revived",
        "fsq": "FSQ",
        "fsq:variance_diversity=0.1": "FSQ, variance loss",
        "dit:dit_steps=4": "rectified flow",
    }
    values = [
        Dot(labels[key], row["mean"], row["low"], row["high"], percent(row["mean"]), COLOURS[key.split(":")[0]])
        for key, row, _ in _bridge_rows()
    ]
    return figures.dots("Accuracy by kind of bridge", values, (_majority("telepathy-bridges"), "majority class"))


# ---- L-Former --------------------------------------------------------------------------------------------------------

AGGREGATORS = {"ema": "EMA", "gru": "GRU", "attn": "attention", "head_only": "no side path"}


def lformer() -> str:
    from xlayer_systems.lformer import ModelConfig

    found = study("lformer-tools")
    base = found["baseline"]
    lines = [
        ["**EMA side path**", *_tool_cells(found)],
        ["no side path, an MLP of equal size on the last hidden state", *_tool_cells(base)],
        ["going by one word", percent(found["keyword"]["mean"]), interval(found["keyword"]), "", "", ""],
        ["majority class", percent(found["majority"]["mean"]), interval(found["majority"]), "", "", ""],
    ]
    gates = [gate for run in study("lformer-kinds")["runs"]["ema"] for gate in run["usage"]["gates"].values()]
    return part(
        "lformer",
        f"""The task `tools` asks for one of {len(found["per_tool"])} operations in words. Tools share verbs, frames
and most words; {facts.tool_decoys()} training frames also name what is *not* asked for; validation has frames,
verbs, wordings and numbers of its own. The base is the frozen sender of the section before (phase A), whose last
two layers then train too (phase B). {found["accuracy"]["total"]} validation requests,
{minutes(found["seconds"] + found["baseline"]["seconds"])} with the baseline.""",
        "```sh\nxlayer train lformer --quick --seed 1\n```",
        table(" | tool | 95 % interval (Wilson) | plan | value error | LM loss", lines),
        f"""Always predicting the mean value has the error {found["value_error_of_mean"]:.3f}; the base's own LM
loss was {found["base_lm_loss"]:.3f} nats.""",
        "### Kinds of aggregator",
        f"With {seeds('lformer-kinds')} each:",
        _kinds_table(),
        figure("lformer-kinds", "Tool accuracy of the aggregators and of the baseline with intervals"),
        f"""Every kind is far above the majority class and above any one keyword, and none is above the MLP of equal
size that reads the last hidden state alone: for this task the shipped sender holds in its last layer what its side
path collects. Gates start at σ(−2) ≈ 0.119 and end at {span(gates, ".3f")}. The recurrent unit does best of the
three aggregators, attention over {ModelConfig().window} taps worst. Settings were chosen with EMA on this
validation set: of three ways to pool the tokens, attention was far ahead of the mean and of the last token.""",
    )


def _tool_cells(row: dict[str, Any]) -> list[str]:
    accuracy, plan = row["accuracy"], percent(row["plan"]["mean"])
    numbers = [f"{row['value_error']:.3f}", f"{row['lm_loss']:.3f}"]
    return [percent(accuracy["mean"]), interval(accuracy), plan, *numbers]


def _kinds_table() -> str:
    lines = []
    for row, runs in _over_seeds("lformer-kinds"):
        each = ", ".join(f"{100 * run['accuracy']['mean']:.1f}" for run in runs)
        measured = [percent(row["plan"]), f"{row['value_error']:.3f}", f"{row['lm_loss']:.3f}"]
        size = f"{row['path_parameters']:,}"
        lines.append([AGGREGATORS[row["name"]], percent(row["mean"]), interval(row), each, *measured, size])
    head = " | tool | 95 % interval | per seed | plan | value error | LM loss | parameters of the side path"
    return table(head, lines)


def _lformer_figure() -> str:
    values = [
        Dot(
            AGGREGATORS[row["name"]], row["mean"], row["low"], row["high"], percent(row["mean"]),
            COLOURS.get(row["name"], figures.GREY),
        )
        for row, _ in _over_seeds("lformer-kinds")
    ]  # fmt: skip
    return figures.dots(
        "Tool accuracy, 95 % intervals over seeds", values, (_majority("lformer-kinds"), "majority class")
    )


# ---- bypass ----------------------------------------------------------------------------------------------------------


def bypass() -> str:
    found = study("bypass-stdlib-lm")
    built, compared = found["reconstruction"], found["compared"]
    rows = {
        "R² of the latent": built["r2"],
        f"R² of {built['latent']} principal components": built["pca"],
        "ratio": [ours / theirs for ours, theirs in zip(built["r2"], built["pca"], strict=True)],
    }
    head = " | ".join(["", *(f"layer {layer}" for layer in range(len(built["r2"])))])
    base, task, whole = facts.bypass_shares()
    return part(
        "bypass",
        f"""Base: the shipped sender, of width {facts.sender_width()}, on Python source; a latent of
{built["latent"]} numbers per token; {minutes(found["seconds"])}.""",
        "```sh\nxlayer train bypass --quick --seed 1\n```",
        "Stage 1 reconstructs the hidden states of every layer from the latent. R² on validation files:",
        table(head, ([name, *(f"{value:.3f}" for value in values)] for name, values in rows.items())),
        figure("bypass-layers", "R² of the latent and of principal components per layer"),
        f"Stage 2 trains the projectors for the next token of the same source, {compared['blocks']} validation blocks:",
        _bypass_table(compared),
        f"""The gain is real and small: the model has been trained on text of this kind already. Bypass and LoRA
cannot be told apart, with one seed. On a Llama of {base} parameters the projectors are {task} of the model, encoder
and projectors {whole}.""",
    )


def _bypass_table(compared: dict[str, Any]) -> str:
    names = {"full": "full-stack bypass", "lora": "LoRA (PEFT) of the same size"}
    lines = []
    for key, row in compared["rows"].items():
        cells = [names.get(key, key), f"{row['loss']['mean']:.4f}"]
        if "difference" in row:
            cells += [signed(row["difference"], 4), f"{row['parameters']:,}"]
            cells.append(percent(row["parameters"] / compared["base_parameters"]))
        lines.append(cells + [""] * (5 - len(cells)))
    lines.append(["bypass − LoRA", "", signed(compared["between"], 4), "", ""])
    return table(" | loss, nats per token | minus the model alone, paired | trained parameters | of the model", lines)


def _bypass_figure() -> str:
    built = study("bypass-stdlib-lm")["reconstruction"]
    values = []
    for layer, (ours, theirs) in enumerate(zip(built["r2"], built["pca"], strict=True)):
        values.append(Bar("latent", ours, f"{ours:.3f}", COLOURS["bypass"], f"layer {layer}"))
        values.append(Bar(f"{built['latent']} components", theirs, f"{theirs:.3f}", figures.GREY))
    return figures.bars("R² of reconstructed hidden states", values, 1.0, "1")


# ---- XLRB ------------------------------------------------------------------------------------------------------------

BRIDGES = {
    "majority": "majority class",
    "plain": "plain encoder",
    "H9": "H9 as published: `topk_softmax`, gate before the norm",
    "H9:router_weight=full_softmax": "H9, `router_weight=full_softmax`",
    "H9:gate_position=after_norm": "H9, `gate_position=after_norm`",
}


def xlrb() -> str:
    found = study("xlrb-stdlib-topics")
    scratch = study("xlrb-small-scratch")
    plain = next(row for row in scratch["rows"] if row["name"] == "plain")
    from_scratch = f"{percent(plain['accuracy'])} ({interval(plain)}, {len(scratch['runs']['plain'])} seeds)"
    total = found["runs"]["plain"][0]["accuracy"]["total"]
    return part(
        "xlrb",
        f"""The task `stdlib-topics`: which of {len(study("telepathy-stdlib-topics")["per_class"])} packages of the
Python standard library does this docstring come from? The small encoder that ships with the package was pretrained
by `xlayer pretrain encoder` on the training files only. {seeds("xlrb-stdlib-topics")}, all {total} validation
examples.""",
        """```sh
xlayer sweep xlrb --quick --seeds 0,1,2,3,4 \\
    --presets plain,H9,H9:router_weight=full_softmax,H9:gate_position=after_norm
```""",
        table(
            " | accuracy | 95 % interval",
            ([BRIDGES[row["name"]], percent(row["accuracy"]), interval(row)] for row in found["rows"]),
        ),
        figure("xlrb", "Accuracy of the plain encoder and of three bridges with intervals"),
        f"""On this task, with this small encoder, no bridge differs from the plain encoder beyond its interval. The
same encoder from random weights reaches {from_scratch}, with `--backbone small-scratch`.""",
        f"""The `--quick` learning rate, {power(quick("xlrb", "plain").encoder_lr)}, is {_rates()}, one seed, on
this very validation set. There is no third split, so the levels are somewhat optimistic, and nothing was tuned for
the bridges. Intervals over seeds do not include the choice of examples.""",
        "### The published k = 1 router does not learn",
        f"""Of the published configurations, {facts.presets_of_one_source()} route to one source layer and weight it
by a softmax over the chosen logits. Over one logit that softmax is 1 and its gradient exactly 0, so the router
stays as its random initialization made it, and temperature cannot act ({{source}}`tests/routing`,
{{source}}`tests/presets`). `router_weight="full_softmax"` weights the message by the chosen source's probability
among all sources, which does learn. The LayerNorm behind the published gates removes their common scale except
through its eps; `gate_position="after_norm"` lets them act. In the table above neither differs from the published
form by more than chance.""",
    )


def _rates() -> str:
    lines = (text.RESULTS / "xlrb-quick-rate.jsonl").read_text().splitlines()
    tried = {row["run"]["options"]["encoder_lr"]: row["result"]["accuracy"]["mean"] for row in map(json.loads, lines)}
    best = max(tried, key=tried.__getitem__)
    if best != quick("xlrb", "plain").encoder_lr:
        raise ValueError(f"the rate {best} was better than the one that --quick takes")
    each = ", ".join(f"{power(rate)}: {percent(accuracy)}" for rate, accuracy in sorted(tried.items()))
    return f"the best of {len(tried)} tried with the plain encoder ({each})"


def _xlrb_figure() -> str:
    labels = {
        "plain": "plain encoder",
        "H9": "H9 as published",
        "H9:router_weight=full_softmax": "H9, full softmax",
        "H9:gate_position=after_norm": "H9, gate after norm",
    }
    found = study("xlrb-stdlib-topics")["rows"]
    values = [
        Dot(
            labels[row["name"]], row["accuracy"], row["low"], row["high"], percent(row["accuracy"]),
            COLOURS["plain" if row["name"] == "plain" else "hdim"],
        )
        for row in found if row["name"] in labels
    ]  # fmt: skip
    return figures.dots("Accuracy on validation docstrings, 95 % intervals over seeds", values)
