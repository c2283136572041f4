"""Numbers in the README's sentences that were measured, from the committed results."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial

from benchmarks import readme_tables as tables
from benchmarks.readme_facts import quick
from benchmarks.readme_kernels import Rows
from benchmarks.readme_tables import BLOCKS, block, interval, percent, power, study


@block
def machine() -> str:
    last = Rows(tables.CPU).all[-1]
    name = last.device.removesuffix(" AVX512").removesuffix(" Processor")
    torch = ".".join(last.extra["versions"]["torch"].split(".")[:2])
    return f"{last.extra['threads']} cores of an {name} with AVX-512, torch {torch}"


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes"


def span(values: Iterable[float], form: str) -> str:
    """The least and the greatest, or the one number that both are."""
    found = sorted(values)
    ends = list(dict.fromkeys(format(value, form) for value in (found[0], found[-1])))
    return " to ".join(ends)


def seeds(name: str) -> str:
    return f"{len(next(iter(study(name)['runs'].values())))} seeds"


STUDIES = {"hyper_lm": "stdlib-lm", "telepathy": "tokens", "lformer": "kinds", "xlrb": "stdlib-topics"}
BLOCKS |= {f"{system}_seeds": partial(seeds, f"{system}-{name}") for system, name in STUDIES.items()}


@block
def topics() -> str:
    return str(len(study("telepathy-stdlib-topics")["per_class"]))


@block
def hyper_lm_minutes() -> str:
    runs = [run for runs in study("hyper_lm-stdlib-lm")["runs"].values() for run in runs]
    return span((run["seconds"] / 60 for run in runs), ".1f") + " minutes"


@block
def telepathy_baselines() -> str:
    return str(len(study("telepathy-stdlib-topics")["baselines"]))


@block
def telepathy_minutes() -> str:
    found = study("telepathy-stdlib-topics")
    return minutes(found["seconds"] + sum(row["seconds"] for row in found["baselines"].values()))


@block
def telepathy_prompt_loss() -> str:
    return f"{study('telepathy-stdlib-topics')['baselines']['prompt_tuning_text']['loss']:.2f} nats"


@block
def telepathy_majority() -> str:
    return percent(study("telepathy-tokens")["rows"][0]["mean"])


@block
def telepathy_codes() -> str:
    from xlayer_systems.telepathy.config import TelepathyConfig

    runs = study("telepathy-bridges")["runs"]["classification:bridge=vq"]
    return f"{span((run['usage']['codes'] for run in runs), 'd')} of its {TelepathyConfig().codebook_size} codes"


@block
def telepathy_fsq_seeds() -> str:
    runs = study("telepathy-bridges")["runs"]["classification:bridge=fsq"]
    above = sum(run["accuracy"]["low"] > run["majority"]["mean"] for run in runs)
    return f"{above} of {len(runs)}"


@block
def lformer_tools() -> str:
    return str(len(study("lformer-tools")["per_tool"]))


@block
def lformer_minutes() -> str:
    found = study("lformer-tools")
    return minutes(found["seconds"] + found["baseline"]["seconds"])


@block
def lformer_requests() -> str:
    return str(study("lformer-tools")["accuracy"]["total"])


@block
def lformer_gates() -> str:
    gates = [gate for run in study("lformer-kinds")["runs"]["ema"] for gate in run["usage"]["gates"].values()]
    return span(gates, ".3f")


@block
def bypass_minutes() -> str:
    return minutes(study("bypass-stdlib-lm")["seconds"])


@block
def bypass_latent() -> str:
    return str(study("bypass-stdlib-lm")["reconstruction"]["latent"])


@block
def bypass_blocks() -> str:
    return f"{study('bypass-stdlib-lm')['compared']['blocks']} blocks"


@block
def xlrb_examples() -> str:
    run = study("xlrb-stdlib-topics")["runs"]["plain"][0]
    return str(run["accuracy"]["total"])


@block
def xlrb_scratch() -> str:
    found = study("xlrb-small-scratch")
    plain = next(row for row in found["rows"] if row["name"] == "plain")
    return f"{percent(plain['accuracy'])} ({interval(plain)}, {len(found['runs']['plain'])} seeds)"


@block
def xlrb_rates() -> str:
    lines = (tables.RESULTS / "xlrb-quick-rate.jsonl").read_text().splitlines()
    tried = {row["run"]["options"]["encoder_lr"]: row["result"]["accuracy"]["mean"] for row in map(json.loads, lines)}
    best = max(tried, key=tried.__getitem__)
    if best != quick("xlrb", "plain").encoder_lr:
        raise ValueError(f"the rate {best} was better than the one that --quick takes")
    each = ", ".join(f"{power(rate)}: {percent(accuracy)}" for rate, accuracy in sorted(tried.items()))
    return f"the best of {len(tried)} tried with the plain encoder ({each})"
