"""The README's numbers are those of the committed results."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import readme, readme_facts, readme_kernels, readme_numbers, readme_prose, readme_tables
from benchmarks.harness import measure as bench


def test_readme_shows_the_committed_results() -> None:
    text = (readme.ROOT / "README.md").read_text()
    assert text == readme.rewritten(text), "run `make results`"


def test_every_generated_part_is_in_the_readme() -> None:
    text = (readme.ROOT / "README.md").read_text()
    marks = re.findall(r"<!-- results: (\w+) -->", text)
    assert set(marks) == set(readme.BLOCKS)
    assert text.count("<!-- end -->") == len(marks)


def test_a_mark_inside_a_sentence_never_begins_a_line() -> None:
    # Markdown takes a line that begins with a comment out of its paragraph.
    text = (readme.ROOT / "README.md").read_text()
    assert re.findall(r"^ *<!-- results: \w+ -->(?=.)", text, re.MULTILINE) == []


def test_no_number_in_the_prose_is_typed_by_hand() -> None:
    text = (readme.ROOT / "README.md").read_text()
    assert readme_prose.unsourced(text) == [], "give it a function (benchmarks/readme.py), or leave it out"


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("It is 3.7× faster.", ["3.7×"]),
        ("It is 12× faster, in a\nminute.", ["12×", "a minute"]),
        ("It takes 5 ms, then three\nminutes, then 40 seconds.", ["5 ms", "three minutes", "40 seconds"]),
        ("| kernel | 59.4 % of 16 GiB |", ["59.4 %", "16 GiB"]),
        ("a rate of 5e-4 for 355 M parameters", ["5e-4", "355 M"]),
        ("at arXiv 2409.19606 and [here](https://host/1.5), with 8 × 128 tokens, D = 24, M = 96, 2 cores, sm_80", []),
        ("Python ≥ 3.10, σ(−2) ≈ 0.119", []),
        ("Python ≥ 3.11, σ(−3) ≈ 0.047", ["3.11", "0.047"]),
        ("<!-- results: a -->0.68 %<!-- end -->, 0.69 %, <!-- results: b -->\n1.2 ms\n<!-- end -->", ["0.69 %"]),
        ("```sh\nrun  # 3 minutes\n```\n4 minutes\n```\n5 minutes\n```", ["4 minutes"]),
    ],
)
def test_what_looks_measured_in_prose(typed: str, found: list[str]) -> None:
    assert readme_prose.unsourced(typed) == found


def test_every_exception_is_in_the_readme_and_has_a_reason() -> None:
    text = " ".join((readme.ROOT / "README.md").read_text().split())
    for pattern, reason in readme_prose.ALLOWED.items():
        assert re.search(pattern, text) and reason, pattern


def test_only_what_stands_between_the_marks_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "BLOCKS", {"one": lambda: "1\n", "two": lambda: "2\n"})
    text = "a\n<!-- results: one -->\nold\n<!-- end -->\nb\n<!-- results: two -->\n<!-- end -->\n"
    expected = "a\n<!-- results: one -->\n1\n<!-- end -->\nb\n<!-- results: two -->\n2\n<!-- end -->\n"
    assert readme.rewritten(text) == expected == readme.rewritten(expected)
    inline = "a <!-- results: one -->old<!-- end --> b <!-- results: two --><!-- end -->."
    assert readme.rewritten(inline) == "a <!-- results: one -->1<!-- end --> b <!-- results: two -->2<!-- end -->."
    with pytest.raises(KeyError):
        readme.rewritten(text.replace("results: one", "results: three"))


def test_check_says_when_the_readme_is_stale(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(readme, "BLOCKS", {"one": lambda: "1"})
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("<!-- results: one -->\n2\n<!-- end -->\n")
    assert readme.main(["--check"]) == 1
    assert "make results" in capsys.readouterr().err
    assert readme.main([]) == 0 == readme.main(["--check"])


def test_times_and_tables() -> None:
    assert [readme_tables.milliseconds(value) for value in (0.234, 12.61, 123.4, 2712.0)] == [
        "0.23 ms",
        "12.6 ms",
        "123 ms",
        "2.71 s",
    ]
    assert readme_tables.table(" | a", [["x", ""], ["", "y"]]) == "| | a |\n|---|---|\n| x | |\n| | y |\n"


def test_columns_of_what_was_not_measured_are_left_out() -> None:
    lines = [["x", "1", "", ""], ["y", "2", "", "3"]]
    assert (
        readme_tables.without_empty(" | a | b | c", lines) == "| | a | c |\n|---|---|---|\n| x | 1 | |\n| y | 2 | 3 |\n"
    )
    assert readme_tables.without_empty("p | a", [["", ""]]).startswith("| p |\n")


def measured(tmp_path, monkeypatch, *changes) -> readme_kernels.Rows:
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    row = {"family": "f", "op": "o", "case": "c", "pass": "fwd", "dtype": "float32", "device": "d", "impl": "native"}
    row |= {"bytes": 1, "flops": 1, "peak_bytes": None, "fraction_of_limit": 0.5, "ms_median": 2.0, "ms_min": 2.0}
    bench.write_rows(
        tmp_path / f"{readme_tables.CPU}.jsonl", [bench.Row.from_json(json.dumps(row | one)) for one in changes]
    )
    return readme_kernels.Rows(readme_tables.CPU)


def test_fractions_of_what_torch_reached_are_not_shown(tmp_path, monkeypatch) -> None:
    found = measured(tmp_path, monkeypatch, {}, {"case": "new", "machine": {}})
    assert found.fraction("o", "c", "fwd", "native") == ""
    assert found.fraction("o", "new", "fwd", "native") == "0.50"


def test_the_limits_are_told_beside_what_torch_reaches(tmp_path, monkeypatch) -> None:
    row = {"machine": {}, "fma_rate": 4e11, "torch_gemm_rate": 3e11, "byte_rate": 5e10, "copy_rate": 4e10}
    row |= {"torch_copy_rate": 3e10, "bytes_level": "L3"}
    measured(
        tmp_path, monkeypatch, row, row | {"fma_rate": 3e11, "bytes_level": "memory"}, row | {"dtype": "float64"}, {}
    )
    assert readme_kernels.limits().splitlines()[2:] == [
        "| multiply-adds, float32 | 400 GFLOP/s | 300 GFLOP/s (GEMM) |",
        "| bytes of cases that L3 can hold | 50 GB/s, copies 40 GB/s | 30 GB/s (`copy_`) |",
        "| bytes of cases that only memory can hold | 50 GB/s, copies 40 GB/s | 30 GB/s (`copy_`) |",
    ]


def test_of_equal_rows_the_last_counts(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    row = {"family": "f", "op": "o", "case": "c", "pass": "fwd", "dtype": "float32", "device": "d", "impl": "native"}
    numbers = {"bytes": 1, "flops": 1, "peak_bytes": 2_000_000, "fraction_of_limit": 0.5, "machine": {}}
    rows = [
        bench.Row.from_json(json.dumps({**row, **numbers, "impl": impl, "ms_median": t, "ms_min": t}))
        for impl, t in (("native", 9.0), ("eager", 8.0), ("native", 2.0), ("eager", 6.0))
    ]
    bench.write_rows(tmp_path / "d.jsonl", rows)
    found = readme_kernels.Rows("d")
    key = ("o", "c", "fwd")
    assert (found.time(*key, "native"), found.ratio(*key, "eager"), found.time(*key, "gone")) == ("2.0 ms", "3.0", "")
    assert (found.fraction(*key, "native"), found.memory(*key, "native")) == ("0.50", "2.0 MB")
    assert found.runs("o", "c") == [{"native": 9.0, "eager": 8.0}, {"native": 2.0, "eager": 6.0}]


def test_numbers_in_words() -> None:
    assert [readme_tables.power(rate) for rate in (4e-3, 1.5e-5, 1.0)] == ["4e-3", "1.5e-5", "1e0"]
    assert readme_tables.named(B=4, d=128) == "B = 4, d = 128"
    assert readme_numbers.span([2.04, 1.5, 3.0], ".1f") == "1.5 to 3.0"
    assert readme_numbers.span([2.04, 2.0], ".1f") == "2.0"


def test_what_the_code_does_not_hold_is_no_number() -> None:
    assert readme_facts.constant("hyper.h", "kHyperMaxStreams") == "16"
    with pytest.raises(LookupError, match="no integer kGone"):
        readme_facts.constant("hyper.h", "kGone")
    with pytest.raises(LookupError, match="does not pin gone"):
        readme_facts.pinned("gone")


def test_the_rate_that_quick_takes_is_the_best_of_those_tried(tmp_path, monkeypatch) -> None:
    rows = [
        {"run": {"options": {"encoder_lr": rate}}, "result": {"accuracy": {"mean": accuracy}}}
        for rate, accuracy in ((5e-4, 0.6), (1e-3, 0.7))
    ]
    (tmp_path / "xlrb-quick-rate.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match=r"0\.001 was better"):
        readme_numbers.xlrb_rates()
