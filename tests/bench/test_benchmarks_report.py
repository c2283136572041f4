"""One run of all benchmarks: its choice of cases, its curves, its errors, and the report that it leaves."""

from __future__ import annotations

import argparse
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks.cases import aggregate as aggregate_cases
from benchmarks.cases import hyper as hyper_cases
from benchmarks.cases import peers
from benchmarks.cases import quantize as quantize_cases
from benchmarks.harness import cases as harness_cases
from benchmarks.harness import measure
from benchmarks.report import numerics, page, plots, scaling, screenshot, suite
from xlayer_ext import testing
from xlayer_ext.testing import check_oracle


def make_row(**changes: Any) -> measure.Row:
    values = {"family": "hdim", "op": "hdim_attention", "case": "S128", "pass_": "fwd", "dtype": "float32"}
    values |= {"device": "cpu", "impl": "native", "ms_median": 2.0, "ms_min": 1.5, "bytes": 4_000_000}
    values |= {"flops": 80_000_000, "peak_bytes": None, "fraction_of_limit": 0.5, "extra": {"spread": 0.02}}
    return measure.Row(**(values | changes))


ROWS = [
    make_row(),
    make_row(impl="eager", ms_median=8.0, peak_bytes=7_000_000, extra={"speedup_over_eager": 1.0, "spread": 0.3}),
    make_row(family="quantize", op="fsq", case="<toy>", flops=0),
    make_row(family="quantize", op="fsq", case="<toy>", flops=0, impl="peer & co", ms_median=3.0),
]
RATES = {"copy_rate": 1e10, "read_rate": 2e10, "write_rate": 1e10, "byte_rate": 2e10}
LIMITS = {
    "torch_copy_rate": 1e10,
    "gemm_rates": {"float32": 1e11, "bfloat16": 1e12},
    "launches": {"torch.neg": 2e-6},
    "levels": [
        {"level": level, "footprint": size, "enough": level == "L1", **RATES}
        for level, size in (("L1", 1 << 15), ("memory", 1 << 30))
    ],
    "multiply_adds": [
        {"isa": "avx2", "dtype": dtype, "threads": 2, "rate": rate, "clock": 2e9, "pipes": 2, "of_pipes": 0.98}
        for dtype, rate in (("float32", 2e11), ("float64", 1e11))
    ],
}


def make_found(**changes: Any) -> dict[str, Any]:
    curve = scaling.Measured("hdim", "messaging", "S", "ms", [1, 2, 4])
    curve.add("native", [1.0, 4.0, 16.0])
    peak = scaling.Measured("hdim", "messaging", "S", "bytes", [1, 2])
    peak.add("native", [0, 5])
    error = numerics.Exactness("hdim", "hdim_attention", "float32", "context", 1e-7, 2e-7, 4e-7, 3, True)
    return {
        **{"command": "python -m benchmarks", "suite": "toy", "device": "a CPU", "threads": 2, "commit": "abc"},
        **{"date": "2026-01-02T03:04:05Z", "versions": {"torch": "2.13"}, "limits": LIMITS, "failures": []},
        "notes": ["a note with <angles>"],
        "peers": [{"package": "tile-kernels", "what": "mHC", "state": "missing: GPUs alone"}],
        "curves": [json.loads(json.dumps(vars(one))) for one in (curve, peak)],
        "numerics": [error.to_dict()],
        **changes,
    }


class Page(HTMLParser):
    """Cells, addresses and the tags that are open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report")
    measure.write_rows(path / "rows.jsonl", ROWS)
    (path / "found.json").write_text(json.dumps(make_found()))
    page.write(path)
    return path


# ---- the report ------------------------------------------------------------------------------------------------------


def test_report_is_one_file_that_holds_every_row(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    shown = {tuple(cells[:6]) for cells in page.rows}
    for row in ROWS:
        assert (row.op, row.case, row.pass_, row.dtype, row.impl, f"{row.ms_median:.4g}") in shown
    assert all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"https?://|@import|<script", text)
    assert 'name="viewport"' in text and "a note with &lt;angles&gt;" in text


def test_report_shows_every_picture(folder: Path) -> None:
    files = {path.name for path in folder.glob("*.png")}
    assert files == {"roofline.png", "bytes.png", "speedup-hdim.png", "speedup-quantize.png", "time.png", "memory.png"}
    assert all((folder / name).read_bytes()[:4] == b"\x89PNG" for name in files)
    pictures = [address for address in Page((folder / "report.html").read_text()).addresses if "png" in address]
    assert len(pictures) == len(files)


def test_report_names_what_is_wrong() -> None:
    assert "Wrong" not in page.html(ROWS, make_found(), {})
    text = page.html([], make_found(failures=["fsq: 3 > 2"]), {})
    assert "Wrong" in text and "fsq: 3 &gt; 2" in text


def test_a_run_that_was_stopped_early_has_a_report(tmp_path: Path) -> None:
    found = make_found(curves=[], numerics=[])
    del found["limits"]
    (tmp_path / "found.json").write_text(json.dumps(found))
    assert "a CPU" in page.write(tmp_path).read_text()
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.slow
@pytest.mark.skipif(screenshot.browser() is None, reason="needs Chromium")
def test_a_browser_shows_the_report(folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "phone.png"
    screenshot.take(folder / "report.html", picture)
    assert picture.stat().st_size > 20_000


# ---- plots -----------------------------------------------------------------------------------------------------------


def test_roofline_by_hand() -> None:
    row = ROWS[0]  # 4 MB and 80 Mflop in 2 ms
    assert plots.intensity(row) == 20
    assert plots.achieved(row) == (2e9, 4e10)
    assert plots.roof(20, 1e10, 1e11) == 1e11  # beyond the ridge at 10 flop per byte
    assert plots.roof(2, 1e10, 1e11) == 2e10
    assert plots.byte_roofs(LIMITS) == {"L1": 2e10, "memory": 2e10}
    found = [plots.flop_roof(LIMITS, dtype) for dtype in ("float32", "float64", "bfloat16")]
    assert found == [2e11, 1e11, 1e12]  # in 16 bits torch shows matrix units
    gpu = {"torch_copy_rate": 3e12, "gemm_rates": {"float32": 5e13}}
    assert plots.byte_roofs(gpu) == {"memory": 3e12} and plots.flop_roof(gpu, "float32") == 5e13


def test_labels_of_the_roofline_overlap_neither_points_nor_one_another() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    near = [make_row(op=f"operator {i}", ms_median=2.0 + i / 10, flops=80_000_000 + i * 10**6) for i in range(12)]
    figure = Figure(figsize=(plots.WIDTH, 5.2), dpi=plots.DOTS, layout="constrained")
    FigureCanvasAgg(figure)
    plots.roofline(figure, plots.kernels(near), LIMITS)
    figure.draw_without_rendering()
    axis, renderer = figure.axes[0], figure._get_renderer()
    boxes = [Text.get_window_extent(t, renderer) for t in axis.texts if t.get_text().startswith("operator")]
    assert len(boxes) >= 10
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:index])
        points = axis.transData.transform([(plots.intensity(row), plots.achieved(row)[1] / 1e9) for row in near])
        assert not any(box.contains(x, y) for x, y in points)
    for ticks in (axis.xaxis, axis.yaxis):
        assert all(re.fullmatch(r"[\d.]+", text) for tick in ticks.get_ticklabels() if (text := tick.get_text()))


def test_the_tables_of_limits_name_what_is_short() -> None:
    lines = dict(page.limits(LIMITS).rows)
    assert lines["copy, L1, 32 KiB"] == "10.0 GB/s" and lines["torch's GEMM, bfloat16"] == "1000 GFLOP/s"
    assert lines["read, memory, 1024 MiB, less than four times the largest cache: memory is short"] == "20.0 GB/s"
    (first, _) = page.multiply_adds(LIMITS["multiply_adds"]).rows
    assert first == ["avx2", "float32", "2", "200.0", "2.000", "2", "0.980"]


def test_a_row_beyond_the_limit_is_seen_and_fails_the_run(tmp_path: Path, monkeypatch) -> None:
    wrong = make_row(fraction_of_limit=1.2, extra={"beyond_limit": True, "bound": "bytes", "bytes_level": "L3"})
    assert page.times([wrong], "hdim").rows[0][9:11] == ["1.200 BEYOND", "bytes, L3"]
    options = suite.parser().parse_args([])
    run = suite.Run(options, suite.PLANS["toy"], tmp_path, {"notes": [], "failures": []})
    monkeypatch.setattr(suite, "measure_case", lambda *_: [wrong])
    monkeypatch.setattr(run, "late", lambda: False)
    case = quantize_cases.make_cases(argparse.Namespace(device="cpu", dtype=["float32"]))[0]
    suite.measure_cases(run, [(quantize_cases, case)], {"float32": None})  # type: ignore[dict-item]
    assert "1.20 of the limit, which nothing can exceed" in run.found["failures"][0]


def test_speedups_are_ratios_to_the_native_kernel() -> None:
    bars = plots.speedups(ROWS)
    assert bars == {
        "hdim_attention S128, fwd": {"eager": 4.0},
        "fsq <toy>, fwd": {"peer & co": 1.5},
    }
    assert plots.speedups([ROWS[1]]) == {}  # nothing to compare with


def test_fitted_line_goes_through_points_of_a_power_law() -> None:
    assert plots.fitted([1, 2, 4], [3, 12, 48], 2.0) == pytest.approx([3, 12, 48])


# ---- curves ----------------------------------------------------------------------------------------------------------


def test_exponent_of_a_power_law() -> None:
    sizes = [3, 10, 40, 200]
    assert scaling.exponent(sizes, [7 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert scaling.exponent(sizes, [5 / size for size in sizes]) == pytest.approx(-1)
    assert "native" not in make_found()["curves"][1]["exponents"]  # a peak of nothing has no logarithm


def test_a_curve_is_measured_at_its_points() -> None:
    curve = next(curve for curve in scaling.curves(cuda=False) if curve.variable == "K")
    short = scaling.Curve(curve.family, curve.what, "K", (16, 64), curve.build, curve.arguments)
    notes: list[str] = []
    measured = scaling.measure(short, "float32", "cpu", 0.01, notes.append)
    assert measured.points == [16, 64] and all(len(values) == 2 for values in measured.values.values())
    assert "eager" in measured.values and len(measured.values) + len(notes) == 2


def test_two_curves_are_quick() -> None:
    assert [curve.variable for curve in scaling.curves(cuda=False) if curve.quick] == ["S", "K"]


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_recorded_errors_are_not_raised() -> None:
    import torch

    exact = torch.linspace(1, 2, 100, dtype=torch.float64)
    rounded = exact.float()
    with testing.recording() as found:
        check_oracle("good", rounded, exact, rounded)
        check_oracle("bad", 1.1 * rounded, exact, rounded)
    assert [(one.name, one.holds, one.dtype) for one in found] == [("good", True, "float32"), ("bad", False, "float32")]
    with pytest.raises(AssertionError):
        check_oracle("bad", 1.1 * rounded, exact, rounded)
    case = harness_cases.Case("f", "op", "toy", "fwd", "float32", 1, 1, scaling.exponent, {})
    worst = numerics.summary(case, found)
    assert worst is not None and (worst.result, worst.holds, worst.comparisons) == ("bad", False, 2)
    said = numerics.summary(case, [], "other codes")
    assert said is not None and not said.holds
    assert numerics.summary(case, []) is None


def test_every_operator_has_a_small_case_of_its_own_size() -> None:
    for module in suite.load([], suite.PLANS["quick"]):
        for case in numerics.small_cases(module, "cpu", "float16"):
            assert case.arguments["size"] == numerics.SIZES[case.op] and case.dtype == "float16"


# ---- the run ---------------------------------------------------------------------------------------------------------


def test_one_family_is_its_script_and_more_are_a_suite() -> None:
    for line in ("hdim", "hyper --case dhc --pass fwd", "hdim --suite full --out a/b.jsonl", "routing --json --quick"):
        assert command.wants_script(line.split()), line
    for line in (
        "",
        "--suite full",
        "hdim hyper",
        "hdim --suite quick",
        "hdim --out folder",
        "hdim --minutes 3",
        "nothing",
    ):
        assert not command.wants_script(line.split()), line


@pytest.mark.parametrize(("line", "says"), [("nothing", "unknown family nothing"), ("--out here", "holds results")])
def test_mistakes_are_one_line(line: str, says: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    measure.write_rows(tmp_path / "here" / "rows.jsonl", ROWS)
    with pytest.raises(SystemExit):
        suite.main(line.split())
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_quick_has_every_operator_pass_and_package() -> None:
    options = suite.parser().parse_args([])
    for module in (aggregate_cases, hyper_cases, quantize_cases):
        everything = [case for case in module.make_cases(options) if case.suite == "main"]
        quick = suite.chosen(module, options, suite.PLANS["quick"])
        assert len(quick) < len(everything)
        for facts in (lambda case: {(case.op, case.pass_)}, lambda case: set(case.peers)):
            assert set().union(*map(facts, quick)) >= set().union(*map(facts, everything))


def test_operators_take_turns() -> None:
    options = suite.parser().parse_args([])
    cases = [(hyper_cases, case) for case in suite.chosen(hyper_cases, options, suite.PLANS["quick"])]
    turns = [case.op for _, case in suite.by_turns(cases)]
    assert len(turns) == len(cases)
    assert set(turns[:4]) == set(turns[4:8]) == set(hyper_cases.OPERATORS)


def test_what_is_late_or_wrong_is_said(tmp_path: Path, monkeypatch) -> None:
    options = suite.parser().parse_args(["--minutes", "0"])
    run = suite.Run(options, suite.PLANS["toy"], tmp_path, {"notes": [], "failures": []})
    case = quantize_cases.make_cases(argparse.Namespace(device="cpu", dtype=["float32"]))[0]
    suite.measure_cases(run, [(quantize_cases, case)], {"float32": None})  # type: ignore[dict-item]
    assert run.rows == [] and "1 cases left out" in run.found["notes"][0]

    def wrong(*arguments: Any, **options: Any) -> list[measure.Row]:
        raise AssertionError("error 3 exceeds 2")

    monkeypatch.setattr(harness_cases, "measure", wrong)
    assert suite.measure_case(run, quantize_cases, case, None, False) == []  # type: ignore[arg-type]
    assert "error 3 exceeds 2" in run.found["failures"][0]


def test_packages_for_gpus_are_missing_on_a_cpu_with_a_reason() -> None:
    states = {peer["package"]: peer["state"] for peer in peers.states("cpu")}
    assert states["tile-kernels"] == states["liger-kernel"] == "missing: its kernels run on GPUs alone"
    absent = peers.Peer("no-such-package", "no_such_package", "nothing")
    assert "No module named 'no_such_package'" in peers.state(absent, "cpu")


@pytest.mark.slow
def test_a_whole_run(tmp_path: Path, capsys) -> None:
    assert suite.main(["routing", "--suite", "toy", "--no-memory", "--out", str(tmp_path / "run")]) == 0
    rows = measure.read_rows(tmp_path / "run" / "rows.jsonl")
    assert {row.op for row in rows} == {"masked_mean"} and {row.pass_ for row in rows} == {"fwd", "fwd+bwd"}
    found = json.loads((tmp_path / "run" / "found.json").read_text())
    assert [level["level"] for level in found["limits"]["levels"]][-1] == "memory"
    assert found["limits"]["torch_copy_rate"] > 1e6 and set(found["limits"]["gemm_rates"]) == set(harness_cases.DTYPES)
    assert found["failures"] == [] and "torch.neg" in found["limits"]["launches"]
    assert "masked_mean" in (tmp_path / "run" / "report.html").read_text()
    assert "toy" in capsys.readouterr().out
