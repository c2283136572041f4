"""Nsight Systems and Nsight Compute: the command lines, their tables, and the process that they profile.

Run as ``python -m xlayer_systems.profiling.nsight RUN STEPS WARMUP`` it takes the steps of the run directory RUN.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from xlayer_systems.errors import UserError
from xlayer_systems.profiling.capture import NsightCapture, run_steps
from xlayer_systems.profiling.nsight_tables import Launch, kernel_name, read_ncu, read_nsys
from xlayer_systems.profiling.summary import Row, Summary, longest_first, split_regions
from xlayer_systems.training.regions import DOMAIN, WINDOW

TOOLS = ("nsys", "ncu")
NSYS_TABLES = ("cuda_gpu_kern_sum", "nvtx_sum")
NCU_SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy")
NCU_LAUNCHES = 400  # every launch is run again for each group of counters
TIME = r"gpu__time_duration\.sum$"
BANDWIDTH = r"dram__bytes\.sum\.per_second$"
OCCUPANCY = r"sm__warps_active\.avg\.pct_of_peak_sustained_active$"

Command = list[str]


def watched(run: Path, steps: int, warmup: int) -> Command:
    """Returns the process whose steps the tools watch."""
    return [sys.executable, "-m", __name__, str(run), str(steps), str(warmup)]


def nsys_commands(run: Path, steps: int, warmup: int) -> list[Command]:
    """Returns the commands that take the report and then print each of `NSYS_TABLES`."""
    profile = ["nsys", "profile", "--trace=cuda,nvtx", "--sample=none", "--cpuctxsw=none"]
    profile += ["--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--force-overwrite=true"]
    profile += [f"--output={run / 'nsys'}", *watched(run, steps, warmup)]
    report = str(run / "nsys.nsys-rep")
    stats = ["nsys", "stats", "--format=csv", "--output=-", "--force-export=true"]
    return [profile, *([*stats, f"--report={name}", report] for name in NSYS_TABLES)]


def ncu_commands(run: Path, warmup: int) -> list[Command]:
    """Returns the commands that take the report of one step and then print its table."""
    profile = ["ncu", "--profile-from-start=off", f"--launch-count={NCU_LAUNCHES}", "--clock-control=none"]
    profile += ["--force-overwrite", *(f"--section={name}" for name in NCU_SECTIONS)]
    profile += [f"--export={run / 'ncu'}", *watched(run, 1, warmup)]
    table = ["ncu", f"--import={run / 'ncu.ncu-rep'}", "--page=raw", "--csv", "--print-units=base"]
    return [profile, [*table, "--print-kernel-base=demangled"]]


def profile(tools: Sequence[str], run: Path, steps: int, warmup: int) -> tuple[Summary, list[Command]]:
    """Runs the tools one after the other; returns their findings as one summary, and the commands."""
    commands: list[Command] = []
    summary: Summary | None = None
    launches: list[Launch] = []
    if "nsys" in tools:
        taken = nsys_commands(run, steps, warmup)
        commands += taken
        kernels, regions = _run_all("nsys", taken, run)[1:]
        summary = from_nsys(kernels.splitlines(), regions.splitlines())
    if "ncu" in tools:
        taken = ncu_commands(run, warmup)
        commands += taken
        launches = read_ncu(_run_all("ncu", taken, run)[1].splitlines())
        if not launches:
            raise UserError("ncu found no kernel in the step; does the model run on the GPU?")
    if summary is None:
        return from_ncu(launches), commands
    return with_ncu(summary, launches) if launches else summary, commands


def from_nsys(kernels: Iterable[str], regions: Iterable[str]) -> Summary:
    """Summarizes the tables cuda_gpu_kern_sum and nvtx_sum. Busy: the sum over kernels; concurrent ones count twice."""
    times: dict[str, list[float]] = defaultdict(list)
    calls: dict[str, int] = defaultdict(int)
    for row in read_nsys(kernels):
        name = kernel_name(row["Name"])
        times[name].append(float(row["Total Time (ns)"]) * 1e-9)
        calls[name] += int(row["Instances"])
    named = {}
    for row in read_nsys(regions):
        domain, _, name = row["Range"].partition(":")
        if domain == DOMAIN:
            named[name] = (int(row["Instances"]), float(row["Total Time (ns)"]) * 1e-9)
    if WINDOW not in named:
        raise UserError("nsys saw no NVTX ranges of the loop; is the package nvtx installed in this environment?")
    phases, modules = split_regions(named)
    rows = longest_first(Row(name, calls[name], sum(parts)) for name, parts in times.items())
    seconds = named[WINDOW][1]
    busy = sum(row.seconds for row in rows) / seconds
    return Summary("Nsight Systems", "cuda", seconds, min(1.0, busy), phases, rows, modules)


def ncu_rows(launches: Iterable[Launch]) -> list[Row]:
    """Returns one row per kernel; bandwidth (of DRAM) and occupancy are weighted by time."""
    groups: dict[str, list[tuple[float, float | None, float | None]]] = defaultdict(list)
    for launch in launches:
        time = (launch.largest(TIME) or 0.0) * 1e-9
        occupancy = launch.largest(OCCUPANCY)
        share = None if occupancy is None else occupancy / 100
        groups[launch.kernel].append((time, launch.largest(BANDWIDTH), share))
    rows = []
    for name, group in groups.items():
        bandwidth = _mean([(time, value) for time, value, _ in group])
        occupancy = _mean([(time, value) for time, _, value in group])
        rows.append(Row(name, len(group), sum(time for time, *_ in group), bandwidth, occupancy))
    return longest_first(rows)


def from_ncu(launches: Iterable[Launch]) -> Summary:
    """Summarizes Nsight Compute alone, which runs one kernel at a time: the window is what the kernels took."""
    rows = ncu_rows(launches)
    return Summary("Nsight Compute", "cuda", sum(row.seconds for row in rows), 1.0, [], rows, [])


def with_ncu(summary: Summary, launches: Iterable[Launch]) -> Summary:
    """Adds the bandwidth and the occupancy that Nsight Compute measured to ``summary`` of Nsight Systems."""
    seen = {row.name: row for row in ncu_rows(launches)}
    rows = []
    for row in summary.kernels:
        other = seen.get(row.name)
        known = (None, None) if other is None else (other.bandwidth, other.occupancy)
        rows.append(Row(row.name, row.calls, row.seconds, *known))
    return Summary(
        "Nsight Systems and Nsight Compute",
        summary.device,
        summary.seconds,
        summary.busy,
        summary.phases,
        rows,
        summary.modules,
    )


def _mean(weighted: Sequence[tuple[float, float | None]]) -> float | None:
    known = [(weight, value) for weight, value in weighted if value is not None]
    total = sum(weight for weight, _ in known)
    return sum(weight * value for weight, value in known) / total if total else None


def _run_all(tool: str, commands: Iterable[Command], run: Path) -> list[str]:
    """Returns what each command prints; all of it goes to ``<tool>.log`` in the run directory."""
    log, outputs = run / f"{tool}.log", []
    log.write_text("")
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        with log.open("a") as stream:
            stream.write(f"$ {shlex.join(command)}\n{done.stdout}{done.stderr}")
        if done.returncode:
            said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()] or ["no message"]
            raise UserError(f"{tool} ended with exit code {done.returncode}: {said[-1].strip()} (all of it: {log})")
        outputs.append(done.stdout)
    return outputs


def main(arguments: Sequence[str]) -> None:
    """Takes the steps of a run directory, under the tool that started this process."""
    from xlayer_systems.registry import open_run
    from xlayer_systems.training.directory import RunDirectory

    run, steps, warmup = RunDirectory(Path(arguments[0])), int(arguments[1]), int(arguments[2])
    system, spec = open_run(run.path)
    run_steps(system, spec, system.prepare(spec), run, NsightCapture(warmup), steps, warmup)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
