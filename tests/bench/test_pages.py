"""The generated pages of docs show the committed results."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks.harness import measure
from benchmarks.pages import __main__ as pages
from benchmarks.pages import facts, figures, performance, studies, text

ROW = {"family": "f", "op": "o", "case": "c", "pass": "fwd", "dtype": "float32", "device": "d", "impl": "native"}
NUMBERS = {"bytes": 1, "flops": 1, "peak_bytes": None, "fraction_of_limit": 0.5, "ms_median": 2.0, "ms_min": 2.0}


def measured(folder: Path, monkeypatch: pytest.MonkeyPatch, *changes: dict[str, object]) -> performance.Rows:
    monkeypatch.setattr(text, "RESULTS", folder)
    rows = [measure.Row.from_json(json.dumps({**ROW, **NUMBERS, **change})) for change in changes]
    measure.write_rows(folder / f"{text.CPU}.jsonl", rows)
    return performance.Rows()


def test_pages_and_figures_show_the_committed_results() -> None:
    assert pages.stale() == [], "run `make results`"


def test_check_says_what_is_out_of_date(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "generated", lambda: {Path("docs/one.md"): "1\n", Path("docs/two.md"): "2\n"})
    monkeypatch.setattr(pages, "stale", lambda: ["docs/two.md"])
    assert pages.main(["--check"]) == 1
    assert "make results" in capsys.readouterr().err
    assert pages.main([]) == 0
    assert (tmp_path / "docs/two.md").read_text() == "2\n"
    monkeypatch.undo()
    monkeypatch.setattr(pages, "generated", lambda: {Path("docs/one.md"): "1\n", Path("docs/two.md"): "2\n"})
    (tmp_path / "docs/two.md").write_text("3\n")
    assert pages.stale(tmp_path) == ["docs/two.md"]


def test_of_equal_rows_the_last_counts(tmp_path, monkeypatch) -> None:
    times = (("native", 9.0), ("eager", 8.0), ("native", 2.0), ("eager", 6.0))
    rows = [{"impl": impl, "ms_median": t, "ms_min": t, "peak_bytes": 2_000_000, "machine": {}} for impl, t in times]
    found = measured(tmp_path, monkeypatch, *rows)
    key = ("o", "c", "fwd")
    assert (found.time(*key, "native"), found.ratio(*key, "eager"), found.time(*key, "gone")) == ("2.0 ms", "3.0", "")
    assert (found.fraction(*key, "native"), found.memory(*key, "native")) == ("0.50", "2.0 MB")
    assert found.runs("o", "c") == [{"native": 9.0, "eager": 8.0}, {"native": 2.0, "eager": 6.0}]


def test_fractions_of_what_torch_reached_are_not_shown(tmp_path, monkeypatch) -> None:
    found = measured(tmp_path, monkeypatch, {}, {"case": "new", "machine": {}})
    assert found.fraction("o", "c", "fwd", "native") == ""
    assert found.fraction("o", "new", "fwd", "native") == "0.50"


def test_limits_stand_beside_what_torch_reaches(tmp_path, monkeypatch) -> None:
    row = {"machine": {}, "fma_rate": 4e11, "torch_gemm_rate": 3e11, "byte_rate": 5e10, "copy_rate": 4e10}
    row |= {"torch_copy_rate": 3e10, "bytes_level": "L3"}
    slow = {"fma_rate": 3e11, "bytes_level": "memory"}
    rows = measured(tmp_path, monkeypatch, row, row | slow, row | {"dtype": "float64"}, {})
    lines = performance.limits(rows).replace(text.NBSP, " ").splitlines()
    assert lines[-3:] == [
        "| multiply-adds, float32 | 400 GFLOP/s | 300 GFLOP/s (GEMM) |",
        "| bytes of cases that L3 can hold | 50 GB/s, copies 40 GB/s | 30 GB/s (`copy_`) |",
        "| bytes of cases that only memory can hold | 50 GB/s, copies 40 GB/s | 30 GB/s (`copy_`) |",
    ]


def test_numbers_in_words() -> None:
    assert [text.milliseconds(value) for value in (0.234, 12.61, 123.4, 2712.0)] == [
        "0.23 ms", "12.6 ms", "123 ms", "2.71 s",
    ]  # fmt: skip
    assert [text.power(rate) for rate in (4e-3, 1.5e-5, 1.0)] == ["4e-3", "1.5e-5", "1e0"]
    assert text.named(B=4, d=128) == "B = 4, d = 128"
    assert text.span([2.04, 1.5, 3.0], ".1f") == "1.5 to 3.0"
    assert text.span([2.04, 2.0], ".1f") == "2.0"


def test_tables_leave_out_columns_without_entries() -> None:
    assert text.table(" | a", [["x", ""], ["", "y"]]) == "| | a |\n|---|---|\n| x | |\n| | y |\n"
    lines = [["x", "1", "", ""], ["y", "2", "", "3"]]
    assert text.without_empty(" | a | b | c", lines) == "| | a | c |\n|---|---|---|\n| x | 1 | |\n| y | 2 | 3 |\n"
    assert text.without_empty("p | a", [["", ""]]).startswith("| p |\n")


def test_a_package_that_is_not_pinned_is_an_error() -> None:
    with pytest.raises(LookupError, match="does not pin gone"):
        facts.pinned("gone")


def test_the_rate_that_quick_takes_is_the_best_of_those_tried(tmp_path, monkeypatch) -> None:
    rows = [
        {"run": {"options": {"encoder_lr": rate}}, "result": {"accuracy": {"mean": accuracy}}}
        for rate, accuracy in ((5e-4, 0.6), (1e-3, 0.7))
    ]
    (tmp_path / "xlrb-quick-rate.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(text, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match=r"0\.001 was better"):
        studies._rates()


def test_figures_are_svg_with_escaped_labels_inside_the_frame() -> None:
    bars = figures.bars("a < b", [figures.Bar("x & y", 0.5, "0.50", "#000000", "group")], 1.0, "limit")
    dots = figures.dots("t", [figures.Dot("x", 1.0, 0.5, 2.0, "1", "#000000")], (0.7, "chance"))
    lines = figures.lines(
        "t", ["1", "2"], [figures.Line("x", [1.0, 2.0], "#000000", [0.9, 1.9], [1.1, 2.1])], "n", ".0f"
    )
    for svg in (bars, dots, lines):
        root = ElementTree.fromstring(svg)
        height = float(root.attrib["height"])
        for element in root.iter():
            for name, most in (("x", figures.WIDTH), ("x1", figures.WIDTH), ("y", height), ("y2", height)):
                assert 0 <= float(element.attrib.get(name, 0)) <= most
