"""Resources of the CUDA kernels, by ptxas and by their machine code, against what their sources promise.

Directly above a kernel stand comment lines that tools/kernel_resources.py reads:

    // resources: masked_mean_kernel threads 256, registers 64, shared 8256, occupancy 0.5
    // sass: masked_mean_backward_kernel<*, [!1]> LDG.128, only STG.128

`resources` states ceilings: threads of a block (exactly), registers of a thread, bytes of shared memory of a block
(static and dynamic), and the occupancy that these leave on sm_80 or sm_90, the worse. Nothing may spill. What launches
ask for, threads and dynamic shared memory, is known from the emulator: test_emulated.py.
`sass` states instructions, of which every one must be in the machine code: LDG.128 is found in LDG.E.128.CONSTANT. With
`only`, moreover, every STG must be an STG.128.

For some instances of a template, the name takes a shell pattern of the arguments as a demangler writes them, with
bfloat16 and float16 for CUDA's types: `score_kernel<float, *>`, `score_kernel<*, (Activation)1, [48]>`. An instance
keeps to the first `resources` line that covers it, so exceptions stand above the rule, and to every `sass` line that
covers it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from xlayer_ext import _library, info

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "kernel_resources.py"

Row = dict[str, Any]
Opcodes = Mapping[tuple[str, str], set[str]]  # by kernel and architecture


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_resources", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


resources = load_script()


# --- The checks: each gives one line per thing that is wrong ---------------------------------------------------------


def wrong_resources(rows: Iterable[Row], promises: Iterable[Any]) -> list[str]:
    """Lists kernels that spill, use more than their source states, or are not stated."""
    wrong = []
    for row in rows:
        kernel, who = row["kernel"], f"{row['kernel']} on {row['arch']}"
        if row["stack_bytes"] or row["spill_store_bytes"] or row["spill_load_bytes"]:
            spilled = f"{row['spill_store_bytes']} bytes stored, {row['spill_load_bytes']} loaded"
            wrong.append(f"{who} spills: {spilled}, {row['stack_bytes']} bytes of stack")
        ceiling = resources.ceiling_of(kernel, promises)
        if ceiling is None:
            wrong.append(f"{who}: no `// resources: {kernel.split('<')[0]} …` above it")
            continue
        if row["threads"] != ceiling.threads:
            wrong.append(
                f"{who} has __launch_bounds__ of {row['threads']} threads, {ceiling.where} states {ceiling.threads}"
            )
        for what, key, most in (
            ("registers", "registers", ceiling.registers),
            ("bytes of shared memory", "shared_bytes", ceiling.shared),
        ):
            if row[key] > most:
                wrong.append(f"{who} uses {row[key]} {what}, {ceiling.where} states {most}")
    return wrong


def wrong_promises(promises: Iterable[Any], kernels: Iterable[str]) -> list[str]:
    """Lists promises that match no kernel of the build, or whose occupancy does not follow from their other numbers."""
    promises, kernels = list(promises), set(kernels)
    in_use = {id(resources.ceiling_of(kernel, promises)) for kernel in kernels}
    wrong = []
    for promise in promises:
        if isinstance(promise, resources.Ceiling):
            used = id(promise) in in_use
            numbers = promise.threads, promise.registers, promise.shared
            worst = min(resources.occupancy(arch, *numbers) for arch in ("sm_80", "sm_90a"))
            if promise.occupancy != worst:
                wrong.append(f"{promise.where} states occupancy {promise.occupancy}, its other numbers give {worst}")
        else:
            used = any(promise.covers(kernel) for kernel in kernels)
        if not used:
            wrong.append(f"{promise.where}: no kernel of the build is {promise.kernel}{promise.arguments}")
    return wrong


def wrong_instructions(found: Opcodes, promises: Iterable[Any]) -> list[str]:
    """Lists kernels without an instruction that their source states, or with no statement."""
    promises = [promise for promise in promises if isinstance(promise, resources.Instructions)]
    wrong = []
    for (kernel, arch), opcodes in found.items():
        name = kernel.split("<")[0]
        if name not in {promise.kernel for promise in promises}:
            wrong.append(f"{kernel} on {arch}: no `// sass: {name} …` above it")
        for promise in promises:
            for stated in promise.opcodes if promise.covers(kernel) else ():
                operation, *modifiers = stated.removeprefix("only ").split(".")
                same = sorted(opcode for opcode in opcodes if opcode.split(".")[0] == operation)
                others = [opcode for opcode in same if not set(modifiers) <= set(opcode.split("."))]
                if same == others:
                    wrong.append(
                        f"{kernel} on {arch} has no {stated.removeprefix('only ')}, which {promise.where} states"
                    )
                elif others and stated.startswith("only "):
                    wrong.append(f"{kernel} on {arch} has {', '.join(others)}, {promise.where} states {stated}")
    return wrong


# --- The build ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Returns the build's rows of kernel resources."""
    if not _library.LOADED:
        pytest.skip(f"no native library: {_library.REASON}")
    from xlayer_ext import _native

    found: list[Row] = _native.kernel_resources()
    assert bool(found) == _native.cuda_built()
    if not found:
        pytest.skip("this build has no CUDA kernels")
    return found


def test_kernels_keep_to_what_their_sources_state(rows: list[Row]) -> None:
    assert wrong_resources(rows, resources.promises()) == []


def test_every_promise_is_of_a_kernel(rows: list[Row]) -> None:
    assert wrong_promises(resources.promises(), (row["kernel"] for row in rows)) == []


def test_every_architecture_has_every_kernel(rows: list[Row]) -> None:
    from xlayer_ext import _native

    real = {f"sm_{arch.removesuffix('-real')}" for arch in _native.archs() if not arch.endswith("-virtual")}
    kernels = {row["kernel"] for row in rows}
    assert {(row["kernel"], row["arch"]) for row in rows} == {(kernel, arch) for kernel in kernels for arch in real}
    assert {"masked_mean_kernel<float, 4>", "masked_mean_backward_kernel<bfloat16, 8>"} <= kernels


def test_info_shows_what_is_stated(rows: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    row = next(row for row in rows if row["kernel"].startswith("masked_mean_kernel<"))
    ceiling = resources.ceiling_of(row["kernel"], resources.promises())
    assert (row["register_ceiling"], row["occupancy_floor"]) == (ceiling.registers, ceiling.occupancy)
    assert row["shared_bytes"] == ceiling.shared and row["occupancy"] >= ceiling.occupancy
    info.main(["--kernels"])
    (line,) = [
        line
        for line in capsys.readouterr().out.splitlines()
        if re.search(rf"\bmasked_mean_kernel +{row['arch']}", line)
    ]
    assert f"(stated {ceiling.registers}), {ceiling.shared} B shared, 0 B spilled" in line
    assert f"(stated {100 * ceiling.occupancy:.0f} %)" in line


@pytest.mark.parametrize("path", resources.sources(), ids=lambda path: str(path.relative_to(resources.CUDA_SOURCES)))
def test_promises_stand_directly_above_their_kernel(path: Path) -> None:
    kernel_here = re.compile(r"(?:template\s*<.*>\s*)?__global__ \w+ (?:__launch_bounds__\([^()]*\)\s*)?(\w+)\(")
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        if re.match(r"\s*// (resources|sass):", line):
            below = next(at for at, text in enumerate(lines[number:], number) if not text.lstrip().startswith("//"))
            kernel = kernel_here.match("\n".join(lines[below : below + 4]))
            assert kernel and line.split(": ")[1].startswith(kernel[1]), f"{path.name}:{number} is not above its kernel"


# --- Machine code ----------------------------------------------------------------------------------------------------


def cuda_tool(name: str) -> str:
    """Returns a program of the CUDA toolkit, from the path, CUDA_HOME or its package; skips where there is none."""
    places: list[Any] = [shutil.which(name), Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", name)]
    try:
        files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
        places += [file.locate() for file in files if file.name == name]
    except importlib.metadata.PackageNotFoundError:
        pass
    for place in places:
        if place and Path(place).is_file():
            return str(place)
    pytest.skip(f"needs {name}: install nvidia-cuda-{name} or the CUDA toolkit")


def disassemble(binary: Path, folder: Path) -> dict[tuple[str, str], set[str]]:
    """Returns the opcodes of every kernel in an object or library, for every architecture that it holds."""
    cuobjdump, nvdisasm = cuda_tool("cuobjdump"), cuda_tool("nvdisasm")
    subprocess.run([cuobjdump, "-xelf", "all", str(binary)], cwd=folder, check=True, capture_output=True)
    opcode = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
    found: dict[tuple[str, str], set[str]] = {}
    for cubin in folder.glob("*.cubin"):
        text = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
        arch = re.search(r"\.target\s+(sm_\w+)", text)
        assert arch, f"nvdisasm names no architecture in {cubin}"
        _, *functions = re.split(r"^\.text\.(\w+):$", text, flags=re.MULTILINE)
        names = resources.demangle(functions[::2])
        for name, body in zip(names, functions[1::2], strict=True):
            found.setdefault((name, arch[1]), set()).update(opcode.findall(body))
    return found


def test_kernels_have_the_instructions_that_their_sources_state(rows: list[Row], tmp_path: Path) -> None:
    found = disassemble(_library.PATH, tmp_path)
    assert set(found) == {(row["kernel"], row["arch"]) for row in rows}
    assert wrong_instructions(found, resources.promises()) == []


# --- The checks themselves ---------------------------------------------------------------------------------------


def row(kernel: str = "k<float, 4>", **differences: int) -> Row:
    fine = {"threads": 256, "registers": 64, "shared_bytes": 1024, "stack_bytes": 0}
    return {"kernel": kernel, "arch": "sm_80", "spill_store_bytes": 0, "spill_load_bytes": 0, **fine, **differences}


def promises_of(folder: Path, *lines: str) -> list[Any]:
    (folder / "kernels.cu").write_text("".join(f"// {line}\n" for line in lines))
    found: list[Any] = resources.promises(folder)
    return found


K = "resources: k threads 256, registers 64, shared 1024, occupancy 0.5"


@pytest.mark.parametrize(
    ("differences", "complaint"),
    [
        ({}, ""),
        ({"registers": 65}, "k<float, 4> on sm_80 uses 65 registers, kernels.cu:1 states 64"),
        ({"shared_bytes": 1025}, "k<float, 4> on sm_80 uses 1025 bytes of shared memory, kernels.cu:1 states 1024"),
        ({"threads": 0}, "k<float, 4> on sm_80 has __launch_bounds__ of 0 threads, kernels.cu:1 states 256"),
        ({"stack_bytes": 8}, "k<float, 4> on sm_80 spills: 0 bytes stored, 0 loaded, 8 bytes of stack"),
        ({"spill_load_bytes": 4}, "k<float, 4> on sm_80 spills: 0 bytes stored, 4 loaded, 0 bytes of stack"),
    ],
)
def test_what_exceeds_its_ceiling_is_named(tmp_path: Path, differences: dict[str, int], complaint: str) -> None:
    assert wrong_resources([row(**differences)], promises_of(tmp_path, K)) == [complaint] * bool(complaint)


def test_a_kernel_that_states_nothing_is_named(tmp_path: Path) -> None:
    promises = promises_of(tmp_path, K)
    assert wrong_resources([row("other<1>")], promises) == ["other<1> on sm_80: no `// resources: other …` above it"]
    assert wrong_instructions({("other<1>", "sm_80"): {"EXIT"}}, promises) == [
        "other<1> on sm_80: no `// sass: other …` above it"
    ]


def test_a_promise_that_is_not_of_this_build_is_named(tmp_path: Path) -> None:
    wide = "resources: k<float, 8> threads 256, registers 64, shared 1024, occupancy 0.375"
    assert wrong_promises(promises_of(tmp_path, K, wide, "sass: m LDG"), ["k<float, 8>"]) == [
        "kernels.cu:2 states occupancy 0.375, its other numbers give 0.5",
        "kernels.cu:2: no kernel of the build is k<float, 8>",  # the line above takes it
        "kernels.cu:3: no kernel of the build is m",
    ]


@pytest.mark.parametrize("line", ["resources: k registers 64", "sass: k", "sass: k ldg", "resources: k<float 64"])
def test_a_promise_that_cannot_be_read_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(SystemExit, match=r"kernels\.cu:1: cannot read"):
        promises_of(tmp_path, line)


def test_instances_of_a_template_have_their_own_promises(tmp_path: Path) -> None:
    few = "resources: k<*, (Activation)1, [48]> threads 256, registers 32, shared 0, occupancy 1"
    promises = promises_of(tmp_path, few, K, "sass: k<bfloat16, *> HMMA.BF16", "sass: k LDG.128, only STG.32")
    assert resources.ceiling_of("k<float, (Activation)1, 8>", promises).registers == 32
    assert resources.ceiling_of("k<float, (Activation)0, 8>", promises).registers == 64
    assert resources.ceiling_of("kernel<float, (Activation)1, 8>", promises) is None
    found = {
        ("k<bfloat16, 1>", "sm_80"): {"HMMA.16816.F32.BF16", "LDG.E.128.CONSTANT", "LDG.E", "STG.E.32"},
        ("k<bfloat16, 2>", "sm_80"): {"HMMA.16816.F32", "LDG.E.64", "STG.E.32", "STG.E.U8"},
        ("k<float, 2>", "sm_80"): {"LDG.E.128", "STGX.E.32"},
    }
    assert wrong_instructions(found, promises) == [
        "k<bfloat16, 2> on sm_80 has no HMMA.BF16, which kernels.cu:3 states",
        "k<bfloat16, 2> on sm_80 has no LDG.128, which kernels.cu:4 states",
        "k<bfloat16, 2> on sm_80 has STG.E.U8, kernels.cu:4 states only STG.32",
        "k<float, 2> on sm_80 has no STG.32, which kernels.cu:4 states",
    ]


# Every thread keeps 64 sums. Blocks of 256 threads, eight to a multiprocessor, have 32 registers per thread.
SUMS = """
// resources: sums_kernel<*> threads 256, registers 128, shared 0, occupancy 0.25
// sass: sums_kernel LDG.128
template <int kBlocks>
__global__ void __launch_bounds__(256, kBlocks) sums_kernel(const float4* from, float* to, int count) {
    float sum[64] = {};
    for (int i = threadIdx.x; i < count; i += 256) {
        const float4 value = from[i];
#pragma unroll
        for (int n = 0; n < 64; ++n) sum[n] = sum[n] * value.x + value.y * value.z - value.w;
    }
    for (int n = 0; n < 64; ++n) to[n * 256 + threadIdx.x] = sum[n];
}
template __global__ void sums_kernel<BLOCKS>(const float4*, float*, int);
"""


@pytest.fixture(scope="module")
def nvcc() -> str:
    return os.environ.get("CUDACXX") or cuda_tool("nvcc")


def compile_sums(nvcc: str, folder: Path, blocks: int) -> Path:
    (folder / "sums.cu").write_text(SUMS)
    flags = ["-gencode=arch=compute_80,code=sm_80", "-Xptxas=-v", f"-DBLOCKS={blocks}"]
    command = [sys.executable, str(SCRIPT), "compile", nvcc, *flags, "-c", "sums.cu", "-o", "sums.o"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "sums.o"


@pytest.mark.parametrize(("blocks", "spills"), [(1, False), (8, True)])
def test_a_kernel_that_spills_is_named(nvcc: str, tmp_path: Path, blocks: int, spills: bool) -> None:
    """The check that the build's kernels pass names the same source when its kernel spills."""
    compiled = compile_sums(nvcc, tmp_path, blocks)
    (described,) = resources.describe([Path(f"{compiled}.ptxas").read_text()], resources.promises(tmp_path))
    assert (described["kernel"], described["arch"]) == (f"sums_kernel<{blocks}>", "sm_80")
    wrong = wrong_resources([described], resources.promises(tmp_path))
    assert [line.split(":")[0] for line in wrong] == [f"sums_kernel<{blocks}> on sm_80 spills"] * spills


def test_an_instruction_that_is_not_there_is_named(nvcc: str, tmp_path: Path) -> None:
    found = disassemble(compile_sums(nvcc, tmp_path, 1), tmp_path)
    assert wrong_instructions(found, resources.promises(tmp_path)) == []
    assert wrong_instructions(found, promises_of(tmp_path, "sass: sums_kernel LDG.128, HMMA")) == [
        "sums_kernel<1> on sm_80 has no HMMA, which kernels.cu:1 states"
    ]


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "expected"),
    [
        ("sm_80", 256, 32, 0, 1.0),
        ("sm_80", 256, 64, 0, 0.5),
        ("sm_80", 256, 65, 0, 0.375),  # registers are given out in units of 256 per warp
        ("sm_90a", 128, 32, 100 * 1024, 0.125),  # two blocks' shared memory fit
        ("sm_80", 128, 32, 100 * 1024, 0.0625),
        ("sm_90a", 32, 16, 0, 0.5),  # 32 blocks at most
        ("sm_12345", 256, 32, 0, 0.0),
    ],
)
def test_occupancy(arch: str, threads: int, registers: int, shared: int, expected: float) -> None:
    assert resources.occupancy(arch, threads, registers, shared) == expected


@pytest.mark.parametrize(
    ("full", "short"),
    [
        (
            "void xlayer::cuda::(anonymous namespace)::k<__nv_bfloat16, (xlayer::Activation)1, 4>(xlayer::Args<float>)",
            "k<bfloat16, (Activation)1, 4>",
        ),
        ("xlayer::cuda::(anonymous namespace)::plain(xlayer::Args, int)", "plain"),
        ("_Z1kv", "_Z1kv"),
    ],
)
def test_names_are_short(full: str, short: str) -> None:
    assert resources.without_parameters(full) == short


def test_report_of_ptxas_is_read() -> None:
    report = """block _Z1kv 256
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1kv' for 'sm_80'
ptxas info    : Function properties for _Z1kv
    24 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 2048 bytes smem, 360 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1hv' for 'sm_90a'
ptxas info    : Function properties for _Z1hv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
"""
    assert resources.kernels_of(report) == [
        ("_Z1kv", "sm_80", 256, 40, 2048, 24, 8, 12),
        ("_Z1hv", "sm_90a", 0, 12, 0, 0, 0, 0),
    ]
