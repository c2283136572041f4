"""Many runs in one table: every variant with every seed, one run directory each."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xlayer_systems.errors import UserError
from xlayer_systems.reporting.tables import evaluations_of
from xlayer_systems.runs.execute import train_run
from xlayer_systems.runs.spec import RunSpec
from xlayer_systems.runs.system import System
from xlayer_systems.training.directory import Record, RunDirectory, disk_errors
from xlayer_systems.training.options import check_seed, parse_overrides

AllRecords = dict[str, list[list[Record]]]  # per variant, per seed: metrics.jsonl


@dataclass(frozen=True)
class Variant:
    """Holds a preset with overrides, written ``H9`` or ``H9:router_weight=full_softmax:top_k=2``."""

    name: str
    preset: str
    overrides: dict[str, str]

    @property
    def folder(self) -> str:
        """Returns the name with characters that are safe in paths."""
        return self.name.replace(":", "-").replace("=", "_").replace("/", "_")


def parse_variants(text: str) -> list[Variant]:
    """Parses ``"plain,H9,H9:router_weight=full_softmax"`` as variants; the same one twice is refused."""
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


def cross_variants(variants: Sequence[Variant], **settings: str | None) -> list[Variant]:
    """Returns every variant with every combination of the values of ``settings``, each separated by commas or None."""
    for key, text in settings.items():
        if text is not None:
            values = [value.strip() for value in text.split(",")]
            if not all(values) or len(set(values)) < len(values):
                raise UserError(f"expected different values of {key}, separated by commas, got {text!r}")
            variants = [
                Variant(f"{variant.name}:{key}={value}", variant.preset, {**variant.overrides, key: value})
                for variant in variants
                for value in values
            ]
    return list(variants)


def parse_seeds(text: str) -> list[int]:
    """Parses ``"0,1,2"`` as whole numbers, each once."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"expected seeds such as 0,1,2, got {text!r}") from error
    if len(set(seeds)) < len(seeds):
        raise UserError(f"a seed is named twice in {text!r}")
    for seed in seeds:
        check_seed(seed)
    return seeds


def run_sweep(system: System, specs: dict[str, list[RunSpec]], out: Path, resume: bool) -> Record:
    """Trains every spec (per variant name, one per seed) and writes results.json, report.md and the plots into ``out``.

    With ``resume`` finished runs are kept and an interrupted one continues.
    """
    with disk_errors(out):
        if out.exists() and not resume:
            raise UserError(f"sweep directory {out} exists; choose another --out, or continue it with --resume")
    results: dict[str, list[Record]] = {name: [] for name in specs}
    paths: dict[str, list[Path]] = {name: [] for name in specs}
    for name, variants in specs.items():
        for spec in variants:
            path = out / f"{Variant(name, '', {}).folder}-seed{spec.seed}"
            results[name].append(train_run(system, spec, path, resume))
            paths[name].append(path)
    records = {name: [RunDirectory(path).metrics() for path in folders] for name, folders in paths.items()}
    summary = {"system": system.name, **system.summarize(results, records), "runs": results}
    if int(os.environ.get("RANK", "0")) == 0:
        with disk_errors(out):
            _write(system, summary, specs, records, RunDirectory(next(iter(paths.values()))[0]), out)
    return summary


def _write(
    system: System,
    summary: Record,
    specs: dict[str, list[RunSpec]],
    records: AllRecords,
    first: RunDirectory,
    out: Path,
) -> None:
    pictures = system.plot_sweep(summary, records, out)
    for name, variants in specs.items():
        picture = f"usage-{Variant(name, '', {}).folder}.png"
        evaluations = evaluations_of(records[name][0])
        if system.plot_usage(evaluations, out / picture):
            title = f"{system.usage_title[0].upper()}{system.usage_title[1:]}"
            pictures.append(f"{title} of {name}, seed {variants[0].seed}:\n\n![usage]({picture})")
    environment = first.read_config()["environment"]
    (out / "results.json").write_text(json.dumps({**summary, "environment": environment}, indent=2) + "\n")
    table = f"```\n{system.format_sweep(summary)}\n```"
    (out / "report.md").write_text("\n\n".join(["# Sweep", table, *pictures]) + "\n")
