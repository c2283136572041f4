"""Reports of a bypass: what a latent keeps of the hidden states, and the loss on the task beside the baselines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from xlayer_systems.bypass.plots import plot_reconstruction
from xlayer_systems.reporting.plots import plot_losses
from xlayer_systems.reporting.stats import student_interval
from xlayer_systems.reporting.tables import Records, evaluations_of, table
from xlayer_systems.runs.spec import RunSpec
from xlayer_systems.runs.system import PLAIN, System
from xlayer_systems.training.directory import Record, RunDirectory

TASK = "task"  # folder and name of stage 2 in a run; of stage 1:
RECONSTRUCTION = "reconstruction"
MAX_COLUMNS = 8  # layers that fit side by side in a terminal


class BypassReport(System):
    """Reports on either stage, by the config's ``stage``, and on runs of both."""

    def result(self, spec: RunSpec, data: Any, metrics: Mapping[str, Any]) -> Record:
        names = ("loss", "r2", "r2_mean") if stage_of(spec) == "reconstruct" else ("loss", "perplexity")
        return {**{name: metrics[name] for name in names}, "validation_tokens": metrics["tokens"]}

    def format(self, result: Mapping[str, Any]) -> str:
        name = f"{result['dataset']}: {result['system']} {result['preset']}"
        lines = [f"{name} on {result['validation_tokens']:,} validation tokens"]
        if RECONSTRUCTION in result:
            stage, base = result[RECONSTRUCTION], result["compared"]["base_parameters"]
            lines += format_reconstruction(stage)
            share = f"{100 * stage['parameters'] / base:.2f} % of the model's {base:,}"
            lines.append(f"  encoder and projectors: {stage['parameters']:,} trained parameters, {share}")
        if "r2" in result:
            return "\n".join(lines + format_reconstruction(result))
        if "compared" in result:
            return "\n".join(lines + format_compared(result["compared"]))
        return "\n".join([*lines, f"  loss {result['loss']:.4f} nats per token, perplexity {result['perplexity']:.2f}"])

    def warnings(self, result: Mapping[str, Any]) -> list[str]:
        return worse_than_alone(result["compared"]) if "compared" in result else []

    def report(self, spec: RunSpec, data: Any, result: Mapping[str, Any], run: RunDirectory) -> list[str]:
        if stage_of(spec) == "both":
            return self._report_both(spec, result, run)
        plots = run.path / "plots"
        evaluations = evaluations_of(run.metrics())
        lines = [f"On `{spec.backbone}`, seed {spec.seed}.", "", "```", self.format(result), "```", ""]
        if stage_of(spec) == "reconstruct":
            plot_reconstruction(result["r2"], result["pca"], evaluations, plots / "reconstruction.png")
            return [*lines, "![R² per layer, and over the steps](plots/reconstruction.png)"]
        plot_losses({spec.preset: [loss_curve(evaluations, spec)]}, plots / "curves.png")
        return [*lines, "![curves](plots/curves.png)"]

    def _report_both(self, spec: RunSpec, result: Mapping[str, Any], run: RunDirectory) -> list[str]:
        compared = result["compared"]
        base = compared["base_parameters"]
        lines = [f"On `{spec.backbone}`, seed {spec.seed}.", ""]
        if RECONSTRUCTION in result:
            stage = result[RECONSTRUCTION]
            share = f"{100 * stage['parameters'] / base:.2f} % of the model"
            lines += ["## Stage 1: reconstruction of every layer's hidden states", ""]
            lines += [f"{stage['parameters']:,} trained parameters, {share}."]
            lines += ["", "```", *format_reconstruction(stage), "```", ""]
            lines += [f"![R² per layer, and over the steps]({RECONSTRUCTION}/plots/reconstruction.png)", ""]
        lines += ["## Stage 2: the task", "", "```", *format_compared(compared), "```"]
        curves: dict[str, list[list[tuple[float, float]]]] = {}
        for record in evaluations_of(run.metrics()):
            if record["stage"] != RECONSTRUCTION:
                name = spec.preset if record["stage"] == TASK else record["stage"]
                curves.setdefault(name, [[]])[0].append((record["step"] * result["tokens_per_step"], record["loss"]))
        if curves:
            plot_losses(curves, run.path / "plots" / "curves.png")
            lines += ["", "![validation loss](plots/curves.png)"]
        return lines

    def summarize(self, results: Mapping[str, list[Record]], records: Mapping[str, Sequence[Records]]) -> Record:
        first = next(iter(results.values()))[0]
        rows = []
        for name, runs in results.items():
            row = {"name": name, "parameters": runs[0]["parameters"], "seconds": fmean(r["seconds"] for r in runs)}
            row |= {"loss": _over_seeds([run["loss"] for run in runs])}
            if name != PLAIN and PLAIN in results:
                pairs = zip(runs, results[PLAIN], strict=True)
                row |= {"difference": _over_seeds([run["loss"] - plain["loss"] for run, plain in pairs])}
            rows.append(row)
        seeds = len(next(iter(results.values())))
        intervals = f"95 % intervals: Student's t over {seeds} seeds" if seeds > 1 else "one seed, no intervals"
        return {"title": f"{first['dataset']}, {first['backbone']}: loss in nats per token ({intervals})", "rows": rows}

    def format_sweep(self, summary: Mapping[str, Any]) -> str:
        lines = [("", "loss", "interval", "loss - plain", "interval", "trained parameters", "seconds")]
        for row in summary["rows"]:
            difference = row.get("difference")
            compared = ("", "") if difference is None else (f"{difference['mean']:+.4f}", _range(difference, "+.4f"))
            measured = (f"{row['loss']['mean']:.4f}", _range(row["loss"]))
            lines.append((row["name"], *measured, *compared, f"{row['parameters']:,}", f"{row['seconds']:.0f}"))
        return "\n".join([summary["title"], *table(lines)])

    def plot_sweep(self, summary: Mapping[str, Any], records: Mapping[str, Sequence[Records]], out: Path) -> list[str]:
        per_step = {name: runs[0]["tokens_per_step"] for name, runs in summary["runs"].items()}
        curves = {
            name: [[(r["step"] * per_step[name], r["loss"]) for r in run if _is_task_evaluation(r)] for run in seeds]
            for name, seeds in records.items()
        }
        trained = {name: seeds for name, seeds in curves.items() if all(seeds)}
        if not trained:
            return []
        plain = next((row["loss"]["mean"] for row in summary["rows"] if row["name"] == PLAIN), None)
        plot_losses(trained, out / "curves.png", plain)
        return ["![validation loss](curves.png)"]


def format_reconstruction(result: Mapping[str, Any]) -> list[str]:
    """Formats R² per layer beside that of principal components; many layers one below the other."""
    r2, pca = result["r2"], result.get("pca", [])
    rows = [("layer", *map(str, range(len(r2))), "mean"), ("R² of the latent", *(f"{v:.4f}" for v in (*r2, fmean(r2))))]
    if pca:
        rows.append((f"R² of {result['latent']} components", *(f"{v:.4f}" for v in (*pca, fmean(pca)))))
        rows.append(("ratio", *(f"{a / b:.4f}" for a, b in zip((*r2, fmean(r2)), (*pca, fmean(pca)), strict=True))))
    return [f"  {line}" for line in table(rows if len(r2) <= MAX_COLUMNS else list(zip(*rows, strict=True)))]


def format_compared(compared: Mapping[str, Any]) -> list[str]:
    """Formats the loss of each model, and its difference from the frozen model alone."""
    rows = [("", "loss", "95 % interval", "difference", "95 % interval", "trained parameters", "of the model")]
    for name, row in compared["rows"].items():
        cells = [name, f"{row['loss']['mean']:.4f}", _range(row["loss"])]
        if "difference" in row:
            cells += [f"{row['difference']['mean']:+.4f}", _range(row["difference"], "+.4f")]
            cells += [f"{row['parameters']:,}", f"{100 * row['parameters'] / compared['base_parameters']:.2f} %"]
        rows.append((*cells, *[""] * (7 - len(cells))))
    lines = [f"  {line}" for line in table(rows)]
    if "between" in compared:
        between = compared["between"]
        names = " - ".join(between["names"])
        lines.append(f"  {names}: {between['mean']:+.4f} {_range(between, '+.4f')}")
    lines.append(f"  Student's t over {compared['blocks']} blocks of validation, differences paired")
    return lines + [f"  warning: {text}" for text in worse_than_alone(compared)]


def worse_than_alone(compared: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for every model whose loss is above that of the frozen model alone, its interval included."""
    found = []
    for name, row in compared["rows"].items():
        difference = row.get("difference")
        low = None if difference is None else difference["low"]
        # Of a single block there is no interval.
        if low is not None and (difference["mean"] if math.isnan(low) else low) > 0:
            found.append(
                f"{name} is {difference['mean']:.4f} nats per token worse than the model alone; it needs more steps "
                "(max_steps, reconstruct_steps) or a smaller learning rate"
            )
    return found


def loss_curve(evaluations: Records, spec: RunSpec) -> list[tuple[float, float]]:
    """Returns (training tokens, validation loss) of stage 2."""
    per_step = spec.options.batch_size * spec.options.max_length
    return [(r["step"] * per_step, r["loss"]) for r in evaluations]


def stage_of(spec: RunSpec) -> str:
    """Returns which stage a run is of; one without a config compares the model alone and has both."""
    return "both" if spec.config is None else str(spec.config.stage)


def _is_task_evaluation(record: Mapping[str, Any]) -> bool:
    return record["event"] == "eval" and record.get("stage") == TASK


def _over_seeds(values: Sequence[float]) -> Record:
    if len(values) < 2:
        return {"mean": values[0], "low": None, "high": None}
    return {**vars(student_interval(values))}


def _range(interval: Mapping[str, Any], style: str = ".4f") -> str:
    return "" if interval["low"] is None else f"[{interval['low']:{style}}, {interval['high']:{style}}]"
