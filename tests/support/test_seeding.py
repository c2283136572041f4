"""The seeds of the tests' inputs, and the options that choose them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

import seeding
from oracle import draw, fresh_generator

TESTS = Path(__file__).parents[1]
DRAWS = """
import pytest, torch
from hypothesis import given, strategies as st
from oracle import draw, fresh_generator

@pytest.fixture
def drawn():
    return float(draw(fresh_generator(), 1))

@pytest.mark.parametrize("case", ["a", "b"])
def test_it(case, drawn):
    print("DREW", case, drawn, float(draw(fresh_generator(), 1)), float(torch.rand(1)))

@given(number=st.integers(0, 10**9))
def test_hypothesis(number):
    print("DREW hypothesis", number)

def test_without():
    print("DREW nothing")
"""


def run(folder: Path, *options: str, body: str = DRAWS) -> tuple[list[str], str]:
    """Runs the tests of ``body``; returns the lines that they printed, and the whole output of pytest."""
    (folder / "test_it.py").write_text(body)
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "conftest", "-p", "no:cacheprovider", "-c", "/dev/null"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS / "support"), *filter(None, sys.path)])
    }
    out = subprocess.run(
        [*command, "--rootdir", folder, *options, folder], capture_output=True, text=True, check=False, env=environment
    )
    return [line for line in out.stdout.splitlines() if line.startswith("DREW")], out.stdout + out.stderr


def test_a_seed_is_of_the_test_the_number_and_the_position() -> None:
    found = []
    before = seeding._running
    try:
        for test, number in (("a", 0), ("b", 0), ("a", 1), ("a", 0)):
            seeding.begin(test, number)
            found.append((seeding.next_seed(), seeding.next_seed(), float(torch.rand(1))))
    finally:
        seeding._running = before
    assert found[0] == found[3] and len({value for row in found[:3] for value in row}) == 9


def test_inputs_are_the_same_in_every_run_and_order(tmp_path: Path) -> None:
    everything, said = run(tmp_path)
    some, _ = run(tmp_path, "-k", "b or hypothesis")
    assert len(everything) > 100  # hypothesis' examples
    assert [line for line in everything if line.startswith(("DREW b", "DREW hypothesis"))] == some
    assert "3 of 4 tests draw inputs" in said


def test_fresh_seeds_run_what_draws_again_and_say_how_to_repeat_it(tmp_path: Path) -> None:
    body = DRAWS.replace("def test_without():", "def test_without():\n    torch.manual_seed(0)")
    body += "\ndef test_fails():\n    assert float(draw(fresh_generator(), 1)) > 9, 'DREW too little'\n"
    printed, said = run(tmp_path, "--seeds", "3", "-n", "2", body=body)  # workers take the same seeds
    for case in "ab":
        values = [line for line in printed if line.startswith(f"DREW {case}")]
        assert len(set(values)) == 3, said
    assert printed.count("DREW nothing") == 1, said
    failed = [int(line.split("--seed ")[1].split()[0]) for line in said.splitlines() if "--seed " in line]
    assert max(failed) - min(failed) == 2, said
    repeats = [line for line in said.splitlines() if line.startswith("python -m pytest") and "test_fails" in line]
    assert len(repeats) == 3 and "3 failed" in said
    seed = repeats[1].split("--seed ")[1].split()[0]
    _, first = run(tmp_path, "--seed", seed, "-k", "fails", body=body)
    wrong, shown = (
        [line for line in text.splitlines() if line.startswith("E") and "> 9" in line] for text in (said, first)
    )
    assert len(wrong) == 3 and len(shown) == 1 and shown[0] in wrong, said + first


def test_a_generator_of_its_own_seed_is_left_alone() -> None:
    assert torch.equal(draw(fresh_generator(5), 3), draw(torch.Generator().manual_seed(5), 3))
