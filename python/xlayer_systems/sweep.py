"""Many runs in one table: every variant with every seed, one run directory each."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlayer_systems.errors import UserError
from xlayer_systems.jobs import RunSpec, train_run
from xlayer_systems.options import parse_overrides
from xlayer_systems.plots import plot_curves
from xlayer_systems.runs import Record, RunDirectory
from xlayer_systems.stats import Interval, student_interval


@dataclass(frozen=True)
class Variant:
    """A preset with overrides, written ``H9`` or ``H9:router_weight=full_softmax:topk=2``."""

    name: str
    preset: str
    overrides: dict[str, str]

    @property
    def folder(self) -> str:
        """The name with characters that are safe in paths."""
        return self.name.replace(":", "-").replace("=", "_").replace("/", "_")


def parse_variants(text: str) -> list[Variant]:
    """``"plain,H9,H9:router_weight=full_softmax"`` as variants; the same one twice is refused."""
    variants = []
    for item in (part.strip() for part in text.split(",")):
        preset, *settings = item.split(":")
        if not preset:
            raise UserError(f"expected presets separated by commas, such as plain,H9, got {text!r}")
        variants.append(Variant(item, preset, parse_overrides(settings)))
    names = [variant.name for variant in variants]
    if len(set(names)) < len(names):
        raise UserError(f"a preset is named twice in {text!r}")
    return variants


def parse_seeds(text: str) -> list[int]:
    """``"0,1,2"`` as whole numbers, each once."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"expected seeds such as 0,1,2, got {text!r}") from error
    if len(set(seeds)) < len(seeds):
        raise UserError(f"a seed is named twice in {text!r}")
    return seeds


def run_sweep(specs: dict[str, list[RunSpec]], out: Path, resume: bool) -> Record:
    """Train every spec (per variant name, one per seed) and write results.json, report.md and the plots into ``out``.

    With ``resume`` finished runs are kept and an interrupted one goes on.
    """
    if out.exists() and not resume:
        raise UserError(f"sweep directory {out} exists; choose another --out, or continue it with --resume")
    results: dict[str, list[Record]] = {name: [] for name in specs}
    paths: dict[str, list[Path]] = {name: [] for name in specs}
    for name, variants in specs.items():
        for spec in variants:
            path = out / f"{Variant(name, '', {}).folder}-seed{spec.seed}"
            results[name].append(train_run(spec, path, resume))
            paths[name].append(path)
    summary = _summarize(results)
    if int(os.environ.get("RANK", "0")) == 0:
        _write(summary, specs, paths, out)
    return summary


def format_sweep(summary: Record) -> str:
    """The sweep's table in plain text."""
    rows = [("", "accuracy", "95 % interval", "parameters", "seconds")]
    for row in summary["rows"]:
        interval = f"[{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
        parameters = f"{row['parameters']:,}" if row["parameters"] else ""
        seconds = f"{row['seconds']:.0f}" if row["seconds"] else ""
        rows.append((row["name"], f"{100 * row['accuracy']:.1f} %", interval, parameters, seconds))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    name, *numbers = (f"{{:{align}{width}}}" for align, width in zip("<>>>>", widths, strict=True))
    line = "  ".join([name, *numbers])
    return "\n".join([summary["title"], *(line.format(*row).rstrip() for row in rows)])


def _summarize(results: dict[str, list[Record]]) -> Record:
    first = next(iter(results.values()))[0]
    seeds = len(next(iter(results.values())))
    kind = f"Student's t over {seeds} seeds" if seeds > 1 else "Wilson, one seed"
    rows = [_row("majority", [first["majority"]])]
    if first["lexical"] is not None:
        rows.append(_row("lexical overlap", [first["lexical"]]))
    for name, runs in results.items():
        row = _row(name, [run["accuracy"] for run in runs])
        seconds = sum(run["seconds"] for run in runs) / len(runs)
        rows.append({**row, "parameters": runs[0]["parameters"], "seconds": seconds})
    title = f"{first['dataset']}, {first['backbone']}: accuracy on all {first['accuracy']['total']} validation examples"
    return {"title": f"{title} ({kind}; baselines: Wilson)", "rows": rows, "runs": results}


def _row(name: str, accuracies: Sequence[Record]) -> Record:
    if len(accuracies) > 1:
        interval = student_interval([accuracy["mean"] for accuracy in accuracies])
    else:
        interval = Interval(*(accuracies[0][key] for key in ("mean", "low", "high")))
    return {
        "name": name,
        "accuracy": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "parameters": None,
        "seconds": None,
    }


def _write(summary: Record, specs: dict[str, list[RunSpec]], paths: dict[str, list[Path]], out: Path) -> None:
    records = {name: [RunDirectory(path).metrics() for path in folders] for name, folders in paths.items()}
    majority = summary["rows"][0]["accuracy"]
    plot_curves(records, out / "curves.png", majority)
    pictures = ["![curves](curves.png)"]
    for name, variants in specs.items():
        picture = f"usage-{Variant(name, '', {}).folder}.png"
        evaluations: list[Any] = [record for record in records[name][0] if record["event"] == "eval"]
        if variants[0].recipe.plot(evaluations, out / picture):
            pictures.append(f"Gates, messages and routing of {name}, seed {variants[0].seed}:\n\n![usage]({picture})")
    environment = RunDirectory(next(iter(paths.values()))[0]).read_config()["environment"]
    (out / "results.json").write_text(json.dumps({**summary, "environment": environment}, indent=2) + "\n")
    table = f"```\n{format_sweep(summary)}\n```"
    (out / "report.md").write_text("\n\n".join(["# Sweep", table, *pictures]) + "\n")
