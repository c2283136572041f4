"""benchmarks/gpu_check.sh on a machine without a GPU, and what reads the output of the GPU's tools."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import ncu_table, sanitizer_report
from benchmarks.harness import measure

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.sh"
PARTS = ("build", "test", "sanitize", "bench", "profile")


def gpu_check(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHON": sys.executable} | environment
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=variables, timeout=1200)


@pytest.mark.slow
@pytest.mark.cpu_kernels  # it runs the emulator in processes of its own
def test_dry_run(tmp_path: Path) -> None:
    run = gpu_check("--dry-run", str(tmp_path))
    assert run.returncode == 0, run.stdout + run.stderr
    summary = (tmp_path / "summary.txt").read_text().splitlines()
    assert [line.split()[:2] for line in summary] == [[part, "ok"] for part in PARTS]
    assert {path.name for path in tmp_path.iterdir()} == {
        "summary.txt",
        "emulator.jsonl",
        *(f"{part}.log" for part in PARTS),
    }
    rows = measure.read_rows(tmp_path / "emulator.jsonl")
    native = {(row.op, row.dtype, row.pass_) for row in rows if row.impl == "native"}
    assert {row.device for row in rows} == {"emulator"}
    assert native >= {
        (op, dtype, pass_)
        for op, dtype in (("hdim_attention", "bfloat16"), ("hdim_attention", "float32"), ("masked_mean", "float32"))
        for pass_ in ("fwd", "fwd+bwd")
    }
    assert ("boundary", "float32", "bwd") in native
    assert "every result is finite" in (tmp_path / "sanitize.log").read_text()
    assert " passed" in (tmp_path / "test.log").read_text()


def test_a_part_that_fails_is_told_and_does_not_keep_the_others(tmp_path: Path) -> None:
    run = gpu_check(str(tmp_path), "dry", "test", "profile", XLAYER_EMULATOR_LIBRARY="/nowhere/libxlayer_emulated.so")
    assert run.returncode == 1
    summary = (tmp_path / "summary.txt").read_text().splitlines()
    assert [line.split()[:2] for line in summary] == [["test", "failed"], ["profile", "ok"]]
    assert "/nowhere/libxlayer_emulated.so is missing" in run.stdout


def test_a_part_is_stopped_at_its_limit(tmp_path: Path) -> None:
    run = gpu_check("--dry-run", str(tmp_path), "test", GPU_CHECK_SECONDS="1")
    assert run.returncode == 1
    assert "stopped at its limit" in (tmp_path / "summary.txt").read_text()


@pytest.mark.parametrize("arguments", [(), ("--dry-run",), ("FOLDER", "bulid"), ("--help",)], ids=str)
def test_usage(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    run = gpu_check(*(str(tmp_path) if word == "FOLDER" else word for word in arguments))
    assert run.returncode == 2
    assert "gpu_check.sh [--dry-run] OUT_DIR [PART...]" in run.stderr


# ---- compute-sanitizer -----------------------------------------------------------------------------------------------

OURS = """========= COMPUTE-SANITIZER
masked_mean B=3 S=37 H=65 torch.float64 no mask
========= Invalid __global__ write of size 8 bytes
=========     at void xlayer::cuda::<unnamed>::masked_mean_kernel<double, 1>(xlayer::Args)+0x4d0 in routing.cu:71
=========     by thread (65,0,0) in block (0,0,0)
=========     Address 0x7f42a2000618 is out of bounds
========= ERROR SUMMARY: 1 error
exit code 66
"""
OTHERS = """========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 16 bytes
=========     at cutlass_80_tensorop_s1688gemm_64x64_16x6_nn_align4+0x1f0
=========     by thread (3,0,0) in block (0,0,0)
=========         Host Frame: xlayer::hdim_attention_cuda [0x5f1d0] in libxlayer.so
========= ERROR SUMMARY: 1 error
exit code 66
"""
UNWRITTEN = """========= COMPUTE-SANITIZER
========= Host API uninitialized memory access
=========     Saved host backtrace up to driver entry point
========= ERROR SUMMARY: 1 error
exit code 66
"""
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\nexit code 0\n"
NO_RACE = CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")


@pytest.mark.parametrize(
    ("tool", "text", "fine", "said"),
    [
        ("memcheck", CLEAN, True, "memcheck: ERROR SUMMARY: 0 errors"),
        ("racecheck", NO_RACE, True, "racecheck: RACECHECK SUMMARY: 0 hazards displayed"),
        ("memcheck", OURS, False, "Invalid __global__ write of size 8 bytes"),
        ("initcheck", OTHERS, True, "other libraries' kernels"),
        ("memcheck", OTHERS, False, "cutlass"),
        (
            "initcheck",
            OTHERS.replace("========= ERROR", UNWRITTEN + "========= ERROR"),
            False,
            "Host API uninitialized",
        ),
        (
            "initcheck",
            OTHERS.replace("exit code 66", "exit code 1"),
            False,
            "exit code 1",
        ),  # the cases themselves failed
        ("synccheck", "Segmentation fault\nexit code 139\n", False, "did not run to its end, exit code 139"),
    ],
)
def test_findings_of_the_sanitizer(tool: str, text: str, fine: bool, said: str) -> None:
    printed, verdict = sanitizer_report.report(tool, text)
    assert verdict == fine
    assert said in printed


# ---- Nsight Compute --------------------------------------------------------------------------------------------------

NCU = """==PROF== Profiling "score" - 0: 0%....50%....100% - 9 passes
"ID","Kernel Name","dram__throughput.avg.pct_of_peak_sustained_elapsed","gpu__time_duration.sum",\
"launch__registers_per_thread","sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active",\
"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio"
"","","%","ns","register/thread","%","inst","inst"
"0","void xlayer::cuda::<unnamed>::score<__half, (int)3>(xlayer::Args)","12.5","1,234,000","128","61.25","0.5","1.75"
""".replace("\\\n", "")


def test_table_of_a_profile() -> None:
    metrics, stalls = ncu_table.table(NCU.splitlines(keepends=True))
    assert metrics.startswith("score: time 1234 us, tensor pipe 61.25 %, FMA pipe -, ALU pipe -, DRAM 12.5 %")
    assert "registers 128" in metrics
    assert stalls.endswith("long_scoreboard 1.75, barrier 0.50")
    assert ncu_table.table(["==PROF== nothing\n"]) == []


# ---- the GPU's tools, with stand-ins that say what they would --------------------------------------------------------


def stand_in(folder: Path, name: str, said: str, code: int = 0) -> None:
    """Writes a program that appends its arguments to the file NAME.arguments, prints ``said`` and exits with a code."""
    program = folder / name
    program.write_text(f"#!/bin/sh\necho \"$@\" >>'{program}.arguments'\ncat <<'SAID'\n{said}SAID\nexit {code}\n")
    program.chmod(0o755)


def test_tools_are_called_and_judged(tmp_path: Path) -> None:
    stand_in(tmp_path, "compute-sanitizer", CLEAN.replace("exit code 0\n", ""))
    stand_in(tmp_path, "ncu", NCU)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    run = gpu_check(str(tmp_path / "out"), "sanitize", "profile", PATH=path)
    assert run.returncode == 0, run.stdout + run.stderr
    calls = (tmp_path / "compute-sanitizer.arguments").read_text().splitlines()
    assert sorted(call.split()[1] for call in calls) == ["initcheck", "memcheck", "racecheck", "synccheck"]
    for call in calls:
        assert call.endswith("-m benchmarks.gpu.cases --device cuda")
        assert ("--kernel-name kns=xlayer" in call) == ("initcheck" not in call)  # it must see who else writes
    assert "--clock-control none" in (tmp_path / "ncu.arguments").read_text()
    assert "score: time 1234 us" in run.stdout


def test_what_a_tool_finds_fails_its_part(tmp_path: Path) -> None:
    stand_in(tmp_path, "compute-sanitizer", OURS.replace("exit code 66\n", ""), code=66)
    run = gpu_check(str(tmp_path / "out"), "sanitize", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert run.returncode == 1
    assert "sanitize failed" in (tmp_path / "out" / "summary.txt").read_text()
    log = (tmp_path / "out" / "sanitize.log").read_text()
    assert log.count("Invalid __global__ write of size 8 bytes") == 4  # one for each of the tools
