"""The report of a run, one HTML file: `python -m benchmarks.report DIR` makes it anew from rows.jsonl and found.json.

Pictures are part of the file, and nothing is loaded from anywhere, so it can be sent and opened as it is.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2  # torch needs it, so it is there

from benchmarks.harness.measure import Row, read_rows
from benchmarks.harness.training import times_reference
from benchmarks.report import bounds, plots

TEMPLATE = Path(__file__).with_name("page.html.jinja")


class Table(NamedTuple):
    title: str
    about: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def write(folder: Path) -> Path:
    """Draws the plots and writes `report.html` into the folder of a run; returns its path."""
    rows = read_rows(folder / "rows.jsonl") if (folder / "rows.jsonl").exists() else []
    found = json.loads((folder / "found.json").read_text())
    pictures = plots.draw(folder, rows, found)
    images = {shows: _inlined(folder / name) for name, shows in pictures.items()}
    path = folder / "report.html"
    path.write_text(html(rows, found, images))
    return path


def _inlined(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def html(rows: Sequence[Row], found: Mapping[str, Any], images: Mapping[str, str]) -> str:
    """Renders the page; `images` are data URLs by their titles."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(TEMPLATE.read_text())
    tables = [table for table in _tables(rows, found) if table.rows]
    page = {"facts": facts(rows, found), "images": images, "tables": tables}
    return template.render(failures=found["failures"], notes=found["notes"], **page) + "\n"


def facts(rows: Sequence[Row], found: Mapping[str, Any]) -> dict[str, str]:
    """Lists machine, versions, commit, date and command of a run."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    when = f"{found['date']}, {found['minutes']:.1f} minutes" if "minutes" in found else found["date"]
    spreads = sorted(row.extra["spread"] for row in rows if "spread" in row.extra)
    quiet = f"{spreads[len(spreads) // 2]:.2f} (above 0.1 the machine was busy with something else)" if spreads else "-"
    machine = {"machine": f"{found['device']}, {found['threads']} threads", "versions": versions}
    run = {"commit": found["commit"], "when": when, "command": found["command"], "suite": found["suite"]}
    return machine | run | {"rows": str(len(rows)), "median spread of a row": quiet}


# ---- tables --------------------------------------------------------------------------------------------------------


def _tables(rows: Sequence[Row], found: Mapping[str, Any]) -> Iterable[Table]:
    yield limits(found.get("limits"))
    yield multiply_adds(found.get("limits", {}).get("multiply_adds", []))
    yield steps(rows)
    for family in dict.fromkeys(row.family for row in rows):
        yield times([row for row in rows if row.family == family], family)
    yield promises(rows)
    yield exponents(found["curves"])
    yield errors(found["numerics"])
    states = [[peer["package"], peer["what"], peer["state"]] for peer in found["peers"]]
    yield Table("Other packages", "What is timed against, and what is not.", ("package", "does", "here"), states)


def limits(found: Mapping[str, Any] | None) -> Table:
    """Makes the table of rates by level of a CPU's caches, and torch's beside them."""
    if found is None:
        return Table("Limits", "", (), ())
    lines = []
    for level in found.get("levels", []):
        size = f"{level['level']}, {_size(level['footprint'])}"
        size += "" if level["enough"] else ", less than four times the largest cache: memory is short"
        for what in ("copy", "read", "write"):
            lines.append([f"{what}, {size}", f"{level[f'{what}_rate'] / 1e9:.1f} GB/s"])
    lines.append(["torch's copy_, read + written", f"{found['torch_copy_rate'] / 1e9:.1f} GB/s"])
    lines += [[f"torch's GEMM, {dtype}", f"{rate / 1e9:.0f} GFLOP/s"] for dtype, rate in found["gemm_rates"].items()]
    lines += [[f"one call of {name} on 8 numbers", f"{1e6 * time:.1f} µs"] for name, time in found["launches"].items()]
    about = (
        "Measured before all else, and again beside every case, whose row has the rates of its own rounds. Copies "
        "count bytes read and written, and are the best of streaming stores, stores into the cache and memcpy."
    )
    return Table("Limits of the machine", about, ("what", "rate"), lines)


def _size(count: int) -> str:
    return f"{count / 2**20:g} MiB" if count >= 1 << 20 else f"{count / 2**10:g} KiB"


def multiply_adds(found: Sequence[Mapping[str, Any]]) -> Table:
    lines = []
    for one in found:
        what = [one["isa"], one["dtype"], str(one["threads"])]
        rates = [f"{one['rate'] / 1e9:.1f}", f"{one['clock'] / 1e9:.3f}", f"{one['pipes']:g}"]
        lines.append([*what, *rates, f"{one['of_pipes']:.3f}"])
    about = (
        "Independent multiply-adds in registers. The clock is that of a chain of dependent additions, one cycle each, "
        "in the same millisecond; the last column is the rate ÷ (2 · numbers in a vector · pipes · clock · threads)."
    )
    head = ("instruction set", "dtype", "threads", "GFLOP/s", "clock, GHz", "pipes", "of pipes × clock")
    return Table("Multiply-adds", about, head, lines)


STEPS = (
    "system",
    "case",
    "scale",
    "dtype",
    "impl",
    "ms",
    "tokens/s",
    "MB peak",
    "× reference",
    "parameters",
    "trained",
)


def steps(rows: Sequence[Row]) -> Table:
    about = (
        "Forward, loss and the gradient of every trained parameter. Scale: in what a case is smaller than its paper's "
        "shape. × reference: how many times faster than the same step in plain PyTorch."
    )
    lines = [_step(row, rows) for row in rows if "tokens_per_second" in row.extra]
    return Table("One training step of each system", about, STEPS, lines)


def _step(row: Row, rows: Sequence[Row]) -> list[str]:
    extra, times = row.extra, times_reference(row, rows)
    system = "hyper_lm" if row.family == "hyper" else row.op
    measured = [f"{row.ms_median:.4g}", f"{extra['tokens_per_second']:.0f}", _megabytes(row.peak_bytes)]
    counts = [f"{extra[key]:,}" if key in extra else "-" for key in ("parameters", "trained_parameters")]
    what = [system, row.case, extra["scale"] or "the paper's", row.dtype, row.impl]
    return [*what, *measured, "-" if times is None else f"{times:.2f}", *counts]


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.1f}"


TIMES = (
    "operator",
    "case",
    "pass",
    "dtype",
    "impl",
    "ms",
    "least ms",
    "spread",
    "× eager",
    "of limit",
    "bound",
    "MB peak",
)


def times(rows: Sequence[Row], family: str) -> Table:
    about = "Medians of calls taken in turns. × eager: how many times faster than plain PyTorch."
    return Table(f"Times: {family}", about, TIMES, [_time(row) for row in rows])


def _time(row: Row) -> list[str]:
    speed = row.extra.get("speedup_over_eager")
    what = [row.op, row.case, row.pass_, row.dtype, row.impl, f"{row.ms_median:.4g}", f"{row.ms_min:.4g}"]
    spread = f"{row.extra['spread']:.2f}" if "spread" in row.extra else "-"
    fraction = f"{row.fraction_of_limit:.3f}" + (" BEYOND" if row.extra.get("beyond_limit") else "")
    what += [spread, "-" if speed is None else f"{speed:.2f}", fraction]
    return [*what, _bound(row), _megabytes(row.peak_bytes)]


def _bound(row: Row) -> str:
    """Names what limits a row; for bytes also the level of cache or memory that could hold them."""
    bound = str(row.extra.get("bound", "-"))
    return f"{bound}, {row.extra['bytes_level']}" if bound == "bytes" and "bytes_level" in row.extra else bound


def promises(rows: Sequence[Row]) -> Table:
    verdicts = [verdict for verdict in bounds.judged(rows) if verdict.measured is not None]
    about = "Bounds of float32 rows on 2 cores of a CPU; those that the rows above can tell of."
    return Table("What is promised", about, bounds.HEAD, [verdict.cells for verdict in verdicts])


def exponents(curves: Sequence[Mapping[str, Any]]) -> Table:
    lines = []
    for curve in curves:
        scale, unit = (1e6, "MB") if curve["unit"] == "bytes" else (1, "ms")
        for impl, values in curve["values"].items():
            points = zip(curve["points"], values, strict=True)
            said = ", ".join(f"{point}: {value / scale:.3g}" for point, value in points)
            slope = curve["exponents"].get(impl)
            fit = "-" if slope is None else f"{slope:.2f}"
            lines.append([curve["family"], curve["what"], curve["variable"], impl, fit, unit, said])
    about = "The slope of the straight line through the points with both axes logarithmic."
    head = ("family", "operator", "over", "impl", "exponent", "unit", "points")
    return Table("How cost and memory grow", about, head, lines)


def errors(found: Sequence[Mapping[str, Any]]) -> Table:
    lines = []
    for one in found:
        values = [f"{one[key]:.1e}" for key in ("native", "eager", "bound")]
        holds = "yes" if one["holds"] else f"NO {one['said']}".strip()
        lines.append([one["op"], one["dtype"], one["result"], *values, str(one["comparisons"]), holds])
    about = (
        "Relative error against float64, of all results and gradients the one that is nearest to its bound: "
        "1.1 × the error of plain PyTorch + 2·eps; 1e-12 in float64."
    )
    head = ("operator", "dtype", "result", "native", "eager", "bound", "compared", "holds")
    return Table("Errors", about, head, lines)
