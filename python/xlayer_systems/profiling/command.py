"""One profile from its description to its report: `profile_run`.

::

    config.json     what was run, as of every run
    trace.json      by `torch.profiler`: opens in https://ui.perfetto.dev or chrome://tracing
    nsys.nsys-rep   by Nsight Systems; nsys.log has what it printed
    ncu.ncu-rep     by Nsight Compute; ncu.log
    summary.json    the numbers of the summary, all rows
    report.md       the summary, and how it was made
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import torch

from xlayer_systems.errors import UserError
from xlayer_systems.profiling import nsight
from xlayer_systems.profiling.capture import EVAL_BATCHES, TorchCapture, run_steps
from xlayer_systems.profiling.summary import Summary, format_summary, from_trace
from xlayer_systems.runs.spec import RunSpec
from xlayer_systems.runs.system import System
from xlayer_systems.training.directory import RunDirectory, disk_errors, environment

AUTO, TORCH = "auto", "torch"
TOOLS = (AUTO, TORCH, *nsight.TOOLS)


def choose_tools(wanted: str) -> list[str]:
    """Returns the profilers to use, one after the other: those asked for, or the best that this machine has."""
    if wanted not in TOOLS:
        raise UserError(f"unknown tool {wanted!r}; expected one of {', '.join(TOOLS)}")
    missing = {tool: _missing(tool) for tool in nsight.TOOLS}
    if wanted == AUTO:
        return [tool for tool in nsight.TOOLS if missing[tool] is None] or [TORCH]
    reason = missing.get(wanted)
    if reason is not None:
        raise UserError(f"{wanted} cannot be used here: {reason}; --tool {TORCH} always can")
    return [wanted]


def _missing(tool: str) -> str | None:
    """Returns what a tool of Nsight lacks on this machine."""
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if shutil.which(tool) is None:
        return f"there is no {tool} on the PATH"
    if importlib.util.find_spec("nvtx") is None:
        return "it needs the package nvtx (pip install 'xlayer-ext[profile]')"
    return None


def profile_run(
    system: System, spec: RunSpec, path: Path, *, steps: int = 5, warmup: int = 3, tool: str = AUTO
) -> list[str]:
    """Profiles ``steps`` steps of ``spec`` and an evaluation into a new run directory; returns the summary's lines."""
    for name, count in (("steps", steps), ("warmup", warmup)):
        if count < 1:
            raise UserError(f"{name} must be at least 1, got {count}")
    tools = choose_tools(tool)
    with disk_errors(path), RunDirectory(path) as run:
        return _profile(system, spec, run, steps, warmup, tools)


def _profile(system: System, spec: RunSpec, run: RunDirectory, steps: int, warmup: int, tools: list[str]) -> list[str]:
    path = run.path
    if path.exists():
        raise UserError(f"run directory {path} exists; choose another --run-dir")
    spec = system.profiled(spec)
    data = system.prepare(spec)
    run.create(spec.to_dict(), environment(data.fingerprint))
    commands: list[list[str]] = []
    if tools == [TORCH]:
        run_steps(system, spec, data, run, TorchCapture(path / "trace.json", warmup), steps, warmup)
        summary = from_trace(json.loads((path / "trace.json").read_text()))
    else:
        summary, commands = nsight.profile(tools, path, steps, warmup)
    title = f"{spec.system} {spec.preset} on {spec.dataset}: {_plural(steps, 'step')} and an evaluation of "
    title += _plural(EVAL_BATCHES, "batch", "batches")
    lines = [title, *format_summary(summary)]
    run.write_json("summary.json", {"steps": steps, "warmup": warmup, **summary.to_dict()})
    run.write_text("report.md", "\n".join(_report(spec, summary, lines, commands)) + "\n")
    return lines


def _report(spec: RunSpec, summary: Summary, lines: list[str], commands: list[list[str]]) -> list[str]:
    options: dict[str, Any] = dataclasses.asdict(spec.options)
    chosen = ", ".join(f"{name} {options[name]}" for name in ("batch_size", "accumulate", "max_length", "dtype"))
    report = [f"# Profile of {spec.system} {spec.preset}", "", f"Backbone `{spec.backbone}`, {chosen}.", ""]
    report += ["```", *lines, "```", "", "Times of phases and modules are those of the host."]
    if summary.device == "cpu":
        report += [
            "Of operators: without the operators that they call. `reads` counts each input once, so it bounds what was "
            "moved from below; of views it says nothing."
        ]
    if commands:
        report += ["", "Made by", "", "```", *map(shlex.join, commands), "```", ""]
        report += ["Built with XLAYER_NVTX=1, the package's own operators and launches are NVTX ranges too."]
    else:
        report += ["", "`trace.json` opens in https://ui.perfetto.dev or chrome://tracing."]
    return report


def _plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
