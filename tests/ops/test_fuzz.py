"""The fuzzers (tests/fuzz): a batch of each kind of call, every operator among them, and planted faults that they find.

`make soak` makes a million calls; under sanitizers `test_sanitizers.py` makes some thousands.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fuzz import calls, recipes
from xlayer_ext import _library

ROOT = Path(__file__).parents[2]
PLUGIN = "tests/fuzz/planted.py"

pytestmark = [
    pytest.mark.cpu_kernels,
    pytest.mark.skipif(not _library.LOADED, reason=f"nothing to fuzz: {_library.REASON}"),
]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs `python tests/fuzz` with these words."""
    command = [sys.executable, "tests/fuzz", *words]
    told = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("mode", "count"),
    [("hostile", 4000), ("functional", 2000), ("valid", 500), ("functional-valid", 500), ("racing", 40)],
)
def test_no_call_shows_a_fault(mode: str, count: int) -> None:
    child = run("--mode", mode, "--calls", str(count), "--seed", "1", "--seconds", "120")
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    assert child.stdout.startswith(f"{count} calls") or "much asked for" in child.stdout, child.stdout


def test_every_operator_and_function_has_a_recipe() -> None:
    lacking = [name for name in recipes.operators() if recipes.recipe_of(name) is None]
    assert not lacking, f"a recipe in tests/fuzz/recipes.py is missing for {', '.join(lacking)}"
    lacking = [name for name in recipes.functions() if name not in recipes.FUNCTIONS]
    assert not lacking, f"a recipe in tests/fuzz/recipes.py is missing for {', '.join(lacking)}"
    forward = {name for name in recipes.operators() if not name.endswith("_backward")}
    assert forward == set(recipes.OPERATORS) == set(calls.DISTURBED)


def test_recipes_name_the_arguments_of_the_schemas() -> None:
    for name in recipes.operators():
        drawn = recipes.draw_operator(name, recipes.Draw.of(calls.Random(0), hostile=False))
        schema = getattr(torch.ops.xlayer, name).default._schema
        assert drawn is not None and {a.name for a in schema.arguments} <= set(drawn), name


def test_a_call_depends_on_its_seed_and_number_alone() -> None:
    def described(maker: calls.Maker, numbers: list[int]) -> dict[int, str]:
        return {number: maker.make(number).description() for number in numbers}

    numbers = list(range(150))
    first = described(calls.Maker(3), numbers)
    assert described(calls.Maker(3), numbers[::-1]) == first
    other = described(calls.Maker(4), numbers)
    assert sum(other[number] != first[number] for number in numbers) > 140


# Planted faults (fuzz/planted.py) and how each is reported.
REPORTS = {
    "crash": "crash: planted_crash: SIGSEGV",
    "abort": "crash: planted_abort: SIGABRT",
    "hang": "hang: planted_hang: more than 1 s",
    "silent": "message: planted_silent: RuntimeError: aoti_torch_empty() API call failed",
    "odd_error": "error: planted_odd_error: LookupError: x",
    "reads_beyond": "crash: planted_reads_beyond: SIGSEGV",
    "wrong": "wrong: planted_wrong: output 0 is wrong by",
}


@pytest.fixture(scope="module")
def reports() -> dict[str, list[str]]:
    """Returns the report of each planted fault: how the call ended, the call, and how to repeat it."""
    lines = []
    for mode, faults in {"hostile": list(REPORTS)[:5], "valid": list(REPORTS)[5:]}.items():
        words = [word for fault in faults for word in ("--op", f"planted_{fault}")]
        child = run("--plugin", PLUGIN, "--patience", "1", "--mode", mode, "--calls", "16", *words)
        assert child.returncode == 1, child.stdout + child.stderr
        lines += child.stdout.splitlines()
    found = {}
    for fault, told in REPORTS.items():
        at = [index for index, line in enumerate(lines) if line.startswith(told)]
        assert len(at) == 1, f"{fault} was not reported once:\n" + "\n".join(lines)
        found[fault] = lines[at[0] : at[0] + 3]
    return found


@pytest.mark.parametrize("fault", REPORTS)
def test_planted_fault_is_reported(reports: dict[str, list[str]], fault: str) -> None:
    _, call, repeat = reports[fault]
    assert call.strip().startswith(f"torch.ops.xlayer.planted_{fault}(x=<")
    assert repeat.strip().startswith("repeat: python tests/fuzz --seed 0 --call ")


@pytest.mark.parametrize("fault", ["abort", "wrong"])
def test_report_can_be_repeated(reports: dict[str, list[str]], fault: str) -> None:
    _, call, repeat = reports[fault]
    _, program, *words = shlex.split(repeat.split("repeat: ")[1])
    assert program == "tests/fuzz"
    child = run(*words)
    assert child.returncode != 0
    assert child.stdout.splitlines()[0].strip() == call.strip()


def test_calls_beside_a_fault_are_made() -> None:
    """A crash ends its process; the calls after it are made in another."""
    child = run("--plugin", PLUGIN, "--op", "planted_crash", "--op", "masked_mean", "--calls", "30")
    assert child.returncode == 1
    assert "30 calls" in child.stdout and "crash × " in child.stdout, child.stdout


def test_nothing_to_call_is_an_error() -> None:
    child = run("--mode", "racing", "--op", "info_nce_loss")
    assert child.returncode == 2
    assert "nothing to call" in child.stderr and "Traceback" not in child.stderr, child.stderr
