"""Reports of an L-Former: accuracy with its interval beside the baselines, and the loss on text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from xlayer_systems.lformer.data import ToolData
from xlayer_systems.lformer.plots import plot_paths
from xlayer_systems.reporting.stats import counted, kind_over_seeds, over_seeds
from xlayer_systems.reporting.tables import Records, evaluations_of, number, percent, percent_range, table
from xlayer_systems.runs.spec import RunSpec
from xlayer_systems.runs.system import System
from xlayer_systems.training.directory import Record, RunDirectory

KEPT = ("value_error", "value_error_of_mean", "lm_loss", "loss", "per_tool", "usage")
HEAD = ("", "tool", "95 % interval", "plan", "value error", "LM loss", "parameters")


class ToolUseReport(System):
    """Reports the accuracy of tools and plans beside the baselines."""

    def result(self, spec: RunSpec, data: ToolData, metrics: Mapping[str, Any]) -> Record:
        return {
            "majority": counted(*data.task.majority()),
            "keyword": counted(*data.task.keyword()),
            **measured(metrics),
            "phase_a_steps": spec.options.phase_a_steps,
        }

    def format(self, result: Mapping[str, Any]) -> str:
        rows = [HEAD, _cells(f"{result['system']} {result['preset']}", result)]
        if "baseline" in result:
            rows.append(_cells("head only", result["baseline"]))
        for name, key in (("one keyword", "keyword"), ("majority", "majority")):
            rows.append((name, percent(result[key]), percent_range(result[key]), *[""] * (len(HEAD) - 3)))
        total = result["accuracy"]["total"]
        lines = [f"{result['dataset']}: tools on {total} validation requests (Wilson 95 % interval)"]
        lines += [f"  {line}" for line in table(rows)]
        if "value_error_of_mean" in result:
            lines.append(f"  value error of always saying the mean {result['value_error_of_mean']:.3f}")
        if "base_lm_loss" in result:
            lines.append(f"  LM loss of the base before training {result['base_lm_loss']:.4f} nats per token")
        return "\n".join([*lines, *(f"  warning: {text}" for text in worse_than_head(result))])

    def warnings(self, result: Mapping[str, Any]) -> list[str]:
        return worse_than_head(result)

    def report(self, spec: RunSpec, data: ToolData, result: Mapping[str, Any], run: RunDirectory) -> list[str]:
        records, plots = run.metrics(), run.path / "plots"
        from xlayer_systems.reporting.plots import plot_curves

        plot_curves({spec.preset: [records]}, plots / "curves.png", result["majority"]["mean"])
        lines = [
            f"Base `{spec.backbone}`, {result['path_parameters']:,} parameters of the side path, seed {spec.seed}; "
            f"{len(data.train)} training requests. Phase A, the base frozen, ends after step "
            f"{spec.options.phase_a_steps}; phase B trains its last {spec.config.last_k_unfreeze} layers too.",
            "",
            "```",
            self.format(result),
            "```",
            "",
            "| step | phase | training loss | tool | plan | value error | LM loss |",
            "|---|---|---|---|---|---|---|",
        ]
        for r in evaluations_of(records):
            phase = "A" if r["step"] <= spec.options.phase_a_steps else "B"
            lines.append(
                f"| {r['step']} | {phase} | {r.get('train_loss', float('nan')):.4f} | {r['accuracy']:.4f} "
                f"| {number(r.get('plan_accuracy'), 4)} | {number(r.get('value_error'), 4)} | {r['lm_loss']:.4f} |"
            )
        lines += _after_phase_a(spec, result, records)
        lines += ["", "| tool | right | of |", "|---|---|---|"]
        lines += [f"| {tool} | {right} | {there} |" for tool, (right, there) in result["per_tool"].items()]
        return [*lines, "", "![curves](plots/curves.png)"]

    def summarize(self, results: Mapping[str, list[Record]], records: Mapping[str, Sequence[Records]]) -> Record:
        first = next(iter(results.values()))[0]
        kind = kind_over_seeds(len(next(iter(results.values()))))
        rows: list[Record] = [
            {"name": name, **vars(over_seeds([first[key]]))}
            for name, key in (("majority", "majority"), ("one keyword", "keyword"))
        ]
        for name, runs in results.items():
            row: Record = {"name": name, **vars(over_seeds([run["accuracy"] for run in runs]))}
            row["per_seed"] = [run["accuracy"]["mean"] for run in runs]
            row["plan"] = fmean(run["plan"]["mean"] for run in runs) if "plan" in first else None
            row["value_error"] = fmean(run["value_error"] for run in runs) if "value_error" in first else None
            row |= {key: fmean(run[key] for run in runs) for key in ("lm_loss", "seconds")}
            rows.append({**row, "path_parameters": runs[0]["path_parameters"]})
        title = f"{first['dataset']}, {first['backbone']}: tools on {first['accuracy']['total']} validation requests"
        return {"title": f"{title} ({kind}; baselines: Wilson)", "rows": rows}

    def format_sweep(self, summary: Mapping[str, Any]) -> str:
        rows = [(*HEAD, "seconds")]
        for row in summary["rows"]:
            cells = [row["name"], percent(row), percent_range(row)]
            if "lm_loss" in row:
                plan = "" if row["plan"] is None else f"{100 * row['plan']:.1f} %"
                cells += [plan, number(row["value_error"], 3), f"{row['lm_loss']:.4f}"]
                cells += [f"{row['path_parameters']:,}", f"{row['seconds']:.0f}"]
            rows.append((*cells, *[""] * (len(rows[0]) - len(cells))))
        return "\n".join([summary["title"], *table(rows)])

    def plot_sweep(self, summary: Mapping[str, Any], records: Mapping[str, Sequence[Records]], out: Path) -> list[str]:
        plot_paths({name: [evaluations_of(r) for r in seeds] for name, seeds in records.items()}, out / "curves.png")
        return ["![accuracy, gates and movement](curves.png)"]


def worse_than_head(result: Mapping[str, Any]) -> list[str]:
    """Returns a sentence where the side path chooses tools worse than heads without one, intervals included."""
    head = result.get("baseline")
    if head is None or result["accuracy"]["high"] >= head["accuracy"]["low"]:
        return []
    mine, theirs = percent(result["accuracy"]), percent(head["accuracy"])
    return [f"tools are right in {mine} with the side path and in {theirs} with heads alone; it may need more steps"]


def _after_phase_a(spec: RunSpec, result: Mapping[str, Any], records: Records) -> list[str]:
    """Returns a line about the frozen base, where both the run and its baseline were evaluated then."""
    mine = [record for record in evaluations_of(records) if record["step"] == spec.options.phase_a_steps]
    theirs = result.get("baseline", {}).get("phase_a")
    if not mine or theirs is None:
        return []
    rows = ((spec.preset, measured(mine[0])["accuracy"]), ("head only", theirs["accuracy"]))
    told = ", ".join(f"{name} {percent(row)} {percent_range(row)}" for name, row in rows)
    return ["", f"Tools at the end of phase A: {told}."]


def measured(metrics: Mapping[str, Any]) -> Record:
    row: Record = {"accuracy": counted(metrics["correct"], metrics["total"])}
    if "plans_correct" in metrics:
        row["plan"] = counted(metrics["plans_correct"], metrics["total"])
    return row | {key: metrics[key] for key in KEPT if key in metrics}


def _cells(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    plan = percent(row["plan"]) if "plan" in row else ""
    measured = (percent(row["accuracy"]), percent_range(row["accuracy"]), plan, number(row.get("value_error"), 3))
    parameters = f"{row['path_parameters']:,}" if "path_parameters" in row else ""
    return (name, *measured, f"{row['lm_loss']:.4f}", parameters)
