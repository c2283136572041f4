"""Every example runs, in seconds and without a network; its own assertions say whether it did what it shows."""

from __future__ import annotations

import runpy

import pytest
import torch

from commands import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, capsys) -> None:
    with torch.random.fork_rng():
        runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


def test_there_are_examples_and_each_says_how_to_run_it() -> None:
    assert EXAMPLES
    assert [path.name for path in EXAMPLES if f"python examples/{path.name}" not in path.read_text()] == []
