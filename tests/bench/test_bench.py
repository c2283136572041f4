"""The benchmark harness: what it measures is checked against amounts of time, memory and error that are known."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from benchmarks.cases import hdim as hdim_cases
from benchmarks.cases import routing as routing_cases
from benchmarks.harness import cases as harness_cases
from benchmarks.harness import measure, roof
from xlayer_ext.memory import keep_freed_memory
from xlayer_ext.testing import check_oracle, relative_error

LIMITS = measure.Limits(byte_rate=100.0, flop_rate=1000.0)
needs_roof = pytest.mark.skipif(not roof.isas(), reason="no _native")


def make_row(**changes):
    values = {
        "family": "hdim",
        "op": "hdim_attention",
        "case": "S128",
        "pass_": "fwd",
        "dtype": "float32",
        "device": "cpu",
        "impl": "native",
        "ms_median": 2.0,
        "ms_min": 1.5,
        "bytes": 10,
        "flops": 20,
        "peak_bytes": None,
        "fraction_of_limit": 0.5,
    }
    return measure.Row(**(values | changes))


# ---- limits --------------------------------------------------------------------------------------------------------


@needs_roof
def test_limits_come_from_the_rounds_of_a_comparison():
    probe = measure.LimitProbe("cpu", torch.float64, seconds=0.02, buffer_bytes=32 << 20, gemm_sizes=(64, 128))
    works = probe.works(1 << 40)
    times = measure.compare(works | {"other": lambda: time.sleep(0.001)}, seconds=0.1)
    limits = probe.limits(times)
    assert limits.facts["torch_copy_rate"] == pytest.approx((32 << 20) / times["limit: copy"].minimum)
    assert limits.facts["torch_gemm_rate"] > 1e6
    assert limits.flop_rate == works["limit: multiply-add"].rate == limits.facts["fma_rate"] > 1e8
    assert limits.byte_rate == max(works["limit: bytes"].rates.values()) == limits.facts["byte_rate"] > 1e7
    assert limits.facts["machine"]["threads"] == torch.get_num_threads()
    probe.works(1 << 20)
    assert probe._multiply_adds.rate == 0  # a case's limits are those of its own rounds


@needs_roof
def test_16_bits_have_the_limit_of_matrix_units_that_torch_shows():
    probe = measure.LimitProbe("cpu", torch.bfloat16, seconds=0.01, gemm_sizes=(32, 64))
    works = probe.works(1 << 16)
    probe._multiply_adds.rate, probe._multiply_adds.clock = 1e9, 1e9
    probe._moves.rates["read"] = 1e9
    times = dict.fromkeys(works, measure.Timing([1.0]))
    probe.best_gemm_rate = 5e9
    assert probe.limits(times).flop_rate == 5e9
    probe.best_gemm_rate = 5e8
    assert probe.limits(times).flop_rate == 1e9


def test_without_the_extension_a_cpu_has_no_limits(monkeypatch):
    monkeypatch.setattr(roof, "isas", list)
    with pytest.raises(measure.Unavailable, match="limits need"):
        measure.LimitProbe("cpu", torch.float32, seconds=0.01, gemm_sizes=(32, 64))


def test_fraction_is_the_slower_of_bytes_and_flops_over_time():
    assert LIMITS.fraction(50, 100, seconds=1.0) == pytest.approx(0.5)  # 0.5 s of bytes, 0.1 s of flops
    assert LIMITS.fraction(50, 800, seconds=1.0) == pytest.approx(0.8)
    assert LIMITS.fraction(50, 0, seconds=2.0) == pytest.approx(0.25)


def test_the_slowest_of_three_bounds():
    limits = measure.Limits(byte_rate=100.0, flop_rate=1000.0, alu_rate=10.0)
    assert limits.fraction(50, 100, seconds=1.0, alu=8) == pytest.approx(0.8)
    assert limits.bound(50, 100, alu=8) == "alu"
    assert limits.bound(50, 100, alu=4) == "bytes"
    assert limits.bound(50, 900, alu=4) == "flops"
    assert LIMITS.bound(50, 100, alu=10**9) == "bytes"  # where the rate is unknown, it never bounds


@needs_roof
def test_float32_rate_of_a_gpu_without_a_run_time_compiler(monkeypatch, capsys):
    class Answer:
        stdout = "1980\n1980\n"

    def lacking(device):
        raise RuntimeError("no NVRTC")

    probe = measure.LimitProbe("cpu", torch.float32, seconds=0.01, gemm_sizes=(32, 64))
    assert probe.alu_source is None and "limit: alu" not in probe.works(1)  # CPUs have no such limit
    monkeypatch.setattr(measure, "multiply_add_chains", lacking)
    monkeypatch.setattr(measure.subprocess, "run", lambda *arguments, **options: Answer)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    probe._probe_alu("cuda")
    probe._device = "cuda"
    times = dict.fromkeys(probe.works(1), measure.Timing([1.0]))
    assert probe.alu_source == "nominal"
    assert probe.limits(times).alu_rate == 132 * 128 * 1980e6
    assert "no NVRTC" in capsys.readouterr().err


class Properties:
    multi_processor_count = 132


def test_the_chain_is_read_as_one_function():
    """torch's jiterator parses the chained multiply-adds, as it must before it compiles them for a GPU."""
    assert torch.cuda.jiterator._create_jit_fn(measure._CHAIN, a=0.5, b=1.0).kernel_name == "chain"


def build_nothing(impl):
    return lambda: None


@needs_roof
def test_a_row_beyond_the_limit_is_an_error(capsys):
    """A work that claims to move a terabyte in no time is refused."""
    arguments = ("hdim", "sum", "toy", "fwd", "float32", 10**12, 0, build_nothing, {})
    case = harness_cases.Case(*arguments, suite="toy")
    assert harness_cases.main("", lambda options: [case], ["--quick", "--no-memory", "--impl", "native"]) == 1
    out, err = capsys.readouterr()
    assert "BEYOND THE LIMIT" in out
    assert "error: sum toy fwd float32 native: " in err and "nothing can exceed" in err
    assert [row.case for row in harness_cases.beyond([make_row(extra={"beyond_limit": True}), make_row()])] == ["S128"]


# ---- timing --------------------------------------------------------------------------------------------------------


def test_compare_orders_known_times():
    timings = measure.compare({"slow": lambda: time.sleep(0.02), "fast": lambda: time.sleep(0.002)}, seconds=0.3)
    assert 0.02 <= timings["slow"].minimum <= timings["slow"].median
    assert 0.002 <= timings["fast"].median < timings["slow"].minimum
    assert len(timings["fast"].samples) > len(timings["slow"].samples) >= 5  # a short call is repeated in its turn


def test_compare_interleaves_in_changing_order():
    calls: list[str] = []
    works = {name: partial(calls.append, name) for name in "abc"}
    measure.compare(works, seconds=0.0, min_rounds=20, turn_seconds=0.0)
    warm_up, timed = calls[:9], calls[9:]
    rounds = ["".join(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert warm_up == list("aaabbbccc")
    assert len(rounds) == 20
    assert all(sorted(one) == list("abc") for one in rounds)
    assert len(set(rounds)) > 1


def test_a_gpu_waits_until_the_host_has_launched_the_next_call(monkeypatch):
    """Launches must not be timed: ahead of its start the device sleeps for as long as the last call took to launch."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 3.0

    def work():
        log.append("work")
        time.sleep(0.002)

    def sleep(cycles):
        assert 0.002 * measure._SLEEP_CYCLES <= cycles <= 0.02 * measure._SLEEP_CYCLES
        log.append("sleep")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    scratch = torch.zeros(8, dtype=torch.int8)
    assert measure._cuda_turn(work, 2, scratch) == [pytest.approx(3e-3)] * 2
    assert log == ["event", "work", "event", "sleep", "event", "work", "event", "synchronize"]
    assert scratch.all()  # what empties the cache has run


@pytest.mark.cuda
def test_times_of_a_gpu():
    """Three times the bytes take three times as long, and the limits are those of a GPU."""
    sizes = {"small": 1 << 28, "large": 3 << 28}
    works = {name: torch.zeros(size, dtype=torch.int8, device="cuda").zero_ for name, size in sizes.items()}
    probe = measure.LimitProbe("cuda", torch.bfloat16, seconds=0.1)
    times = measure.compare(works | probe.works(1), device="cuda", seconds=0.5)
    assert times["large"].median == pytest.approx(3 * times["small"].median, rel=0.3)
    limits = probe.limits(times)
    assert probe.alu_source == "probe"
    assert limits.flop_rate > limits.alu_rate > limits.byte_rate > 1e10
    nominal = measure.nominal_alu_rate("cuda")
    assert nominal is None or 0.3 < limits.alu_rate / nominal < 1.2


def test_spread_is_relative_to_the_median():
    assert measure.Timing([1.0] * 9).spread == 0
    assert measure.Timing([8.0, 9.0, 10.0, 11.0, 12.0]).spread == pytest.approx(0.3)


# ---- kept memory ---------------------------------------------------------------------------------------------------

KEPT = """
import resource, sys, threading, torch
from xlayer_ext.memory import keep_freed_memory

def faults(elements, calls=20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        torch.empty(elements).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def both():
    print(faults(8 << 20), faults(20 << 20))  # 32 MB, and 80 MB: more than a heap of a thread's own can hold

torch.set_num_threads(1)
keep = keep_freed_memory() if sys.argv[1] == "keep" else None
both()
thread = threading.Thread(target=both)
thread.start()
thread.join()
print(keep)
"""


def page_faults(mode):
    command = [sys.executable, "-c", KEPT, mode]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    *counts, kept = output.split()
    return [int(count) for count in counts], kept


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_kept_memory_is_not_faulted_in_again():
    """Freed memory is reused in the main thread and in another; a few blocks may be new where small ones split a free
    one."""
    fresh, _ = page_faults("no")
    kept, answer = page_faults("keep")
    assert answer == "True"
    if min(fresh) < 15 * (32 << 20) / os.sysconf("SC_PAGE_SIZE"):
        pytest.skip("this system does not give freed memory back, or has huge pages")
    assert all(few < 0.7 * many for few, many in zip(kept, fresh, strict=True))


def test_memory_is_kept_where_it_can_be(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()  # another C library


# ---- peak memory ---------------------------------------------------------------------------------------------------


def build_allocation(temporary_mib, result_mib, repeats):
    """Makes temporaries one after the other, then a result; a 32 MiB input exists all the time."""
    source = torch.ones(32 << 18)

    def work():
        for _ in range(repeats):
            total = torch.ones(temporary_mib << 18).sum()
        return torch.full((result_mib << 18,), float(total + source[0]))

    return work


def build_failure(message):
    raise ValueError(message)


linux = pytest.mark.skipif(sys.platform != "linux", reason="the resident high-water mark is read from /proc")


@linux
def test_peak_memory_counts_what_exists_at_once_beyond_inputs_and_results():
    arguments = {"temporary_mib": 64, "result_mib": 8, "repeats": 3}
    peak = measure.peak_memory(build_allocation, arguments)
    assert peak == pytest.approx((64 - 8) << 20, rel=0.1)  # the result does not exist yet while the temporaries do


@linux
def test_peak_memory_of_a_work_without_temporaries_is_near_zero():
    peak = measure.peak_memory(build_allocation, {"temporary_mib": 0, "result_mib": 64, "repeats": 1})
    assert peak < 1 << 20


@pytest.mark.cuda
def test_peak_memory_of_a_gpu():
    source = torch.ones(32 << 18, device="cuda")

    def work():
        total = torch.ones(64 << 18, device="cuda").sum()
        return torch.ones(8 << 18, device="cuda") * (total + source[0])

    assert measure.cuda_peak(work) == pytest.approx((64 - 8) << 20, rel=0.05)


def test_peak_memory_reports_what_the_child_said():
    with pytest.raises(measure.Unavailable, match="ValueError: no such kernel"):
        measure.peak_memory(build_failure, {"message": "no such kernel"})


# ---- correctness ---------------------------------------------------------------------------------------------------


def test_oracle_accepts_rounding_and_rejects_more():
    exact = torch.linspace(1, 2, 1000, dtype=torch.float64)
    rounded = exact.to(torch.bfloat16)
    assert check_oracle("x", rounded, exact, rounded) == pytest.approx(relative_error(rounded, exact))
    with pytest.raises(AssertionError, match="x: error 5"):
        check_oracle("x", rounded * 1.05, exact, rounded)
    with pytest.raises(AssertionError, match="nan"):
        check_oracle("x", rounded * torch.nan, exact, rounded)


def test_oracle_is_strict_for_float64():
    exact = torch.linspace(1, 2, 1000, dtype=torch.float64)
    check_oracle("x", exact * (1 + 1e-13), exact, exact * 1.5)
    with pytest.raises(AssertionError):
        check_oracle("x", exact * (1 + 1e-11), exact, exact * 1.5)


# ---- rows ----------------------------------------------------------------------------------------------------------


def test_rows_survive_a_file(tmp_path):
    rows = [make_row(), make_row(pass_="fwd+bwd", peak_bytes=7, extra={"commit": "abc", "threads": 2})]
    path = tmp_path / "new" / "results.jsonl"
    measure.write_rows(path, rows[:1])
    measure.write_rows(path, rows[1:])  # appends
    assert measure.read_rows(path) == rows
    keys = json.loads(path.read_text().splitlines()[0]).keys()
    names = "family op case pass dtype device impl ms_median ms_min bytes flops peak_bytes fraction_of_limit"
    assert list(keys) == names.split()


def test_rows_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="pass: got 'both'"):
        make_row(pass_="both")
    with pytest.raises(ValueError, match="ms_min"):
        make_row(ms_min=3.0)
    with pytest.raises(ValueError, match="row lacks bytes, flops"):
        values = json.loads(make_row().to_json())
        measure.Row.from_json(json.dumps({key: values[key] for key in values.keys() - {"bytes", "flops"}}))


# ---- whole benchmarks ----------------------------------------------------------------------------------------------


def build_sum(impl, size):
    if impl == "native":
        raise measure.Unavailable("no such kernel")
    return torch.ones(size).sum


def test_run_skips_what_is_unavailable_and_says_so(capsys):
    case = harness_cases.Case("hdim", "sum", "ones", "fwd", "float32", 4000, 1000, build_sum, {"size": 1000})
    rows = harness_cases.run(
        [case], ["native", "eager"], seconds=0.05, limit_seconds=0.02, buffer_bytes=1 << 20, memory=False
    )
    assert [row.impl for row in rows] == ["eager"]
    assert rows[0].extra["speedup_over_eager"] == 1
    assert rows[0].peak_bytes is None
    assert "note: ones fwd float32 native: no such kernel" in capsys.readouterr().err
    assert "ones" in harness_cases.format_table(rows)


def build_of_batch(impl, batch):
    if impl == "eager" and batch > 4:
        raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB\nand more words")
    return partial(time.sleep, 0)


def halved(arguments):
    return None if arguments["batch"] % 2 else {"batch": arguments["batch"] // 2}


def test_where_eager_does_not_fit_a_part_of_the_batch_tells_its_speed(capsys, monkeypatch):
    taken = {"native": 0.004, "eager on a part": 0.016}
    given = {name: measure.Timing([seconds] * 2) for name, seconds in taken.items()}
    monkeypatch.setattr(harness_cases, "compare", lambda works, **_: {name: given[name] for name in works})
    case = harness_cases.Case(
        "hdim", "sum", "B16", "fwd", "float32", 4000, 1000, build_of_batch, {"batch": 16}, halve=halved
    )
    said = []
    options = {"memory": False, "note": said.append}
    rows = harness_cases.measure(case, ["native", "eager"], FakeProbe(), **options)
    assert [row.impl for row in rows] == ["native"]
    assert rows[0].extra["eager_parts"] == 4
    assert rows[0].extra["speedup_over_eager"] == pytest.approx(16)
    assert said == ["B16 fwd float32 eager: out of memory: Tried to allocate 20.00 GiB"]


class FakeProbe:
    alu_source = None

    def works(self, footprint):
        return {}

    def limits(self, times):
        return LIMITS


def test_rows_are_kept_when_a_later_case_fails(tmp_path):
    def fails(case):
        raise AssertionError("a wrong result")

    good, bad = (
        harness_cases.Case("hdim", "sum", name, "fwd", "float32", 4000, 1000, build_of_batch, {"batch": 1})
        for name in ("good", "bad")
    )
    path = tmp_path / "rows.jsonl"
    amount = {"seconds": 0.05, "limit_seconds": 0.02, "buffer_bytes": 1 << 20, "memory": False, "label": "lab"}
    with pytest.raises(AssertionError, match="a wrong result"):
        harness_cases.run(
            [good, bad],
            ["native"],
            check=lambda case: fails(case) if case.name == "bad" else None,
            out=str(path),
            **amount,
        )
    assert [(row.case, row.device) for row in measure.read_rows(path)] == [("good", "lab")]


def test_the_gpu_has_cases_of_its_own():
    options = argparse.Namespace(dtype=["bfloat16"], device="cuda")
    main = {case.name for case in hdim_cases.make_cases(options) if case.suite == "main"}
    assert main == {"B32-S512", "B8-S128", "B2-S2048"}
    case = next(case for case in hdim_cases.make_cases(options) if case.name == "B32-S512")
    assert case.pass_ == "fwd" and case.alu == 2 * 96 * 32 * 512 * 512
    assert case.halve(case.arguments)["size"] == [16, 512, 24, 96, 768]


def test_hdim_counts_the_published_work():
    pairs = 8 * 128 * 128
    forward = hdim_cases.least_flops(pairs, 24, 96, 1024, "fwd")
    both = hdim_cases.least_flops(pairs, 24, 96, 1024, "fwd+bwd")
    assert round(forward / 1e9, 2) == 1.48
    assert round((both - forward) / 1e9, 2) == 4.16
    inputs = hdim_cases.make_inputs([2, 24, 8, 16, 32], "float32", "cpu")
    moved = sum(tensor.nbytes for tensor in inputs) + inputs[2].nbytes
    assert hdim_cases.least_bytes(2, 24, 8, 16, 32, "fwd", 4, 0) == moved
    assert hdim_cases.least_bytes(2, 24, 8, 16, 32, "fwd+bwd", 4, 0) == 2 * moved


def test_hdim_oracle_by_rows_is_the_whole_formula():
    inputs = hdim_cases.make_inputs([2, 24, 8, 16, 32], "float64", "cpu")
    options = hdim_cases.make_options(2, 24, "cpu", masked=True)
    cotangent = torch.randn_like(inputs[2])
    whole = hdim_cases._forward_backward(hdim_cases.eager, inputs, options, cotangent)
    for part, expected in zip(hdim_cases._by_rows(inputs, options, cotangent, rows=7), whole, strict=True):
        torch.testing.assert_close(part, expected)


@linux
@pytest.mark.parametrize(("script", "memory"), [(hdim_cases, []), (routing_cases, ["--no-memory"])])
def test_script_prints_and_keeps_valid_rows(script, memory, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    assert script.main(["--quick", "--no-compile", "--json", "--out", str(path), *memory]) == 0
    rows = [measure.Row.from_json(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == measure.read_rows(path)
    assert {row.pass_ for row in rows if row.impl == "eager"} == {"fwd", "fwd+bwd"}
    for row in rows:
        assert row.case == "toy"
        assert (row.peak_bytes is None) == bool(memory)
        assert row.fraction_of_limit > 0
        assert row.extra.keys() >= {"date", "commit", "versions", "threads", "spread", "machine"}
        rates = {"fma_rate", "clock", "copy_rate", "read_rate", "write_rate", "byte_rate"}
        assert row.extra.keys() >= rates | {"torch_copy_rate", "torch_gemm_rate", "bytes_level", "beyond_limit"}
        assert row.extra["machine"].keys() == {"cpu", "isa", "cores", "threads", "caches"}


CPU_FACTS = {"spread": 0.1, "threads": 2, "fma_rate": 4e11, "byte_rate": 5e10, "bytes_level": "L3", "copy_rate": 4e10}
CPU_FACTS |= {"torch_gemm_rate": 3e11, "torch_copy_rate": 3e10}


def test_table_tells_operators_apart():
    rows = [make_row(op=op, extra=CPU_FACTS) for op in "ab"]
    first, second = harness_cases.format_table(rows).split("\n\n")
    assert first.splitlines()[0] == "a" and second.splitlines()[0] == "b"
    assert "S128" in first and "S128" in second
    limits = "limits: L3 50 GB/s, multiply-adds float32 400 GFLOP/s; torch: copy 30 GB/s, GEMM float32 300 GFLOP/s"
    assert limits in first
    gpu = make_row(extra={"spread": 0.1, "threads": 2, "copy_rate": 1e9, "gemm_rate": 1e12})
    assert "copy 1 GB/s, GEMM float32 1e+03 GFLOP/s" in harness_cases.format_table([gpu])


def build_named(impl):
    return torch.ones(1000).sum


def test_peers_of_a_case_are_timed_beside_the_usual_implementations(capsys):
    arguments = ("hdim", "sum", "toy", "fwd", "float32", 4000, 1000, build_named, {})
    case = harness_cases.Case(*arguments, suite="toy", peers=("other", "other compile"))
    options = ["--quick", "--no-memory", "--no-compile", "--json"]
    assert harness_cases.main("", lambda options: [case], options) == 0
    rows = [measure.Row.from_json(line) for line in capsys.readouterr().out.splitlines()]
    assert [row.impl for row in rows] == ["native", "eager", "other"]


def test_only_the_implementations_that_were_asked_for_run(capsys):
    arguments = ("hdim", "sum", "toy", "fwd", "float32", 4000, 1000, build_named, {})
    case = harness_cases.Case(*arguments, suite="toy", peers=("other", "third"))
    options = ["--quick", "--no-memory", "--json", "--impl", "third", "eager"]
    assert harness_cases.main("", lambda options: [case], options) == 0
    rows = [measure.Row.from_json(line) for line in capsys.readouterr().out.splitlines()]
    assert [row.impl for row in rows] == ["eager", "third"]
    with pytest.raises(SystemExit):
        harness_cases.main("", lambda options: [case], ["--quick", "--impl", "fourth"])
    assert "unknown impl fourth; there are native, eager, compile, other, third" in capsys.readouterr().err


def test_script_names_the_cases_it_knows(capsys):
    with pytest.raises(SystemExit) as caught:
        hdim_cases.main(["--case", "S127"])
    assert caught.value.code == 2
    assert "unknown case S127; there are S128, S512" in capsys.readouterr().err
