"""Bounds are judged from rows: they hold, they do not, or nobody measured them."""

from __future__ import annotations

import argparse
import re
from typing import Any

import pytest

from benchmarks.harness import cases as harness_cases
from benchmarks.harness import measure
from benchmarks.report import bounds, page, suite
from benchmarks.report.bounds import LIMIT, MEMORY, SPEED, TIME, Bound

WHERE = ("f", "op", "case", "fwd")
MACHINE = {"cpu": "a", "isa": "avx2", "cores": 2, "threads": 2, "caches": {}}


def row(impl: str = "native", ms: float = 2.0, **changes: Any) -> measure.Row:
    values = {"family": "f", "op": "op", "case": "case", "pass_": "fwd", "dtype": "float32", "device": "cpu"}
    values |= {"impl": impl, "ms_median": ms, "ms_min": ms, "bytes": 1, "flops": 1, "peak_bytes": 1_000_000}
    return measure.Row(**(values | {"fraction_of_limit": 0.5, "extra": {"threads": 2, "machine": MACHINE}} | changes))


@pytest.mark.parametrize(
    ("bound", "measured", "holds"),
    [
        (Bound(*WHERE, LIMIT, 0.5), 0.5, True),
        (Bound(*WHERE, LIMIT, 0.51), 0.5, False),
        (Bound(*WHERE, SPEED, 3, "eager"), 3.0, True),
        (Bound(*WHERE, SPEED, 3.1, "eager"), 3.0, False),
        (Bound(*WHERE, TIME, 0.34, "eager"), 1 / 3, True),
        (Bound(*WHERE, TIME, 0.33, "eager"), 1 / 3, False),
        (Bound(*WHERE, TIME, 3, "native", "eager"), 3.0, True),
        (Bound(*WHERE, MEMORY, 0.25, "eager"), 0.25, True),
        (Bound(*WHERE, MEMORY, 0.2, "eager"), 0.25, False),
        (Bound(*WHERE, MEMORY, 1e6), 1e6, True),
        (Bound(*WHERE, MEMORY, 9e5), 1e6, False),
    ],
)
def test_a_bound_holds_or_does_not(bound: Bound, measured: float, holds: bool) -> None:
    rows = [row(), row("eager", 6.0, peak_bytes=4_000_000)]
    (verdict,) = bounds.judged(rows, [bound])
    assert verdict.measured == pytest.approx(measured)
    assert verdict.holds is holds
    assert verdict.cells[-1] == ("✓" if holds else "✗")


def test_without_its_rows_a_bound_is_not_measured() -> None:
    asked = [Bound(*WHERE, SPEED, 3, "eager"), Bound(*WHERE, MEMORY, 1e9), Bound("f", "op", "other", "fwd", LIMIT, 0.1)]
    verdicts = bounds.judged([row(peak_bytes=None), row("eager", case="other")], asked)
    assert [verdict.holds for verdict in verdicts] == [None] * 3
    assert [verdict.cells[-2:] for verdict in verdicts] == [["not measured", ""]] * 3
    assert bounds.summary(verdicts) == "Of 3 bounds 0 hold, 0 do not, 3 are not measured."


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16"},
        {"extra": {"threads": 4, "machine": MACHINE}},
        {"extra": {"threads": 2, "machine": MACHINE, "alu": 0}},
        {"extra": {"threads": 2}},  # its limit was what torch reached
        {"extra": {"threads": 2, "machine": MACHINE, "beyond_limit": True}},
        {"device": "emulator"},
        {"pass_": "bwd"},
    ],
)
def test_rows_of_other_conditions_say_nothing(changes: dict[str, Any]) -> None:
    assert bounds.measured(Bound(*WHERE, LIMIT, 0.1), [row(**changes)]) is None


def test_only_what_ran_together_is_compared_and_the_last_run_counts() -> None:
    asked = Bound(*WHERE, SPEED, 3, "eager")
    rows = [row(ms=1.0), row("eager", 9.0), row(ms=2.0), row("eager", 8.0), row(ms=4.0)]
    assert bounds.measured(asked, rows) == 4.0
    assert bounds.measured(Bound(*WHERE, TIME, 1, "eager"), rows) == 0.25


def test_rows_of_two_machines_are_not_compared() -> None:
    asked = Bound(*WHERE, SPEED, 3, "eager")
    other = {"threads": 2, "machine": MACHINE | {"cpu": "b"}}
    assert bounds.measured(asked, [row(ms=1.0), row("eager", 9.0, extra=other)]) is None
    assert bounds.measured(asked, [row(ms=1.0), row("eager", 9.0, device="other")]) is None
    rows = [row(ms=1.0, extra=other), row("eager", 5.0, extra=other), row(ms=1.0), row("eager", 4.0)]
    assert bounds.measured(asked, rows) == 4.0


def test_a_ratio_has_the_room_that_the_limit_leaves() -> None:
    rows = [row("eager", 9.0, fraction_of_limit=0.2)]
    assert bounds.possible(Bound(*WHERE, SPEED, 3, "eager"), rows) == pytest.approx(5)
    assert bounds.possible(Bound(*WHERE, LIMIT, 0.5), rows) == 1
    assert bounds.possible(Bound(*WHERE, SPEED, 3, "compile"), rows) is None
    assert bounds.possible(Bound(*WHERE, TIME, 3, "eager"), rows) is None


def test_no_bound_is_beyond_the_limit() -> None:
    rows = measure.read_rows(bounds.ROWS) if bounds.ROWS.exists() else []
    for bound in bounds.BOUNDS:
        most = bounds.possible(bound, rows)
        assert most is None or 0 < bound.value <= most, (bound, most)
    assert not harness_cases.beyond(rows)


def test_a_bound_says_what_it_promises() -> None:
    said = [
        Bound(*WHERE, what, value, over).promised
        for what, value, over in ((LIMIT, 0.6, None), (SPEED, 9, "eager"), (TIME, 1.2, "gemm"), (MEMORY, 0.05, "eager"))
    ]
    assert said == [
        "≥ 0.6 of the limit",
        "≥ 9 × the speed of eager",
        "≤ 1.2 × the time of gemm",
        "≤ 0.05 × the memory of eager",
    ]
    assert Bound(*WHERE, MEMORY, 64e6).promised == "≤ 64 MB"


def test_every_bound_is_of_a_row_that_a_script_makes() -> None:
    options = argparse.Namespace(device="cpu", dtype=["float32"])
    impls = {
        (case.family, case.op, case.name, case.pass_): {*harness_cases.IMPLS, *case.peers}
        for module in suite.load([], suite.PLANS["full"])
        for case in module.make_cases(options)
    }
    for bound in bounds.BOUNDS:
        assert {bound.impl, bound.over or bound.impl} <= impls[bound[:4]], bound
    assert len(set(bounds.BOUNDS)) == len(bounds.BOUNDS)


def test_the_command_fails_unless_all_hold(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bounds, "BOUNDS", (Bound(*WHERE, LIMIT, 0.5),))
    path = tmp_path / "rows.jsonl"
    for fraction, code, says in ((0.4, 1, "0.4 +✗"), (0.6, 0, "0.6 +✓")):
        measure.write_rows(path, [row(fraction_of_limit=fraction)])
        assert bounds.main([str(path)]) == code
        assert re.search(rf"op +case +fwd +≥ 0\.5 of the limit +{says}", capsys.readouterr().out)
    measure.write_rows(other := tmp_path / "other.jsonl", [row(op="another")])
    assert bounds.main([str(other)]) == 1
    assert "1 are not measured" in capsys.readouterr().out


def test_a_report_shows_the_bounds_of_its_own_rows() -> None:
    asked = next(bound for bound in bounds.BOUNDS if bound.family == "quantize" and bound.what == MEMORY)
    named = {"family": asked.family, "op": asked.op, "case": asked.case}
    assert page.promises([row()]).rows == []
    table = page.promises([row(**named, peak_bytes=70_000_000)])
    assert [asked.op, asked.case, asked.pass_, "≤ 64 MB", "70.0 MB", "✗"] in table.rows
