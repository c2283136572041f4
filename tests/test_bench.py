"""The benchmark harness: what it measures is checked against amounts of time, memory and error that are known."""

import json
import sys
import time
from functools import partial

import pytest
import torch

from benchmarks import bench_hdim, bench_routing
from xlayer_ext import bench, bench_suite

LIMITS = bench.Limits(copy_rate=100.0, gemm_rate=1000.0)


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
    return bench.Row(**(values | changes))


# ---- limits --------------------------------------------------------------------------------------------------------


def test_limits_come_from_the_rounds_of_a_comparison():
    probe = bench.LimitProbe("cpu", torch.float64, seconds=0.02, buffer_bytes=32 << 20)
    times = bench.compare(probe.works | {"other": lambda: time.sleep(0.001)}, seconds=0.1)
    limits = probe.limits(times)
    assert limits.copy_rate == pytest.approx(2 * (32 << 20) / times["limit: copy"].median)
    assert limits.gemm_rate > 1e8
    assert probe.best_gemm_rate > 1e8


def test_fraction_is_the_slower_of_bytes_and_flops_over_time():
    assert LIMITS.fraction(50, 100, seconds=1.0) == pytest.approx(0.5)  # 0.5 s of bytes, 0.1 s of flops
    assert LIMITS.fraction(50, 800, seconds=1.0) == pytest.approx(0.8)
    assert LIMITS.fraction(50, 0, seconds=2.0) == pytest.approx(0.25)


# ---- timing --------------------------------------------------------------------------------------------------------


def test_compare_orders_known_times():
    timings = bench.compare({"slow": lambda: time.sleep(0.02), "fast": lambda: time.sleep(0.002)}, seconds=0.3)
    assert 0.02 <= timings["slow"].minimum <= timings["slow"].median
    assert 0.002 <= timings["fast"].median < timings["slow"].minimum
    assert len(timings["fast"].samples) > len(timings["slow"].samples) >= 5  # a short call is repeated in its turn


def test_compare_interleaves_in_changing_order():
    calls: list[str] = []
    works = {name: partial(calls.append, name) for name in "abc"}
    bench.compare(works, seconds=0.0, min_rounds=20, turn_seconds=0.0)
    warm_up, timed = calls[:9], calls[9:]
    rounds = ["".join(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert warm_up == list("aaabbbccc")
    assert len(rounds) == 20
    assert all(sorted(one) == list("abc") for one in rounds)
    assert len(set(rounds)) > 1


def test_spread_is_relative_to_the_median():
    assert bench.Timing([1.0] * 9).spread == 0
    assert bench.Timing([8.0, 9.0, 10.0, 11.0, 12.0]).spread == pytest.approx(0.3)


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
    peak = bench.peak_memory(build_allocation, arguments)
    assert peak == pytest.approx((64 - 8) << 20, rel=0.1)  # the result does not exist yet while the temporaries do


@linux
def test_peak_memory_of_a_work_without_temporaries_is_near_zero():
    peak = bench.peak_memory(build_allocation, {"temporary_mib": 0, "result_mib": 64, "repeats": 1})
    assert peak < 1 << 20


def test_peak_memory_reports_what_the_child_said():
    with pytest.raises(bench.Unavailable, match="ValueError: no such kernel"):
        bench.peak_memory(build_failure, {"message": "no such kernel"})


# ---- correctness ---------------------------------------------------------------------------------------------------


def test_oracle_accepts_rounding_and_rejects_more():
    exact = torch.linspace(1, 2, 1000, dtype=torch.float64)
    rounded = exact.to(torch.bfloat16)
    assert bench.check_oracle("x", rounded, exact, rounded) == pytest.approx(bench.relative_error(rounded, exact))
    with pytest.raises(AssertionError, match="x: error 5"):
        bench.check_oracle("x", rounded * 1.05, exact, rounded)
    with pytest.raises(AssertionError, match="nan"):
        bench.check_oracle("x", rounded * torch.nan, exact, rounded)


def test_oracle_is_strict_for_float64():
    exact = torch.linspace(1, 2, 1000, dtype=torch.float64)
    bench.check_oracle("x", exact * (1 + 1e-13), exact, exact * 1.5)
    with pytest.raises(AssertionError):
        bench.check_oracle("x", exact * (1 + 1e-11), exact, exact * 1.5)


# ---- rows ----------------------------------------------------------------------------------------------------------


def test_rows_survive_a_file(tmp_path):
    rows = [make_row(), make_row(pass_="fwd+bwd", peak_bytes=7, extra={"commit": "abc", "threads": 2})]
    path = tmp_path / "new" / "results.jsonl"
    bench.write_rows(path, rows[:1])
    bench.write_rows(path, rows[1:])  # appends
    assert bench.read_rows(path) == rows
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
        bench.Row.from_json(json.dumps({key: values[key] for key in values.keys() - {"bytes", "flops"}}))


# ---- whole benchmarks ----------------------------------------------------------------------------------------------


def build_sum(impl, size):
    if impl == "native":
        raise bench.Unavailable("no such kernel")
    return torch.ones(size).sum


def test_run_skips_what_is_unavailable_and_says_so(capsys):
    case = bench_suite.Case("hdim", "sum", "ones", "fwd", "float32", 4000, 1000, build_sum, {"size": 1000})
    rows = bench_suite.run(
        [case], ["native", "eager"], seconds=0.05, limit_seconds=0.02, buffer_bytes=1 << 20, memory=False
    )
    assert [row.impl for row in rows] == ["eager"]
    assert rows[0].extra["speedup_over_eager"] == 1
    assert rows[0].peak_bytes is None
    assert "note: ones fwd float32 native: no such kernel" in capsys.readouterr().err
    assert "ones" in bench_suite.format_table(rows)


def test_hdim_counts_the_published_work():
    pairs = 8 * 128 * 128
    forward = bench_hdim.least_flops(pairs, 24, 96, 1024, "fwd")
    both = bench_hdim.least_flops(pairs, 24, 96, 1024, "fwd+bwd")
    assert round(forward / 1e9, 2) == 1.48
    assert round((both - forward) / 1e9, 2) == 4.16
    inputs = bench_hdim.make_inputs([2, 24, 8, 16, 32], "float32", "cpu")
    moved = sum(tensor.nbytes for tensor in inputs) + inputs[2].nbytes
    assert bench_hdim.least_bytes(2, 24, 8, 16, 32, "fwd", 4, 0) == moved
    assert bench_hdim.least_bytes(2, 24, 8, 16, 32, "fwd+bwd", 4, 0) == 2 * moved


def test_hdim_oracle_by_rows_is_the_whole_formula():
    inputs = bench_hdim.make_inputs([2, 24, 8, 16, 32], "float64", "cpu")
    options = bench_hdim.make_options(2, 24, "cpu", masked=True)
    cotangent = torch.randn_like(inputs[2])
    whole = bench_hdim._forward_backward(bench_hdim.eager, inputs, options, cotangent)
    for part, expected in zip(bench_hdim._by_rows(inputs, options, cotangent, rows=7), whole, strict=True):
        torch.testing.assert_close(part, expected)


@linux
@pytest.mark.parametrize(("script", "memory"), [(bench_hdim, []), (bench_routing, ["--no-memory"])])
def test_script_prints_and_keeps_valid_rows(script, memory, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    assert script.main(["--quick", "--no-compile", "--json", "--out", str(path), *memory]) == 0
    rows = [bench.Row.from_json(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == bench.read_rows(path)
    assert {row.pass_ for row in rows if row.impl == "eager"} == {"fwd", "fwd+bwd"}
    for row in rows:
        assert row.case == "toy"
        assert (row.peak_bytes is None) == bool(memory)
        assert row.fraction_of_limit > 0
        assert row.extra.keys() >= {"date", "commit", "versions", "threads", "spread", "copy_rate", "gemm_rate"}


def test_script_names_the_cases_it_knows(capsys):
    with pytest.raises(SystemExit) as caught:
        bench_hdim.main(["--case", "S127"])
    assert caught.value.code == 2
    assert "unknown case S127; there are S128, S512" in capsys.readouterr().err
