"""Reports what was built, what is in use on this machine and why, and what is missing.

Run ``python -m xlayer_ext.info``; ``--kernels`` adds a line for every CUDA kernel, ``--json`` prints all facts for a
program.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import defaultdict
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

import xlayer_ext
from xlayer_ext import _backend, _library

Facts = dict[str, Any]


def _native() -> tuple[ModuleType | None, str | None]:
    """Imports the `_native` module; returns it, or the reason why there is none."""
    try:
        return import_module("xlayer_ext._native"), None
    except ImportError as error:
        version = ".".join(platform.python_version_tuple()[:2])
        return None, f"_native is not there for Python {version} ({error}); build it: {_library.BUILD_COMMAND}"


def _library_facts(native: ModuleType | None) -> Facts:
    facts: Facts = {"loaded": _library.LOADED, "path": str(_library.PATH), "reason": _library.REASON}
    if native is not None:
        facts |= {
            "version": native.library_version(),
            "built_with_torch": native.built_with_torch(),
            "isa": native.isa(),
            "compiled_isas": native.compiled_isas(),
            "cuda_built": native.cuda_built(),
            "cuda_archs": native.archs(),
            "stream_symbol_resolved": native.stream_symbol_resolved(),
            "nvtx": native.nvtx(),
        }
    return facts


def _devices() -> list[Facts]:
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return found


def _missing(facts: Facts) -> list[str]:
    """Describes each missing part in one line, with the way to get it."""
    library, lines = facts["library"], []
    if not library["loaded"]:
        lines.append(library["reason"])
    if facts["native_module"] is not None:
        lines.append(facts["native_module"])
    if library["loaded"] and library.get("cuda_built") is False:
        lines.append(
            "CUDA kernels were not built (no nvcc, or XLAYER_CUDA=0); install the CUDA toolkit and build again"
        )
    if library.get("cuda_built") and not library["stream_symbol_resolved"]:
        lines.append("CUDA kernels were built, but this torch is a CPU build; install torch's CUDA build to use them")
    elif library.get("cuda_built") and not facts["devices"]:
        lines.append("CUDA kernels were built, but torch finds no CUDA device here")
    return lines


def collect() -> Facts:
    """Collects all facts, as JSON values."""
    native, no_native = _native()
    facts: Facts = {
        "version": xlayer_ext.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "backend": _backend.current_backend(),
        "library": _library_facts(native),
        "native_module": no_native,
        "kernels": sorted(f"{operator} ({device})" for operator, device in _backend._KERNELS),
        "cuda_kernel_resources": native.kernel_resources() if native is not None else [],
        "devices": _devices(),
    }
    facts["missing"] = _missing(facts)
    return facts


def _cuda_kernel_lines(rows: list[Facts]) -> list[str]:
    """Describes each kernel and architecture in one line, over all template variants."""
    groups: dict[tuple[str, str], list[Facts]] = defaultdict(list)
    for row in rows:
        groups[row["kernel"].split("<")[0], row["arch"]].append(row)
    lines = []
    for (name, arch), group in sorted(groups.items()):
        registers, ceiling = max(r["registers"] for r in group), max(r["register_ceiling"] for r in group)
        occupancy, floor = min(r["occupancy"] for r in group), min(r["occupancy_floor"] for r in group)
        shared, spills = max(r["shared_bytes"] for r in group), sum(r["spill_store_bytes"] for r in group)
        lines.append(
            f"{name:32} {arch:8} up to {registers} registers (stated {ceiling}), {shared} B shared, "
            f"{spills} B spilled, occupancy at least {100 * occupancy:.0f} % (stated {100 * floor:.0f} %)"
        )
    return lines


def _operator_summary(operators: list[str]) -> str:
    """Lists the operators, and where not all have kernels on a device, which."""
    devices: dict[str, list[str]] = defaultdict(list)
    for name, device in (operator.removesuffix(")").split(" (") for operator in operators):
        devices[name].append(device)
    forward = [name for name in devices if not name.endswith("_backward")]
    groups: dict[str, list[str]] = defaultdict(list)
    for name in forward:
        groups[" and ".join(devices[name])].append(name)
    return "\n".join(f"  operators   {', '.join(names)} ({where})" for where, names in groups.items())


def _cuda_kernel_summary(rows: list[Facts]) -> str:
    kernels = {row["kernel"].split("<")[0] for row in rows}
    archs = sorted({row["arch"] for row in rows})
    spilling = {row["kernel"].split("<")[0] for row in rows if row["spill_store_bytes"]}
    spills = f"{len(spilling)} of them spill registers" if spilling else "none spills registers"
    return f"  kernels     {len(kernels)} for CUDA, built for {', '.join(archs)}; {spills} (--kernels lists them)"


def _lines(facts: Facts, kernels: bool = False) -> list[str]:
    library = facts["library"]
    in_use = facts["backend"]
    why = "the library is loaded" if library["loaded"] else "the library is not loaded"
    if library["loaded"] and in_use == "reference":
        why = "it was asked for (XLAYER_BACKEND or xlayer_ext.backend)"
    lines = [
        f"xlayer-ext {facts['version']}, Python {facts['python']}, torch {facts['torch']} "
        f"(CUDA {facts['torch_cuda'] or 'none'}), {facts['threads']} threads",
        f"in use: {in_use} backend, because {why}",
        "",
        f"libxlayer     {library['path']}" if library["loaded"] else "libxlayer     not loaded",
    ]
    if library["loaded"] and "isa" in library:
        compiled = ", ".join(library["compiled_isas"])
        archs = ", ".join(library["cuda_archs"]) or "none"
        lines += [
            f"  built       version {library['version']} with the headers of torch {library['built_with_torch']}",
            f"  CPU         {library['isa']} in use; {compiled} compiled (XLAYER_CPU_ISA chooses)",
            f"  CUDA        architectures: {archs}; NVTX ranges {'on' if library['nvtx'] else 'off'}",
        ]
    if facts["cuda_kernel_resources"]:
        lines.append(_cuda_kernel_summary(facts["cuda_kernel_resources"]))
    if facts["kernels"]:
        lines.append(_operator_summary(facts["kernels"]))
    lines += [
        f"GPU {i}         {gpu['name']}, capability {gpu['capability']}" for i, gpu in enumerate(facts["devices"])
    ]
    if facts["cuda_kernel_resources"] and kernels:
        lines += ["", "CUDA kernels, as ptxas reports them and as their sources state:"]
        lines += [f"  {line}" for line in _cuda_kernel_lines(facts["cuda_kernel_resources"])]
    lines += ["", *(f"missing: {line}" for line in facts["missing"] or ["nothing"])]
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Prints the facts."""
    parser = argparse.ArgumentParser(prog="python -m xlayer_ext.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    parser.add_argument(
        "--kernels", action="store_true", help="list the CUDA kernels with registers, shared memory and occupancy"
    )
    chosen = parser.parse_args(arguments)
    facts = collect()
    print(json.dumps(facts, indent=2) if chosen.json else "\n".join(_lines(facts, chosen.kernels)))


if __name__ == "__main__":
    main()
