"""Classification of texts and pairs: accuracy with its interval, beside the majority and lexical baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from xlayer_systems.data.batches import ClassificationData
from xlayer_systems.reporting.plots import plot_curves
from xlayer_systems.reporting.stats import counted, kind_over_seeds, over_seeds
from xlayer_systems.reporting.tables import Records, table
from xlayer_systems.runs.spec import RunSpec
from xlayer_systems.runs.system import System
from xlayer_systems.training.directory import Record, RunDirectory


class ClassificationReport(System):
    """Reports accuracy with its interval, beside the majority and lexical baselines.

    Attributes:
        published_on: model, data set and measure of the accuracies of `published`.
    """

    published_on: ClassVar[str] = ""

    def published(self, preset: str) -> float | None:
        """Returns the accuracy that was published for a preset, as a proportion, if one was."""
        return None

    def result(self, spec: RunSpec, data: ClassificationData, metrics: Mapping[str, Any]) -> Record:
        lexical = data.task.lexical()
        return {
            "majority": counted(*data.task.majority()),
            "lexical": None if lexical is None else counted(*lexical),
            "accuracy": counted(metrics["correct"], metrics["total"]),
            "macro_f1": metrics["macro_f1"],
            "loss": metrics["loss"],
        }

    def format(self, result: Mapping[str, Any]) -> str:
        rows = [("majority", result["majority"])]
        if result["lexical"] is not None:
            rows.append(("lexical overlap", result["lexical"]))
        rows.append((f"{result['system']} {result['preset']}", result["accuracy"]))
        total = result["accuracy"]["total"]
        lines = [f"{result['dataset']}: accuracy on all {total} validation examples (Wilson 95 % interval)"]
        lines += [f"  {name:<18} {_percent(row)}" for name, row in rows]
        return "\n".join(lines)

    def report(
        self, spec: RunSpec, data: ClassificationData, result: Mapping[str, Any], run: RunDirectory
    ) -> list[str]:
        records, plots = run.metrics(), run.path / "plots"
        plot_curves({spec.preset: [records]}, plots / "curves.png", result["majority"]["mean"])
        lines = [
            f"Backbone `{spec.backbone}`, seed {spec.seed}, {result['parameters']:,} parameters, "
            f"{len(data.task.train)} training and {len(data.task.validation)} validation examples.",
            "",
            "```",
            self.format(result),
            "```",
            "",
            "| epoch | training loss | validation loss | accuracy | macro F1 |",
            "|---|---|---|---|---|",
        ]
        for r in records:
            if r["event"] == "eval":
                lines.append(
                    f"| {r['epoch']} | {r.get('train_loss', float('nan')):.4f} | {r['loss']:.4f} | {r['accuracy']:.4f} "
                    f"| {r['macro_f1']:.4f} |"
                )
        if any(record["event"] == "stopped" for record in records):
            lines += ["", f"Stopped after epoch 1: its accuracy was below {spec.options.stop_below}."]
        return [*lines, "", "![curves](plots/curves.png)"]

    def summarize(self, results: Mapping[str, list[Record]], records: Mapping[str, Sequence[Records]]) -> Record:
        first = next(iter(results.values()))[0]
        kind = kind_over_seeds(len(next(iter(results.values()))))
        rows = [_row("majority", [first["majority"]])]
        if first["lexical"] is not None:
            rows.append(_row("lexical overlap", [first["lexical"]]))
        for name, runs in results.items():
            row = _row(name, [run["accuracy"] for run in runs])
            seconds = sum(run["seconds"] for run in runs) / len(runs)
            published = self.published(name)
            rows.append({**row, "parameters": runs[0]["parameters"], "seconds": seconds, "published": published})
        title = (
            f"{first['dataset']}, {first['backbone']}: accuracy on all {first['accuracy']['total']} validation examples"
        )
        return {"title": f"{title} ({kind}; baselines: Wilson)", "rows": rows}

    def format_sweep(self, summary: Mapping[str, Any]) -> str:
        rows = [["", "accuracy", "95 % interval", "parameters", "seconds", "published"]]
        for row in summary["rows"]:
            interval = f"[{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
            parameters = f"{row['parameters']:,}" if row["parameters"] else ""
            seconds = f"{row['seconds']:.0f}" if row["seconds"] else ""
            accuracy, published = f"{100 * row['accuracy']:.1f} %", row.get("published")
            there = "" if published is None else f"{100 * published:.1f} %"
            rows.append([row["name"], accuracy, interval, parameters, seconds, there])
        if not any(row[-1] for row in rows[1:]):
            return "\n".join([summary["title"], *table([row[:-1] for row in rows])])
        return "\n".join([summary["title"], *table(rows), f"published: {self.published_on}"])

    def plot_sweep(self, summary: Mapping[str, Any], records: Mapping[str, Sequence[Records]], out: Path) -> list[str]:
        plot_curves(records, out / "curves.png", summary["rows"][0]["accuracy"])
        return ["![curves](curves.png)"]


def _percent(row: Mapping[str, Any]) -> str:
    return f"{100 * row['mean']:5.1f} %  [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def _row(name: str, accuracies: Sequence[Record]) -> Record:
    interval = over_seeds(accuracies)
    return {
        "name": name,
        "accuracy": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "parameters": None,
        "seconds": None,
    }
