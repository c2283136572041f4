"""The README's numbers are those of the committed results."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import readme
from xlayer_ext import bench


def test_readme_shows_the_committed_results() -> None:
    text = (readme.ROOT / "README.md").read_text()
    assert text == readme.rewritten(text), "run `make results`"


def test_every_generated_part_is_in_the_readme() -> None:
    text = (readme.ROOT / "README.md").read_text()
    assert sorted(re.findall(r"<!-- results: (\w+) -->", text)) == sorted(readme.BLOCKS)
    assert text.count("<!-- end -->") == len(readme.BLOCKS)


def test_only_what_stands_between_the_marks_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "BLOCKS", {"one": lambda: "1\n", "two": lambda: "2\n"})
    text = "a\n<!-- results: one -->\nold\n<!-- end -->\nb\n<!-- results: two -->\n<!-- end -->\n"
    expected = "a\n<!-- results: one -->\n1\n<!-- end -->\nb\n<!-- results: two -->\n2\n<!-- end -->\n"
    assert readme.rewritten(text) == expected == readme.rewritten(expected)
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
    assert [readme.milliseconds(value) for value in (0.234, 12.61, 123.4, 2712.0)] == [
        "0.23 ms",
        "12.6 ms",
        "123 ms",
        "2.71 s",
    ]
    assert readme.table(" | a", [["x", ""], ["", "y"]]) == "| | a |\n|---|---|\n| x | |\n| | y |\n"


def test_of_equal_rows_the_last_counts(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    row = {"family": "f", "op": "o", "case": "c", "pass": "fwd", "dtype": "float32", "device": "d", "impl": "native"}
    numbers = {"bytes": 1, "flops": 1, "peak_bytes": 2_000_000, "fraction_of_limit": 0.5}
    rows = [
        bench.Row.from_json(json.dumps({**row, **numbers, "impl": impl, "ms_median": t, "ms_min": t}))
        for impl, t in (("native", 9.0), ("eager", 8.0), ("native", 2.0), ("eager", 6.0))
    ]
    bench.write_rows(tmp_path / "d.jsonl", rows)
    found = readme.Rows("d")
    key = ("o", "c", "fwd")
    assert (found.time(*key, "native"), found.ratio(*key, "eager"), found.time(*key, "gone")) == ("2.0 ms", "3.0", "")
    assert (found.fraction(*key, "native"), found.memory(*key, "native")) == ("0.50", "2.0 MB")
    assert found.runs("o", "c") == [{"native": 9.0, "eager": 8.0}, {"native": 2.0, "eager": 6.0}]
