"""The README's tables of studies, from the committed results of runs and sweeps."""

from __future__ import annotations

from typing import Any

from benchmarks.readme_tables import block, interval, percent, study, table


@block
def hyper_lm() -> str:
    from xlayer_systems.hyper_lm import HyperLMConfig

    found, n = study("hyper_lm-stdlib-lm")["rows"], HyperLMConfig().expansion_rate
    first = next(row for row in found if row["name"] == "plain")
    lines = []
    for row in found:
        name = "plain" if row is first else f"{row['name'].upper().replace('MHC', 'mHC')}, n = {n}"
        apart, tokens = row["difference"], f"{row['tokens']:,.0f}"
        difference = f"{apart['mean']:+.3f} ({apart['low']:+.3f} – {apart['high']:+.3f})".replace("-", "−")
        rest = ["", tokens, ""] if row is first else [difference, tokens, f"{row['speed_up']:.2f}×"]
        lines.append([name, f"{row['loss']:.3f}", f"{row['low']:.3f} – {row['high']:.3f}", *rest])
    head = "residual | validation loss, nats per token | 95 % interval | minus plain, paired by seed"
    return table(head + " | tokens to plain's final loss | fewer", lines)


TELEPATHY = {
    "majority": "majority",
    "random": "random",
    "sender_text": "sender reads and answers",
    "sender_text_5shot": "the same, 5 examples",
    "receiver_text": "receiver reads and answers",
    "receiver_text_5shot": "the same, 5 examples",
    "text_relay": "text relay: sender summarizes, receiver answers",
    "text_relay_5shot": "the same, 5 examples",
    "sender_text_ranked": "sender, likeliest label",
    "receiver_text_ranked": "receiver, likeliest label",
    "text_relay_ranked": "text relay, likeliest label",
    "prompt_tuning": "prompt tuning, without the text",
    "prompt_tuning_text": "prompt tuning, before the text",
    "linear_probe": "linear probe on the sender",
    "noise": "noise in place of the message",
}


@block
def telepathy() -> str:
    found = study("telepathy-stdlib-topics")
    bridge = found["accuracy"]
    name = f"**bridge, {found['soft_tokens']} soft tokens**"
    measured = [f"**{percent(bridge['mean'])}**", interval(bridge), percent(found["invalid"]), str(bridge["total"])]
    lines = [[name, *measured]]
    for key, name in TELEPATHY.items():
        row = found["baselines"][key]
        invalid = percent(row["invalid"] / row["total"])
        lines.append([name, percent(row["mean"]), interval(row), invalid, str(row["total"])])
    above = 100 * (bridge["mean"] - found["baselines"]["linear_probe"]["mean"])
    return (
        table(" | accuracy | 95 % interval (Wilson) | no valid answer | of", lines)
        + f"\nThe bridge is {above:.1f} points above the linear probe.\n"
    )


@block
def telepathy_latency() -> str:
    lines = []
    for kind, stages in study("telepathy-stdlib-topics")["latency"].items():
        parts = ", ".join(f"{stage} {time:.1f}" for stage, time in stages.items() if stage != "total")
        lines.append([kind.replace("_", " "), f"{stages['total']:.1f}", parts])
    return table("milliseconds per example | total | stages", lines)


def _over_seeds(name: str) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Rows of a sweep with the results of their runs, baselines left out."""
    found = study(name)
    return [(row, found["runs"][row["name"]]) for row in found["rows"] if row["name"] in found["runs"]]


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


@block
def telepathy_tokens() -> str:
    lines = [
        [row["name"].split("=")[-1], percent(row["mean"]), interval(row), f"{_mean(runs, 'usage', 'similarity'):.3f}"]
        for row, runs in _over_seeds("telepathy-tokens")
    ]
    return table("soft tokens | accuracy | 95 % interval | similarity of messages", lines)


def bridges() -> dict[str, str]:
    """The bridges of the study in words."""
    from xlayer_systems.telepathy.config import TelepathyConfig

    config = TelepathyConfig()
    return {
        "continuous": "continuous",
        "vq": f"VQ, {config.codebook_size} codes",
        "vq:revive_below=0.1": "VQ, dead codes revived",
        "fsq": f"FSQ, {len(config.levels)} dimensions of {config.levels[0]} levels",
        "fsq:variance_diversity=0.1": "FSQ, variance loss 0.1",
        "dit:dit_steps=4": "rectified flow, 4 Euler steps",
    }


@block
def telepathy_bridges() -> str:
    lines, names = [], bridges()
    for row, runs in _over_seeds("telepathy-bridges"):
        name = names[row["name"].removeprefix("classification:bridge=")]
        seeds = ", ".join(f"{100 * run['accuracy']['mean']:.1f}" for run in runs)
        codes = _mean(runs, "usage", "perplexity")
        measured = [f"{_mean(runs, 'usage', 'similarity'):.3f}", "" if codes is None else f"{codes:.1f}"]
        lines.append([name, percent(row["mean"]), interval(row), seeds, *measured])
    head = "bridge | accuracy | 95 % interval | per seed | similarity of messages | code perplexity"
    return table(head, lines)


@block
def bypass_layers() -> str:
    found = study("bypass-stdlib-lm")["reconstruction"]
    rows = {
        "R² of the latent": found["r2"],
        f"R² of {found['latent']} principal components": found["pca"],
        "ratio": [ours / theirs for ours, theirs in zip(found["r2"], found["pca"], strict=True)],
    }
    head = " | ".join(["", *(f"layer {layer}" for layer in range(len(found["r2"])))])
    return table(head, ([name, *(f"{value:.3f}" for value in values)] for name, values in rows.items()))


@block
def bypass_task() -> str:
    found = study("bypass-stdlib-lm")["compared"]
    names = {"full": "full-stack bypass", "lora": "LoRA (PEFT) of the same size"}
    lines = []
    for key, row in found["rows"].items():
        cells = [names.get(key, key), f"{row['loss']['mean']:.4f}"]
        if "difference" in row:
            cells += [_signed(row["difference"]), f"{row['parameters']:,}"]
            cells.append(percent(row["parameters"] / found["base_parameters"]))
        lines.append(cells + [""] * (5 - len(cells)))
    lines.append(["bypass − LoRA", "", _signed(found["between"]), "", ""])
    return table(" | loss, nats per token | minus the model alone, paired | trained parameters | of the model", lines)


def _signed(found: dict[str, Any]) -> str:
    text = f"{found['mean']:+.4f} ({found['low']:+.4f} – {found['high']:+.4f})"
    return text.replace("-", "−")


@block
def lformer() -> str:
    found = study("lformer-tools")
    base = found["baseline"]
    lines = [
        ["**EMA side path**", *_tool_cells(found)],
        ["no side path, an MLP of equal size on the last hidden state", *_tool_cells(base)],
        ["going by one word", percent(found["keyword"]["mean"]), interval(found["keyword"]), "", "", ""],
        ["majority", percent(found["majority"]["mean"]), interval(found["majority"]), "", "", ""],
    ]
    head = " | tool | 95 % interval (Wilson) | plan | value error | LM loss"
    mean, before = found["value_error_of_mean"], found["base_lm_loss"]
    below = f"Always saying the mean value has the error {mean:.3f}; the base's own LM loss was {before:.3f} nats."
    return f"{table(head, lines)}\n{below}\n"


def _tool_cells(row: dict[str, Any]) -> list[str]:
    accuracy, plan = row["accuracy"], percent(row["plan"]["mean"])
    numbers = [f"{row['value_error']:.3f}", f"{row['lm_loss']:.3f}"]
    return [percent(accuracy["mean"]), interval(accuracy), plan, *numbers]


AGGREGATORS = {"ema": "EMA", "gru": "GRU", "attn": "attention", "head_only": "no side path"}


@block
def lformer_kinds() -> str:
    lines = []
    for row, runs in _over_seeds("lformer-kinds"):
        seeds = ", ".join(f"{100 * run['accuracy']['mean']:.1f}" for run in runs)
        measured = [percent(row["plan"]), f"{row['value_error']:.3f}", f"{row['lm_loss']:.3f}"]
        size = f"{row['path_parameters']:,}"
        lines.append([AGGREGATORS[row["name"]], percent(row["mean"]), interval(row), seeds, *measured, size])
    head = " | tool | 95 % interval | per seed | plan | value error | LM loss | parameters of the side path"
    return table(head, lines)


XLRB = {
    "majority": "majority class",
    "plain": "plain encoder",
    "H9": "H9 as published: `topk_softmax`, gate before the norm",
    "H9:router_weight=full_softmax": "H9, `router_weight=full_softmax`",
    "H9:gate_position=after_norm": "H9, `gate_position=after_norm`",
}


@block
def xlrb() -> str:
    found = study("xlrb-stdlib-topics")["rows"]
    return table(
        " | accuracy | 95 % interval", ([XLRB[row["name"]], percent(row["accuracy"]), interval(row)] for row in found)
    )
