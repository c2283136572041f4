"""Language modelling: loss per token and per byte, and how many tokens a model needs to reach another one's loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoTokenizer

from xlayer_systems.data.blocks import LanguageModelingData, encode_text
from xlayer_systems.errors import UserError
from xlayer_systems.hf.encoders import load_quietly
from xlayer_systems.reporting.plots import plot_depth, plot_losses
from xlayer_systems.reporting.stats import Interval, student_interval
from xlayer_systems.reporting.tables import Records, evaluations_of, table
from xlayer_systems.runs.spec import RunSpec
from xlayer_systems.runs.system import System
from xlayer_systems.training.directory import Record, RunDirectory

BASELINE = "plain"

Curve = Sequence[tuple[float, float]]  # (tokens, loss) per evaluation, in their order


class LanguageModelReport(System):
    """Reports loss per token and per byte."""

    def result(self, spec: RunSpec, data: LanguageModelingData, metrics: Mapping[str, Any]) -> Record:
        return {
            **{name: metrics[name] for name in ("loss", "perplexity", "bits_per_byte")},
            "validation_tokens": metrics["tokens"],
            "validation_share": len(data.validation) / data.whole_validation,
            "tokens_per_step": spec.options.batch_size * spec.options.max_length,
        }

    def format(self, result: Mapping[str, Any]) -> str:
        share = result["validation_share"]
        of = "all of validation" if share == 1 else f"{100 * share:.0f} % of validation"
        return "\n".join(
            [
                f"{result['dataset']}: {result['system']} {result['preset']} on {result['validation_tokens']:,} tokens "
                f"({of})",
                f"  loss           {result['loss']:.4f} nats per token",
                f"  perplexity     {result['perplexity']:.2f}",
                f"  bits per byte  {result['bits_per_byte']:.4f}",
            ]
        )

    def report(
        self, spec: RunSpec, data: LanguageModelingData, result: Mapping[str, Any], run: RunDirectory
    ) -> list[str]:
        records, plots = run.metrics(), run.path / "plots"
        per_step = result["tokens_per_step"]
        plot_losses({spec.preset: [validation_curve(records, per_step)]}, plots / "curves.png")
        lines = [
            f"Size `{spec.backbone}`, seed {spec.seed}, {result['parameters']:,} parameters; {len(data.train)} blocks "
            f"of {data.length} tokens for training, {len(data.validation)} of {data.whole_validation} for validation.",
            "",
            "```",
            self.format(result),
            "```",
            "",
            "| tokens | training loss | validation loss | bits per byte |",
            "|---|---|---|---|",
        ]
        for r in records:
            if r["event"] == "eval":
                lines.append(
                    f"| {r['step'] * per_step:,} | {r.get('train_loss', float('nan')):.4f} | {r['loss']:.4f} "
                    f"| {r['bits_per_byte']:.4f} |"
                )
        return [*lines, "", "The training loss is the mean over the epoch so far.", "", "![curves](plots/curves.png)"]

    def summarize(self, results: Mapping[str, list[Record]], records: Mapping[str, Sequence[Records]]) -> Record:
        first = next(iter(results.values()))[0]
        curves = {
            name: [validation_curve(r, run["tokens_per_step"]) for r, run in zip(records[name], runs, strict=True)]
            for name, runs in results.items()
        }
        baseline = curves.get(BASELINE)
        rows = []
        for name, runs in results.items():
            losses = [run["loss"] for run in runs]
            interval = _interval(losses)
            row = {"name": name, "loss": interval.mean, "low": interval.low, "high": interval.high}
            row["bits_per_byte"] = fmean(run["bits_per_byte"] for run in runs)
            if baseline is not None:
                row |= _against(losses, [run["loss"] for run in results[BASELINE]], curves[name], baseline)
            row["parameters"] = runs[0]["parameters"]
            row["seconds"] = fmean(run["seconds"] for run in runs)
            rows.append(row)
        seeds = len(next(iter(results.values())))
        intervals = f"95 % intervals: Student's t over {seeds} seeds" if seeds > 1 else "one seed, no intervals"
        title = f"{first['dataset']}, {first['backbone']}: validation loss in nats per token ({intervals})"
        return {"title": title, "rows": rows}

    def format_sweep(self, summary: Mapping[str, Any]) -> str:
        header: tuple[str, ...] = ("", "loss", "interval", "bits/byte")
        compared = "speed_up" in summary["rows"][0]
        if compared:
            header += (f"loss - {BASELINE}", "interval", f"tokens to {BASELINE}'s loss", "speed-up")
        lines: list[tuple[str, ...]] = [(*header, "parameters", "seconds")]
        for row in summary["rows"]:
            line: tuple[str, ...] = (row["name"], f"{row['loss']:.4f}")
            line += (_range(row["low"], row["high"]), f"{row['bits_per_byte']:.4f}")
            if compared:
                difference = row["difference"]
                line += (f"{difference['mean']:+.4f}", _range(difference["low"], difference["high"], "+.4f"))
                line += ("not reached" if row["tokens"] is None else f"{row['tokens']:,.0f}", format_speed_up(row))
            lines.append((*line, f"{row['parameters']:,}", f"{row['seconds']:.0f}"))
        return "\n".join([summary["title"], *table(lines)])

    def plot_sweep(self, summary: Mapping[str, Any], records: Mapping[str, Sequence[Records]], out: Path) -> list[str]:
        per_step = {name: runs[0]["tokens_per_step"] for name, runs in summary["runs"].items()}
        curves = {name: [validation_curve(r, per_step[name]) for r in seeds] for name, seeds in records.items()}
        target = mean_curve(curves[BASELINE])[-1][1] if BASELINE in curves else None
        plot_losses(curves, out / "curves.png", target)
        last = {name: [evaluations_of(r)[-1] for r in seeds] for name, seeds in records.items()}
        plot_depth(last, out / "layers.png")
        lines = ["![validation loss](curves.png)"]
        if target is not None:
            lines += [
                f"Speed-up: tokens that the mean curve of `{BASELINE}` took to its final loss, divided by those that "
                "the variant's mean curve took to the same loss (linear between evaluations). The learning rate falls "
                "to 0 at the end of a run, so a variant that is early gets there at a higher rate. Per seed: "
                + "; ".join(f"{row['name']} {', '.join(row['speed_up_per_seed'])}" for row in summary["rows"])
                + "."
            ]
        return [*lines, "The layers at the last evaluation, mean over seeds:", "![layers](layers.png)"]

    def complete(
        self, model: Any, folder: Path, prompt: str, tokens: int, temperature: float, top_k: int | None, seed: int
    ) -> str:
        """Continues ``prompt`` with ``model``, a `LanguageModel`, and the tokenizer saved in ``folder``."""
        tokenizer = load_quietly(AutoTokenizer, folder, f"the tokenizer in {folder}", "what the run saved there")
        # Documents begin after an end-of-text token.
        ids = torch.tensor([[tokenizer.eos_token_id, *encode_text(tokenizer, [prompt])[0]]])
        try:
            made = model.model.generate(
                ids,
                tokens,
                temperature=temperature,
                top_k=top_k,
                generator=torch.Generator().manual_seed(seed),
                end_id=tokenizer.eos_token_id,
            )
        except ValueError as error:
            raise UserError(str(error)) from error
        text: str = tokenizer.decode(made[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def validation_curve(records: Records, tokens_per_step: int) -> list[tuple[float, float]]:
    """Returns (training tokens, validation loss) of each evaluation of a run."""
    return [(record["step"] * tokens_per_step, record["loss"]) for record in evaluations_of(records)]


def mean_curve(curves: Sequence[Curve]) -> list[tuple[float, float]]:
    """Returns the mean over seeds that were evaluated at the same tokens."""
    return [(points[0][0], fmean(loss for _, loss in points)) for points in zip(*curves, strict=True)]


def tokens_to_reach(curve: Curve, loss: float) -> float | None:
    """Returns the tokens at which ``curve`` first comes down to ``loss``, by linear interpolation; None where it never
    does.

    Where already the first evaluation is that low, its tokens.
    """
    before: tuple[float, float] | None = None
    for tokens, value in curve:
        if value <= loss:
            if before is None:
                return tokens
            share = (before[1] - loss) / (before[1] - value)
            return before[0] + share * (tokens - before[0])
        before = (tokens, value)
    return None


def speed_up(curve: Curve, baseline: Curve) -> Record:
    """Returns how many times fewer tokens than ``baseline`` the ``curve`` takes to the baseline's final loss.

    ``{"tokens", "speed_up", "bound"}``: where the loss is never reached, ``tokens`` is None and the speed-up is below
    the given one (bound "<"); where the first evaluation is that low already, it is above the given one (bound ">").
    """
    target = baseline[-1][1]
    reference = tokens_to_reach(baseline, target) or baseline[-1][0]
    tokens = tokens_to_reach(curve, target)
    if tokens is None:
        return {"tokens": None, "speed_up": reference / curve[-1][0], "bound": "<"}
    is_first = tokens == curve[0][0] and curve[0][1] < target
    return {"tokens": tokens, "speed_up": reference / tokens, "bound": ">" if is_first else ""}


def format_speed_up(found: Mapping[str, Any]) -> str:
    """Formats a speed-up, for example ``1.35×``, ``<0.97×`` or ``>20.00×``."""
    return f"{found['bound']}{found['speed_up']:.2f}×"


def _against(
    losses: Sequence[float], plain: Sequence[float], curves: Sequence[Curve], baseline: Sequence[Curve]
) -> Record:
    """Compares a variant with the baseline, paired: same seed, same examples in the same order."""
    difference = _interval([mine - theirs for mine, theirs in zip(losses, plain, strict=True)])
    per_seed = [format_speed_up(speed_up(*pair)) for pair in zip(curves, baseline, strict=True)]
    return {
        "difference": {"mean": difference.mean, "low": difference.low, "high": difference.high},
        **speed_up(mean_curve(curves), mean_curve(baseline)),
        "speed_up_per_seed": per_seed,
    }


def _interval(values: Sequence[float]) -> Interval:
    return student_interval(values) if len(values) > 1 else Interval(values[0], math.nan, math.nan)


def _range(low: float, high: float, style: str = ".4f") -> str:
    return "" if math.isnan(low) else f"[{low:{style}}, {high:{style}}]"
