"""Reports of telepathy: accuracy with its interval beside the baselines, and how the messages differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from xlayer_systems.reporting.stats import counted, kind_over_seeds, over_seeds
from xlayer_systems.reporting.tables import Records, evaluations_of, number, percent, percent_range, table
from xlayer_systems.runs.spec import RunSpec
from xlayer_systems.runs.system import System
from xlayer_systems.telepathy.data import TelepathyData
from xlayer_systems.telepathy.latency import format_latency
from xlayer_systems.telepathy.plots import plot_bridges, plot_soft_tokens
from xlayer_systems.training.directory import Record, RunDirectory

USAGE = ("similarity", "perplexity")


class TelepathyReport(System):
    """Reports accuracy with its interval beside the baselines."""

    def result(self, spec: RunSpec, data: TelepathyData, metrics: Mapping[str, Any]) -> Record:
        kept = ("invalid", "diversity", "entity_transfer", "per_class", "loss", "usage")
        return {
            "majority": counted(*data.task.majority()),
            "accuracy": counted(metrics["correct"], metrics["total"]),
            **{key: metrics[key] for key in kept if key in metrics},
            "bridge": spec.config.bridge,
            "soft_tokens": spec.config.soft_tokens,
        }

    def format(self, result: Mapping[str, Any]) -> str:
        name = f"{result['system']} {result['preset']}"
        rows = [(name, result["accuracy"], result["invalid"]), ("majority", result["majority"], 0.0)]
        for baseline, row in result.get("baselines", {}).items():
            if baseline != "majority":
                rows.append((baseline, row, row.get("invalid", 0) / row["total"]))
        total = result["accuracy"]["total"]
        title = f"{result['dataset']}: accuracy on {total} validation examples (Wilson 95 % interval)"
        body = [("", "accuracy", "95 % interval", "no answer", "")]
        for label, row, invalid in rows:
            other = "" if row["total"] == total else f"of {row['total']}"
            body.append((label, percent(row), percent_range(row), f"{100 * invalid:.1f} %", other))
        lines = [title, *(f"  {line}" for line in table(body))]
        usage = result.get("usage", {})
        if usage:
            said = [f"similarity of messages {usage['similarity']:.3f}", f"different texts {result['diversity']:.3f}"]
            if "perplexity" in usage:
                said.append(f"code perplexity {usage['perplexity']:.1f}")
            lines.append("  " + ", ".join(said))
        if "latency" in result:
            lines += ["", format_latency(result["latency"])]
        return "\n".join(lines)

    def report(self, spec: RunSpec, data: TelepathyData, result: Mapping[str, Any], run: RunDirectory) -> list[str]:
        records, plots = run.metrics(), run.path / "plots"
        from xlayer_systems.reporting.plots import plot_curves

        plot_curves({spec.preset: [records]}, plots / "curves.png", result["majority"]["mean"])
        lines = [
            f"From `{spec.config.sender}` to `{spec.config.receiver}`, bridge {spec.config.bridge} with "
            f"{spec.config.soft_tokens} soft tokens, seed {spec.seed}, {result['parameters']:,} trained parameters, "
            f"{len(data.train)} training examples.",
            "",
            "```",
            self.format(result),
            "```",
            "",
            "| step | training loss | LM loss | accuracy | no answer | similarity | code perplexity |",
            "|---|---|---|---|---|---|---|",
        ]
        for r in evaluations_of(records):
            usage = r.get("usage", {})
            lines.append(
                f"| {r['step']} | {r.get('train_loss', float('nan')):.4f} | {r['loss']:.4f} | {r['accuracy']:.4f} "
                f"| {r['invalid']:.4f} | {usage.get('similarity', float('nan')):.4f} "
                f"| {number(usage.get('perplexity'))} |"
            )
        if "per_class" in result:
            lines += ["", "| answer | right | of |", "|---|---|---|"]
            lines += [f"| {label} | {right} | {there} |" for label, (right, there) in result["per_class"].items()]
        return [*lines, "", "![curves](plots/curves.png)"]

    def summarize(self, results: Mapping[str, list[Record]], records: Mapping[str, Sequence[Records]]) -> Record:
        first = next(iter(results.values()))[0]
        kind = kind_over_seeds(len(next(iter(results.values()))))
        rows = [{"name": "majority", **vars(over_seeds([first["majority"]]))}]
        for name, runs in results.items():
            row = {"name": name, **vars(over_seeds([run["accuracy"] for run in runs]))}
            row.update({key: fmean(run[key] for run in runs) for key in ("invalid", "diversity", "seconds")})
            for key in USAGE:
                values = [run["usage"][key] for run in runs if key in run.get("usage", {})]
                row[key] = fmean(values) if values else None
            row["per_seed"] = [run["accuracy"]["mean"] for run in runs]
            rows.append({**row, **{key: runs[0][key] for key in ("parameters", "soft_tokens", "bridge")}})
        title = f"{first['dataset']}, {first['backbone']}: accuracy on {first['accuracy']['total']} validation examples"
        return {"title": f"{title} ({kind}; majority: Wilson)", "rows": rows}

    def format_sweep(self, summary: Mapping[str, Any]) -> str:
        head = ("", "accuracy", "95 % interval", "no answer", "similarity", "code perplexity", "parameters", "seconds")
        rows = [head]
        for row in summary["rows"]:
            cells = [row["name"], percent(row), percent_range(row)]
            if "invalid" in row:
                cells += [
                    f"{100 * row['invalid']:.1f} %", number(row["similarity"], 3), number(row["perplexity"]),
                    f"{row['parameters']:,}", f"{row['seconds']:.0f}",
                ]  # fmt: skip
            rows.append((*cells, *[""] * (len(head) - len(cells))))
        return "\n".join([summary["title"], *table(rows)])

    def plot_sweep(self, summary: Mapping[str, Any], records: Mapping[str, Sequence[Records]], out: Path) -> list[str]:
        majority, rows = summary["rows"][0], summary["rows"][1:]
        plot_bridges({name: [evaluations_of(r) for r in seeds] for name, seeds in records.items()}, out / "curves.png")
        lines = ["![accuracy, similarity and code perplexity](curves.png)"]
        if len({row["soft_tokens"] for row in rows}) > 1:
            plot_soft_tokens(rows, majority["mean"], out / "soft_tokens.png")
            lines.append("![accuracy over soft tokens](soft_tokens.png)")
        return lines
