"""The sizes that the pages of families call proven are those that the tests of the operators use."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def proven(family: str) -> str:
    """Returns the paragraph of a family's page about its tests, in one line."""
    page = (ROOT / "docs" / "families" / f"{family}.md").read_text()
    return " ".join(page.split("## Sizes proven\n")[1].split("\n## ")[0].split())


def cases(family: str, test: str, *names: str) -> Any:
    """Returns the values that a test of the operators has for one of its parameters, by any of its names."""
    tree = ast.parse((ROOT / "tests" / "ops" / f"test_{family}.py").read_text())
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == test)
    calls = [node for node in function.decorator_list if isinstance(node, ast.Call)]
    found = [call.args[1] for call in calls if call.args and ast.unparse(call.args[0]).strip("'") in names]
    assert len(found) == 1, f"{test} has no parameter {names}"
    return eval(compile(ast.Expression(found[0]), test, "eval"), {})


def words(values: list[int]) -> str:
    """Joins numbers as prose does."""
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}"


def test_sizes_of_hdim() -> None:
    sizes = cases("hdim", "test_odd_sizes", "sizes")
    _, queries, keys, d, m, _ = map(max, zip(*sizes, strict=True))
    assert f"from 1 up to {queries} queries, {keys} keys, D = {d} and M = {m}, odd ones" in proven("hdim")
    assert all(min(column) == 1 for column in zip(*sizes, strict=True))


def test_sizes_of_hyper() -> None:
    streams = sorted({4, *cases("hyper", "test_oracle_rule_for_other_numbers_of_streams", "n")})
    widths = cases("hyper", "test_any_width", "d")
    assert f"with n of {words(streams)}, d of {words(widths)}, " in proven("hyper")


def test_sizes_of_quantize() -> None:
    sizes = {
        size for sizes in cases("quantize", "test_nearest_is_what_exhaustive_search_finds", "sizes") for size in sizes
    }
    levels = max(level for levels in cases("quantize", "test_fsq_is_the_formula", "levels") for level in levels)
    dimensions = max(cases("quantize", "test_indices_up_to_63_bits", "count"))
    assert f"N, K and D of {min(sizes)} to {max(sizes)}, odd ones" in proven("quantize")
    assert f"FSQ with up to {dimensions} dimensions, up to {levels} levels" in proven("quantize")


def test_sizes_of_aggregate() -> None:
    layers, tokens, widths = zip(*cases("aggregate", "test_any_size", "size"), strict=True)
    windows = cases("aggregate", "test_any_memory_and_heads", "window")
    heads = cases("aggregate", "test_any_memory_and_heads", "num_heads")
    rows = max(columns for *_, columns in cases("aggregate", "test_large_means_do_not_drown_the_norm", "sizes"))
    text = proven("aggregate")
    assert f"with {min(layers)} to {max(layers)} layers, {min(tokens)} to {max(tokens)} tokens, " in text
    assert f"widths of {min(widths)} to {max(widths)} and rows of {rows}, odd ones" in text
    assert f"{words(heads)} heads, windows of {min(windows)} to {max(windows)} taps" in text
