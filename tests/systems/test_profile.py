"""`xlayer profile`: regions that cost nothing unless a profiler listens, its trace and numbers, and Nsight's tables."""

from __future__ import annotations

import importlib.machinery
import io
import json
import os
import re
import shutil
import subprocess
import sys
import types
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest
import torch
from torch import nn

from training_tools import contents, run_xlayer, save_backbone, save_rte
from xlayer_systems.errors import UserError
from xlayer_systems.profiling import nsight
from xlayer_systems.profiling.command import choose_tools
from xlayer_systems.profiling.nsight_tables import kernel_name, read_ncu, read_nsys
from xlayer_systems.profiling.summary import (
    Row,
    covered,
    format_summary,
    from_trace,
    input_bytes,
    over_layers,
    with_own_time,
)
from xlayer_systems.training import regions

ROOT = Path(__file__).resolve().parents[2]
FEW = ["--steps", "2", "--warmup", "1"]

# What `nsys stats --format=csv --output=-` prints.
NSYS_KERNELS = """Processing [runs/p/nsys.sqlite] with [reports/cuda_gpu_kern_sum.py]...
Time (%),Total Time (ns),Instances,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),Name
50.0,3000000,6,500000.0,500000.0,480000,520000,12000.5,"void xlayer::cuda::<unnamed>::score<__nv_bfloat16>(Args)"
33.3,2000000,4,500000.0,500000.0,480000,520000,12000.5,"void at::native::vectorized_elementwise_kernel<(int)4, F>(int)"
16.7,1000000,2,500000.0,500000.0,480000,520000,12000.5,"void xlayer::cuda::<unnamed>::score<float>(Args)"

"""
NSYS_RANGES = """NOTICE: Existing SQLite export found: runs/p/nsys.sqlite
Time (%),Total Time (ns),Instances,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),Style,Range
40.0,10000000,1,10000000.0,10000000.0,10000000,10000000,0.0,PushPop,xlayer:profiled
32.0,8000000,2,4000000.0,4000000.0,3900000,4100000,100000.0,PushPop,xlayer:step
12.0,3000000,2,1500000.0,1500000.0,1400000,1600000,100000.0,PushPop,xlayer:forward
8.0,2000000,4,500000.0,500000.0,400000,600000,100000.0,PushPop,xlayer:module/encoder.layers.0
8.0,2000000,4,500000.0,500000.0,400000,600000,100000.0,PushPop,NCCL:ncclAllReduce
"""
# What `ncu --import ... --page=raw --csv --print-units=base` prints.
NCU = """==PROF== Connected to process 4242
"ID","Process ID","Kernel Name","gpu__time_duration.sum","dram__bytes.sum.per_second",\
"sm__warps_active.avg.pct_of_peak_sustained_active"
"","","","nsecond","byte/second","%"
"0","4242","void xlayer::cuda::(anonymous namespace)::score<bfloat16>(Args)","1,000","2,000,000,000,000","50.0"
"1","4242","void xlayer::cuda::(anonymous namespace)::score<bfloat16>(Args)","3,000","1,000,000,000,000","30.0"
"2","4242","void at::native::vectorized_elementwise_kernel<4, F>(int)","2,000","n/a","80.0"
"""


# --- Regions ----------------------------------------------------------------------------------------------------------


@contextmanager
def recorded(log: list[str], name: str):
    log.append(f"+{name}")
    try:
        yield
    finally:
        log.append(f"-{name}")


def test_a_region_that_nobody_listens_to_is_one_test_of_a_name():
    calls = []

    def watch(frame, event, _):
        if event in ("call", "c_call"):
            calls.append(frame.f_code.co_name)

    sys.setprofile(watch)
    try:
        made = regions.region("forward")
    finally:
        sys.setprofile(None)
    assert calls[:-1] == ["region"]  # the last is setprofile itself
    assert made is regions.region("backward")  # nothing was made


def test_regions_are_opened_by_who_listens_and_only_as_long():
    log: list[str] = []
    with regions.listening(lambda name: recorded(log, name)), regions.region("forward"):
        log.append("work")
    with regions.region("backward"):
        pass
    assert log == ["+forward", "work", "-forward"]


class Broken(nn.Module):
    def forward(self, x):
        raise ArithmeticError


def test_modules_are_regions_while_they_are_watched_and_carry_nothing_afterwards():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU()), Broken())
    log: list[str] = []
    with regions.listening(lambda name: recorded(log, name)), regions.module_regions(model, "net."):
        model[1](model[0](torch.ones(1, 2)))
        with pytest.raises(ArithmeticError):
            model(torch.ones(1, 2))
    first = ["+module/net.0", "-module/net.0", "+module/net.1", "+module/net.1.0", "-module/net.1.0", "-module/net.1"]
    assert log == [*first, *first, "+module/net.2", "-module/net.2"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- Numbers ----------------------------------------------------------------------------------------------------------


def event(category: str, name: str, start: float, length: float, thread: int = 1, **arguments) -> dict:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length, "pid": 1, "tid": thread,
            "args": arguments}  # fmt: skip


def region(name: str, start: float, length: float) -> dict:
    return event("user_annotation", f"xlayer/{name}", start, length)


REGIONS = [region("profiled", 1000, 1000), region("step", 1000, 400), region("step", 1400, 400),
           region("forward", 1000, 100), region("forward", 1400, 300), region("module/layers.0.mlp", 1010, 50),
           region("module/layers.1.mlp", 1060, 30)]  # fmt: skip
FLOATS = {"Input Dims": [[100, 5], [], [5]], "Input type": ["float", "Scalar", "double"]}


def test_numbers_of_operators_of_a_trace_by_hand():
    work = [
        event("cpu_op", "aten::before", 900, 50),
        event("cpu_op", "aten::linear", 1000, 200),
        event("cpu_op", "aten::mm", 1050, 100, **FLOATS),
        event("cpu_op", "aten::mm", 1300, 100, **FLOATS),
        event("cpu_op", "aten::mul", 1350, 100, thread=2),  # at the same time, in another thread
        event("cpu_op", "aten::mul", 1950, 100),  # half of it after the window
    ]
    summary = from_trace({"traceEvents": [{"ph": "M", "name": "process_name"}, *REGIONS, *work]})
    assert (summary.device, summary.seconds) == ("cpu", pytest.approx(1e-3))
    assert summary.busy == pytest.approx((200 + 150 + 50) / 1000)
    assert [(row.name, row.calls, round(row.seconds * 1e6)) for row in summary.phases] == [
        ("step", 2, 800), ("forward", 2, 400),
    ]  # fmt: skip
    assert [(row.name, row.calls, round(row.seconds * 1e6)) for row in summary.kernels] == [
        ("aten::mm", 2, 200), ("aten::mul", 2, 200), ("aten::linear", 1, 100),
    ]  # fmt: skip
    bandwidths = [row.bandwidth for row in summary.kernels]
    assert bandwidths == [pytest.approx(2 * (500 * 4 + 5 * 8) / 200e-6), None, None]
    assert [row.name for row in summary.modules] == ["layers.0.mlp", "layers.1.mlp"]
    text = "\n".join(format_summary(summary))
    assert "1.0 ms, 40.0 % of them with operators on the CPU" in text
    assert re.search(r"^step +2 +0\.400 +80\.0 %$", text, re.M)
    assert re.search(r"^aten::mm +2 +0\.200 +20\.0 % +0\.02$", text, re.M)
    assert re.search(r"^layers\.\*\.mlp +2 +0\.040 +8\.0 %$", text, re.M)


def test_numbers_of_kernels_of_a_trace_by_hand():
    work = [
        event("cpu_op", "aten::mm", 1000, 900),
        event("kernel", "void xlayer::cuda::score<float>(Args)", 1100, 100, **{"est. achieved occupancy %": 50}),
        event("kernel", "void xlayer::cuda::score<float>(Args)", 1200, 300, **{"est. achieved occupancy %": 30}),
        event("gpu_memcpy", "Memcpy HtoD", 1450, 100, bytes=4_000_000),
    ]
    summary = from_trace({"traceEvents": [*REGIONS, *work]})
    assert summary.device == "cuda" and summary.busy == pytest.approx(450 / 1000)
    score, copy = summary.kernels
    assert (score.name, score.calls, score.bandwidth) == ("score", 2, None)
    assert score.seconds == pytest.approx(400e-6) and score.occupancy == pytest.approx(0.35)
    assert copy.bandwidth == pytest.approx(4e6 / 100e-6) and copy.occupancy is None
    assert re.search(r"^score +2 +0\.400 +40\.0 % +- +35\.0 %$", "\n".join(format_summary(summary)), re.M)


def test_unions_own_times_and_bytes():
    assert covered([]) == 0 and covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    nested = [event("cpu_op", "a", 0, 10), event("cpu_op", "b", 0, 4), event("cpu_op", "c", 4, 6),
              event("cpu_op", "d", 5, 1), event("cpu_op", "e", 10, 3)]  # fmt: skip
    assert {e["name"]: own for e, own in with_own_time(nested)} == {"a": 0, "b": 4, "c": 5, "d": 1, "e": 3}
    assert input_bytes(event("cpu_op", "a", 0, 1)) == 0
    shapes = {"Input Dims": [[2, 3], [[2], [3]], [7]], "Input type": ["c10::BFloat16", "TensorList", "long int"]}
    assert input_bytes(event("cpu_op", "a", 0, 1, **shapes)) == 2 * 6 + 7 * 8


def test_layers_are_joined_by_their_numbers_alone():
    rows = [Row("layers.0.q8", 1, 1.0), Row("layers.11.q8", 2, 3.0), Row("head2", 1, 5.0)]
    assert over_layers(rows) == [Row("head2", 1, 5.0), Row("layers.*.q8", 3, 4.0)]


# --- A profile on the CPU ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Returns options for a tiny backbone and data set and the fewest steps."""
    folder = tmp_path_factory.mktemp("places")
    return ["--dataset", save_rte(folder / "rte"), "--backbone", save_backbone(folder / "backbone"), "--quick", *FEW]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory, options):
    """Profiles a run; returns its directory and the printed text."""
    run = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        assert run_xlayer(patch, "profile", "xlrb", "--preset", "H9", *options, "--run-dir", run) == 0
    return run, printed.getvalue()


def test_the_trace_keeps_to_the_format_of_trace_events(profiled):
    trace = json.loads((profiled[0] / "trace.json").read_text())
    assert isinstance(trace["traceEvents"], list)
    phases = {"X", "i", "I", "M", "C", "s", "t", "f", "B", "E"}
    for found in trace["traceEvents"]:
        assert found["ph"] in phases and isinstance(found["name"], str), found
        assert isinstance(found["pid"], int | str), found
        if found["ph"] != "M":
            assert isinstance(found["ts"], int | float) and found["ts"] >= 0, found
        if found["ph"] == "X":
            assert found["dur"] >= 0 and isinstance(found["tid"], int | str) and found.get("cat"), found
            assert isinstance(found.get("args", {}), dict), found


def test_the_trace_has_the_phases_the_modules_and_the_operators(profiled):
    events = json.loads((profiled[0] / "trace.json").read_text())["traceEvents"]
    complete = [found for found in events if found["ph"] == "X"]
    marks = [found for found in complete if found["name"].startswith("xlayer/")]
    count = {name: sum(found["name"] == f"xlayer/{name}" for found in marks) for name in regions.PHASES}
    assert count == {"step": 2, "data": 2, "forward": 2, "backward": 2, "optimizer": 2, "eval": 1}
    names = {found["name"] for found in complete}
    assert {"xlayer/module/encoder.embeddings", "xlayer/module/encoder.encoder.layer.3.attention"} <= names
    assert {"aten::addmm", "aten::copy_"} <= names
    # Every region of a step lies in one, and all of them in the window.
    spans = {name: [(e["ts"], e["ts"] + e["dur"]) for e in marks if e["name"] == f"xlayer/{name}"] for name in
             ("profiled", *regions.PHASES)}  # fmt: skip
    for name, outer in (("forward", "step"), ("backward", "step"), ("step", "profiled"), ("eval", "profiled")):
        for start, end in spans[name]:
            assert any(first <= start and end <= last for first, last in spans[outer]), name


@pytest.mark.skipif(not hasattr(torch.ops.xlayer, "hdim_attention"), reason="needs the native library")
def test_operators_of_the_library_are_in_the_trace(profiled):
    assert '"xlayer::hdim_attention"' in (profiled[0] / "trace.json").read_text()


def test_the_summary_is_printed_reported_and_kept(profiled):
    run, printed = profiled
    report = (run / "report.md").read_text()
    table = printed[: printed.index("run directory:")].rstrip()
    assert printed.startswith("xlrb H9 on ") and "2 steps and an evaluation of 1 batch" in printed
    assert table in report and "ui.perfetto.dev" in report
    for name in regions.PHASES:
        assert re.search(rf"^{name} +\d+ +[\d.]+ +[\d.]+ %$", printed, re.M), name
    kept = json.loads((run / "summary.json").read_text())
    assert (kept["steps"], kept["warmup"], kept["device"]) == (2, 1, "cpu") and 0 < kept["busy"] <= 1
    steps = next(row for row in kept["phases"] if row["name"] == "step")
    assert steps["calls"] == 2 and 0 < steps["seconds"] <= kept["seconds"]
    assert not list((run / "checkpoints").iterdir()) and (run / "config.json").exists()


BAD = [
    (["--steps", "0"], "steps must be at least 1, got 0"),
    (["--warmup", "0"], "warmup must be at least 1, got 0"),
    (["--tool", "vtune"], "unknown tool 'vtune'; expected one of auto, torch, nsys, ncu"),
    (["--set", "colour=red"], "unknown setting 'colour'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, options, monkeypatch, capsys, arguments, message):
    run = tmp_path / "run"
    assert run_xlayer(monkeypatch, "profile", "xlrb", *options, *arguments, "--run-dir", run) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err
    assert not run.exists()


def test_an_existing_directory_is_refused(profiled, options, monkeypatch, capsys):
    before = contents(profiled[0])
    assert run_xlayer(monkeypatch, "profile", "xlrb", *options, "--run-dir", profiled[0]) == 2
    assert "exists; choose another --run-dir" in capsys.readouterr().err
    assert contents(profiled[0]) == before


# --- Nsight -----------------------------------------------------------------------------------------------------------


def test_tables_of_nsight_are_found_in_what_the_tools_print():
    assert [row["Instances"] for row in read_nsys(NSYS_KERNELS.splitlines())] == ["6", "4", "2"]
    assert read_nsys(["SKIPPED: nsys.sqlite does not contain CUDA kernel data."]) == []
    launches = read_ncu(NCU.splitlines())
    assert [launch.kernel for launch in launches] == ["score", "score", "vectorized_elementwise_kernel"]
    assert launches[0].metrics["dram__bytes.sum.per_second"] == 2e12
    assert launches[2].largest(nsight.BANDWIDTH) is None and launches[2].largest(nsight.OCCUPANCY) == 80
    assert read_ncu(["==PROF== nothing"]) == []
    assert kernel_name("ampere_sgemm_128x64_tn") == "ampere_sgemm_128x64_tn"


def test_numbers_of_nsight_by_hand():
    summary = nsight.from_nsys(NSYS_KERNELS.splitlines(), NSYS_RANGES.splitlines())
    assert summary.seconds == pytest.approx(10e-3) and summary.busy == pytest.approx(0.6)
    assert [(row.name, row.calls) for row in summary.phases] == [("step", 2), ("forward", 2)]
    assert summary.modules == [Row("encoder.layers.0", 4, pytest.approx(2e-3))]
    assert summary.kernels[0] == Row("score", 8, pytest.approx(4e-3))
    score, elementwise = nsight.with_ncu(summary, read_ncu(NCU.splitlines())).kernels
    assert score.calls == 8 and score.bandwidth == pytest.approx(1.25e12) and score.occupancy == pytest.approx(0.35)
    assert elementwise.bandwidth is None and elementwise.occupancy == pytest.approx(0.8)
    alone = nsight.from_ncu(read_ncu(NCU.splitlines()))
    assert alone.seconds == pytest.approx(6e-6) and alone.kernels[0].seconds == pytest.approx(4e-6)
    with pytest.raises(UserError, match="no NVTX ranges"):
        nsight.from_nsys(NSYS_KERNELS.splitlines(), [])


@pytest.fixture
def fake_gpu(tmp_path, monkeypatch):
    """Fakes a machine with a GPU, nvtx, nsys and ncu; the tools print the tables above."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    module = types.ModuleType("nvtx")
    module.__spec__ = importlib.machinery.ModuleSpec("nvtx", None)
    monkeypatch.setitem(sys.modules, "nvtx", module)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "kernels").write_text(NSYS_KERNELS)
    (tools / "ranges").write_text(NSYS_RANGES)
    (tools / "ncu.csv").write_text(NCU)
    scripts = {
        "nsys": 'case "$*" in *cuda_gpu_kern_sum*) cat "$0/../kernels";; *nvtx_sum*) cat "$0/../ranges";; esac',
        "ncu": 'case "$*" in *--import*) cat "$0/../ncu.csv";; esac',
    }
    for name, script in scripts.items():
        text = f"#!/bin/sh\n{script}\n".replace("$0/..", str(tools))
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    return tools


def test_where_there_is_nsight_auto_uses_all_of_it(fake_gpu, tmp_path, options, monkeypatch, capsys):
    run = tmp_path / "run"
    assert run_xlayer(monkeypatch, "profile", "xlrb", *options, "--run-dir", run) == 0
    printed, report = capsys.readouterr().out, (run / "report.md").read_text()
    assert "60.0 % of them with kernels and copies on the GPU (Nsight Systems and Nsight Compute)" in printed
    assert re.search(r"^score +8 +4\.000 +40\.0 % +1250\.00 +35\.0 %$", printed, re.M)
    started = [line for line in report.splitlines() if line.startswith(("nsys ", "ncu "))]
    watched = re.escape(f"{sys.executable} -m xlayer_systems.profiling.nsight {run}")
    assert re.fullmatch(
        rf"nsys profile --trace=cuda,nvtx .*--capture-range=cudaProfilerApi .*--output={run}/nsys {watched} 2 1",
        started[0],
    )
    assert [line.split(" --report=")[1] for line in started[1:3]] == [
        f"{name} {run}/nsys.nsys-rep" for name in ("cuda_gpu_kern_sum", "nvtx_sum")
    ]
    assert re.fullmatch(rf"ncu --profile-from-start=off .*--export={run}/ncu {watched} 1 1", started[3])
    assert f"--import={run}/ncu.ncu-rep --page=raw --csv --print-units=base" in started[4]
    assert "Time (%)" in (run / "nsys.log").read_text()


def test_the_tools_of_a_machine(fake_gpu, monkeypatch):
    assert choose_tools("auto") == ["nsys", "ncu"] and choose_tools("ncu") == ["ncu"]
    (fake_gpu / "ncu").unlink()
    if not shutil.which("ncu"):
        assert choose_tools("auto") == ["nsys"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_tools("auto") == ["torch"]
    with pytest.raises(UserError, match="nsys cannot be used here: PyTorch sees no CUDA device"):
        choose_tools("nsys")


def test_a_tool_that_fails_ends_in_one_line(fake_gpu, tmp_path, options, monkeypatch, capsys):
    (fake_gpu / "nsys").write_text("#!/bin/sh\necho going; echo no permission to profile >&2; exit 3\n")
    run = tmp_path / "run"
    assert run_xlayer(monkeypatch, "profile", "xlrb", *options, "--tool", "nsys", "--run-dir", run) == 2
    expected = f"error: nsys ended with exit code 3: no permission to profile (all of it: {run}/nsys.log)\n"
    assert capsys.readouterr().err == expected


def test_the_watched_process_counts_its_steps_and_names_them_to_nvtx(profiled, monkeypatch):
    log: list[str] = []
    module = types.ModuleType("nvtx")
    module.annotate = lambda name, domain: recorded(log, f"{domain}:{name}")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvtx", module)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: log.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: log.append("stop"))
    nsight.main([str(profiled[0]), "2", "1"])
    assert log[:4] == ["synchronize", "start", "+xlayer:profiled", "+xlayer:step"]
    assert log[-3:] == ["-xlayer:eval", "-xlayer:profiled", "stop"]
    assert log.count("+xlayer:step") == log.count("+xlayer:optimizer") == 2
    assert any(line.startswith("+xlayer:module/encoder.encoder.layer.0") for line in log)


# --- NVTX -------------------------------------------------------------------------------------------------------------

PROGRAM = """
#include "xlayer/profiler.h"
struct Scope {
    explicit Scope(const char* name = __builtin_FUNCTION()) : range(name) {}
    xlayer::ProfilerRange range;
};
void masked_mean_cuda() {
    const Scope scope;
    const xlayer::ProfilerRange launch("masked_mean_forward");
}
int main() { masked_mean_cuda(); }
"""
HEADERS = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
needs_headers = pytest.mark.skipif(
    not (HEADERS / "nvtx3" / "nvtx3.hpp").exists() or not shutil.which("g++"), reason="needs g++ and NVTX's headers"
)


@pytest.fixture(scope="module")
def listener(tmp_path_factory) -> Path:
    """Builds a library that NVTX loads in the place of a profiler."""
    library = tmp_path_factory.mktemp("nvtx") / "listener.so"
    source = ROOT / "tests" / "support" / "nvtx_listener.c"
    subprocess.run(["gcc", "-shared", "-fPIC", f"-I{HEADERS}", source, "-o", library], check=True)
    return library


@needs_headers
@pytest.mark.parametrize(("flags", "heard"), [(["-DXLAYER_NVTX"], True), ([], False)])
def test_ranges_of_the_kernels_are_in_the_domain_and_only_in_builds_that_want_them(tmp_path, listener, flags, heard):
    (tmp_path / "program.cpp").write_text(PROGRAM)
    places = [f"-I{ROOT / 'csrc' / 'include'}", f"-I{HEADERS}"]
    command = ["g++", "-std=c++17", *flags, *places, tmp_path / "program.cpp", "-o", tmp_path / "program", "-ldl"]
    subprocess.run(command, check=True)
    program = str(tmp_path / "program")
    done = subprocess.run([program], env={"NVTX_INJECTION64_PATH": str(listener)}, capture_output=True, text=True)
    expected = ["push xlayer:masked_mean_cuda", "push xlayer:masked_mean_forward", "pop xlayer", "pop xlayer"]
    assert done.returncode == 0 and done.stderr.splitlines() == (expected if heard else [])
    assert subprocess.run([program], env={}, capture_output=True).stderr == b""


@needs_headers
def test_regions_reach_nvtx(listener):
    pytest.importorskip("nvtx", reason="needs the package nvtx")
    code = "from xlayer_systems.training.regions import listening, nvtx_region, region\n"
    code += "with listening(nvtx_region), region('forward'): pass"
    paths = ":".join(path for path in sys.path if path)
    environment = {"PYTHONPATH": paths, "NVTX_INJECTION64_PATH": str(listener)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.splitlines() == ["push xlayer:forward", "pop xlayer"]
