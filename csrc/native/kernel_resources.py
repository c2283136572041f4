"""What ptxas says of every CUDA kernel, brought from the build into `xlayer_ext._native`.

`compile NVCC ARGS...` runs nvcc and keeps ptxas's words beside the object file;
`collect HEADER OBJECT...` turns them into C++ initializers, one line per kernel and architecture.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

# Per multiprocessor: threads, registers, shared bytes, blocks; shared bytes that every block costs besides its own
# (CUDA programming guide, "Compute Capabilities").
LIMITS = {
    80: (2048, 65536, 164 * 1024, 32, 1024),
    86: (1536, 65536, 100 * 1024, 16, 1024),
    89: (1536, 65536, 100 * 1024, 24, 1024),
    90: (2048, 65536, 228 * 1024, 32, 1024),
    100: (2048, 65536, 228 * 1024, 32, 1024),
    120: (1536, 65536, 100 * 1024, 24, 1024),
}
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
BLOCK = re.compile(r"\.entry (\w+)\(.*?\.(?:max|req)ntid (\d+)(?:, (\d+), (\d+))?", re.DOTALL)


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(arch: str, threads: int, registers: int, shared: int) -> float:
    """Resident threads of a multiprocessor over the most it can hold; 0 where its limits are not known."""
    digits = re.sub(r"\D", "", arch)
    if not threads or not digits or int(digits) not in LIMITS:
        return 0.0
    max_threads, max_registers, max_shared, max_blocks, reserved = LIMITS[int(digits)]
    warps = -(-threads // 32)
    by_registers = max_registers // (round_up(max(registers, 1) * 32, 256) * warps)
    by_shared = max_shared // round_up(shared + reserved, 128)
    blocks = min(max_threads // (warps * 32), by_registers, by_shared, max_blocks)
    return blocks * warps * 32 / max_threads


def compile_and_keep(command: list[str]) -> int:
    """Runs nvcc, passes its output on, and writes ptxas's report and the block sizes beside the object."""
    with tempfile.TemporaryDirectory() as kept:
        run = subprocess.run([*command, "--keep", "--keep-dir", kept], capture_output=True, text=True)
        ptx = "\n".join(path.read_text() for path in sorted(Path(kept).glob("*.ptx")))
    sys.stdout.write(run.stdout)
    spoken = [line for line in run.stderr.splitlines() if "ptxas info" not in line and not SPILLS.search(line)]
    sys.stderr.write("".join(line + "\n" for line in spoken))
    if "-o" in command and run.returncode == 0:
        blocks = {name: int(x) * int(y or 1) * int(z or 1) for name, x, y, z in BLOCK.findall(ptx)}
        lines = [f"block {name} {threads}" for name, threads in blocks.items()]
        Path(command[command.index("-o") + 1] + ".ptxas").write_text("\n".join([*lines, run.stdout, run.stderr]))
    return run.returncode


def kernels_of(report: str) -> list[tuple[str, str, int, int, int, int, int, int]]:
    """(mangled name, arch, threads, registers, shared, stack, spill stores, spill loads) of each kernel."""
    threads = {name: int(count) for name, count in re.findall(r"^block (\w+) (\d+)$", report, re.MULTILINE)}
    rows = []
    for part in re.split(r"(?=ptxas info\s*: Compiling entry)", report)[1:]:
        entry, spills, used, shared = (pattern.search(part) for pattern in (ENTRY, SPILLS, USED, SHARED))
        if not (entry and spills and used):
            raise SystemExit(f"cannot read ptxas's report:\n{part}")
        name, arch = entry.groups()
        stack, stores, loads = (int(value) for value in spills.groups())
        rows.append(
            (name, arch, threads.get(name, 0), int(used[1]), int(shared[1]) if shared else 0, stack, stores, loads)
        )
    return rows


def demangle(names: list[str]) -> list[str]:
    try:
        run = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return names
    return run.stdout.splitlines()


def collect(header: Path, objects: list[str]) -> None:
    rows = [row for path in objects for row in kernels_of(Path(path + ".ptxas").read_text())]
    names = demangle([row[0] for row in rows]) if rows else []
    lines = []
    for name, (_, arch, threads, registers, shared, *spills) in sorted(zip(names, rows, strict=True)):
        fraction = occupancy(arch, threads, registers, shared)
        numbers = ", ".join(str(value) for value in (threads, registers, shared, *spills))
        lines.append(f'{{"{name}", "{arch}", {numbers}, {fraction}}},')
    header.parent.mkdir(parents=True, exist_ok=True)
    header.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        sys.exit(compile_and_keep(sys.argv[2:]))
    collect(Path(sys.argv[2]), sys.argv[3:])
