"""Brings the resources of every CUDA kernel, by ptxas and by its source, from the build into `xlayer_ext._native`.

`compile NVCC ARGS...` runs nvcc and keeps ptxas's words beside the object file;
`collect HEADER OBJECT...` turns them into C++ initializers, one line per kernel and architecture.

A kernel's source promises in comment lines directly above it (docs/guides/cuda-without-a-gpu.md):

    // resources: masked_mean_kernel threads 256, registers 64, shared 8256, occupancy 0.5
    // sass: masked_mean_backward_kernel<*, [!1]> LDG.128, only STG.128
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

CUDA_SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"

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

PROMISE = re.compile(r"// (resources|sass): (\w+)(<.*>)? (.+)")
RESOURCES = re.compile(r"threads (\d+), registers (\d+), shared (\d+), occupancy (\d+(?:\.\d+)?)")
OPCODES = re.compile(r"(?:only )?[A-Z][A-Z0-9.]*(?:, (?:only )?[A-Z][A-Z0-9.]*)*")


@dataclass(frozen=True)
class Promise:
    """A comment line above a kernel. `arguments` selects instances of a template: `<float, *>`; without, all."""

    where: str
    kernel: str
    arguments: str

    def covers(self, instance: str) -> bool:
        name, bracket, arguments = instance.partition("<")
        return name == self.kernel and (not self.arguments or fnmatchcase(bracket + arguments, self.arguments))


@dataclass(frozen=True)
class Ceiling(Promise):
    """Limits of registers per thread and of shared memory per block, static or asked for by the launch."""

    threads: int
    registers: int
    shared: int
    occupancy: float


@dataclass(frozen=True)
class Instructions(Promise):
    """Machine instructions that the kernel is written for; after `only`, the operation is done in no other way."""

    opcodes: tuple[str, ...]


def sources(folder: Path = CUDA_SOURCES) -> list[Path]:
    return sorted([*folder.rglob("*.cu"), *folder.rglob("*.cuh")])


def promises(folder: Path = CUDA_SOURCES) -> list[Ceiling | Instructions]:
    """Reads all promises of the CUDA sources in a folder, in their order; raises for one that cannot be read."""
    found: list[Ceiling | Instructions] = []
    for path in sources(folder):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if not line.lstrip().startswith(("// resources:", "// sass:")):
                continue
            where = f"{path.relative_to(folder)}:{number}"
            promise = PROMISE.fullmatch(line.strip())
            kind, kernel, arguments, rest = promise.groups(default="") if promise else ("", "", "", "")
            numbers = RESOURCES.fullmatch(rest)
            if kind == "resources" and numbers:
                threads, registers, shared = (int(value) for value in numbers.groups()[:3])
                found.append(Ceiling(where, kernel, arguments, threads, registers, shared, float(numbers[4])))
            elif kind == "sass" and OPCODES.fullmatch(rest):
                found.append(Instructions(where, kernel, arguments, tuple(rest.split(", "))))
            else:
                raise SystemExit(f"{where}: cannot read this promise of a kernel's resources: {line.strip()}")
    return found


def ceiling_of(instance: str, stated: Iterable[Promise]) -> Ceiling | None:
    """Returns the first ceiling that covers a kernel: exceptions are written above the rule."""
    return next((each for each in stated if isinstance(each, Ceiling) and each.covers(instance)), None)


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(arch: str, threads: int, registers: int, shared: int) -> float:
    """Returns the resident threads of a multiprocessor over the most it can hold; 0 where its limits are not known."""
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
    """Reads (mangled name, arch, threads, registers, shared, stack, spill stores, spill loads) of each kernel."""
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


def without_parameters(name: str) -> str:
    """Shortens `void a::(anonymous namespace)::k<__half, 4>(a::Args)` to `k<float16, 4>`, as the sources write it."""
    name = re.sub(r"\(anonymous namespace\)::|\b(?!\d)\w+::", "", name).removeprefix("void ")
    name = name.replace("__nv_bfloat16", "bfloat16").replace("__half", "float16")
    kernel = re.match(r"\w+(?:<.*>)?(?=\()", name)
    return kernel[0] if kernel else name


def demangle(names: list[str]) -> list[str]:
    """Names of kernels as people write them; as they are where binutils is missing."""
    try:
        run = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return names
    return [without_parameters(name) for name in run.stdout.splitlines()]


def describe(reports: Sequence[str], stated: Sequence[Promise]) -> list[dict[str, Any]]:
    """Makes a row per kernel and architecture, as `_native.kernel_resources()` gives it."""
    kernels = [kernel for report in reports for kernel in kernels_of(report)]
    rows = []
    for name, kernel in zip(demangle([kernel[0] for kernel in kernels]), kernels, strict=True):
        _, arch, threads, registers, shared, stack, stores, loads = kernel
        ceiling = ceiling_of(name, stated)
        shared += ceiling.shared if ceiling else 0  # ptxas counts none of what the launch asks for
        row = {
            "kernel": name,
            "arch": arch,
            "threads": threads,
            "registers": registers,
            "shared_bytes": shared,
            "stack_bytes": stack,
            "spill_store_bytes": stores,
            "spill_load_bytes": loads,
            "register_ceiling": ceiling.registers if ceiling else 0,
            "occupancy": occupancy(arch, threads, registers, shared),
            "occupancy_floor": ceiling.occupancy if ceiling else 0.0,
        }
        rows.append(row)
    return sorted(rows, key=lambda row: (row["kernel"], row["arch"]))


def collect(header: Path, objects: list[str]) -> None:
    rows = describe([Path(path + ".ptxas").read_text() for path in objects], promises())
    lines = []
    for row in rows:
        kernel, arch, *numbers = row.values()
        lines.append(f'{{"{kernel}", "{arch}", {", ".join(str(number) for number in numbers)}}},\n')
    header.parent.mkdir(parents=True, exist_ok=True)
    header.write_text("".join(lines))


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        sys.exit(compile_and_keep(sys.argv[2:]))
    collect(Path(sys.argv[2]), sys.argv[3:])
