"""The house: layers without a fault (tools/house.py), each kind found where it is planted, and docstrings' openings."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tools import house

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkout() -> house.House:
    return house.read(ROOT)


@pytest.mark.parametrize("package", [name for name, folder in house.PACKAGES.items() if (ROOT / folder).exists()])
def test_a_package_of_the_checkout_has_no_fault(checkout: house.House, package: str) -> None:
    found = [str(fault) for fault in house.faults(checkout) if any(m.split(".")[0] == package for m in fault.modules)]
    assert not found, "\n".join(found)


def test_every_layer_has_entries_of_its_own() -> None:
    entries = [entry for _, entries in house.LAYERS for entry in entries]
    assert len(set(entries)) == len(entries)
    for at, (_, names) in enumerate(house.LAYERS):
        assert all(house.layer_of(name.removesuffix(".*")) == at for name in names)


# ---- planted faults --------------------------------------------------------------------------------------------------

SOUND = {
    "xlayer_ext/__init__.py": "from xlayer_ext import functional\n",
    "xlayer_ext/functional/__init__.py": "from xlayer_ext.functional.hdim import attention\n",
    "xlayer_ext/functional/hdim.py": "from xlayer_ext import reference\nfrom .other import helper\n",
    "xlayer_ext/functional/other.py": "helper = 1\n",
    "xlayer_ext/reference/__init__.py": "import math\n",
    "python/xlayer_systems/__init__.py": "",
    "python/xlayer_systems/cli.py": "from xlayer_systems import registry\n",
    "python/xlayer_systems/registry.py": "from xlayer_systems.xlrb.system import System\n",
    "python/xlayer_systems/xlrb/__init__.py": "",
    "python/xlayer_systems/xlrb/system.py": "from xlayer_systems.runs.execute import x\ny = getattr(x, 'name')\n",
    "python/xlayer_systems/runs/__init__.py": "",
    "python/xlayer_systems/runs/execute.py": "x = 'a'\ny = getattr(x, x)\n",
}


def tree(root: Path, **planted: str) -> list[str]:
    """Writes a sound tree with the planted files; returns its faults."""
    for name, text in (SOUND | {name.replace("__", "/") + ".py": text for name, text in planted.items()}).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return [str(fault) for fault in house.faults(house.read(root))]


def test_a_sound_tree_has_no_fault(tmp_path: Path) -> None:
    assert tree(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("from xlayer_ext.functional.hdim import attention\n", "xlayer_ext.functional.hdim"),
        ("import xlayer_ext.functional.hdim as hdim\n", "xlayer_ext.functional.hdim"),
        ("from xlayer_ext import functional\n", "xlayer_ext.functional"),
        ("from ..functional import hdim\n", "xlayer_ext.functional.hdim"),
        ("import importlib\nimportlib.import_module('xlayer_ext.functional.hdim')\n", "xlayer_ext.functional.hdim"),
        ("if True:\n    from xlayer_ext.functional import hdim\n", "xlayer_ext.functional.hdim"),
    ],
)
def test_an_upward_import_is_found(tmp_path: Path, text: str, where: str) -> None:
    found = tree(tmp_path, xlayer_ext__reference__hdim=text)
    line = text.count("\n")
    assert found == [
        f"upward import: xlayer_ext.reference.hdim:{line} (reference) imports {where} (functional API)",
    ]


def test_an_upward_import_inside_a_function_is_found(tmp_path: Path) -> None:
    text = "def run():\n    from xlayer_systems.registry import SYSTEMS\n    return SYSTEMS\n"
    found = tree(tmp_path, python__xlayer_systems__runs__sweep=text)
    assert found == [
        "upward import: xlayer_systems.runs.sweep:2, inside a function, (systems: runs) imports "
        "xlayer_systems.registry (systems: registry)"
    ]


def test_imports_for_types_alone_do_not_count(tmp_path: Path) -> None:
    text = "import typing\nif typing.TYPE_CHECKING:\n    from xlayer_systems import cli\nelse:\n    cli = None\n"
    assert tree(tmp_path, python__xlayer_systems__runs__sweep=text) == []


def test_a_circle_is_found(tmp_path: Path) -> None:
    found = tree(
        tmp_path,
        python__xlayer_systems__runs__a="from xlayer_systems.runs import b\n",
        python__xlayer_systems__runs__b="from xlayer_systems.runs.c import c\n",
        python__xlayer_systems__runs__c="import xlayer_systems.runs.a\n",
        python__xlayer_systems__runs__d="import xlayer_systems.runs.a\n",
    )
    assert found == ["circle: xlayer_systems.runs.a ⇄ xlayer_systems.runs.b ⇄ xlayer_systems.runs.c"]


def test_a_circle_that_functions_close_is_found_apart(tmp_path: Path) -> None:
    found = tree(
        tmp_path,
        python__xlayer_systems__runs__a="from xlayer_systems.runs import b\n",
        python__xlayer_systems__runs__b="async def run():\n    import xlayer_systems.runs.a\n",
    )
    assert found == ["circle through imports inside functions: xlayer_systems.runs.a ⇄ xlayer_systems.runs.b"]


@pytest.mark.parametrize("call", ["getattr(x, 'begin_step', None)", "hasattr(x, 'usage')"])
def test_a_probe_is_found(tmp_path: Path, call: str) -> None:
    found = tree(tmp_path, python__xlayer_systems__runs__sweep=f"x = 1\ny = {call}\n")
    assert found == [f"probe: xlayer_systems.runs.sweep:2 calls {call}"]


def test_a_module_without_a_layer_and_a_crowded_top_level_are_found(tmp_path: Path) -> None:
    names = [f"room{at}" for at in range(house.MAX_ROOMS)]
    found = tree(tmp_path, **{f"python__xlayer_systems__{name}": "" for name in names})
    assert "no layer: xlayer_systems.room0 belongs to none of the layers" in found
    assert (
        found[-1] == f"top level: xlayer_systems has {len(names) + 4} entries at its top level, at most 16 are allowed"
    )


def test_the_command_prints_the_layers_and_ends_with_1_for_a_fault(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.house", "--root", str(tmp_path)]
    tree(tmp_path)
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "  functional API → reference: 1" in run.stdout and run.stdout.endswith("no faults\n")
    assert "  systems: runs: xlayer_systems.runs, xlayer_systems.runs.execute" in run.stdout
    tree(tmp_path, xlayer_ext__reference__hdim="from xlayer_ext import functional\n")
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and "upward import: xlayer_ext.reference.hdim:1" in run.stdout


# ---- docstrings ------------------------------------------------------------------------------------------------------


def wrong_openings(source: str) -> list[str]:
    """Lists public docstrings that open with a word that begins no statement; "Whether" is for functions of a bool."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        name = "module" if isinstance(node, ast.Module) else node.name
        text = ast.get_docstring(node)
        if not text or name.startswith("_"):
            continue
        word = text.split()[0].strip(",:;.")
        is_predicate = (
            isinstance(node, ast.FunctionDef) and node.returns is not None and ast.unparse(node.returns) == "bool"
        )
        if word in ("As", "How", "Of", "That", "What") or (word == "Whether" and not is_predicate):
            wrong.append(f"{name}: {text.splitlines()[0]}")
    return wrong


@pytest.mark.parametrize("folder", ["xlayer_ext", "python/xlayer_systems", "benchmarks", "tools"])
def test_docstrings_open_with_a_statement(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    found = [f"{file.relative_to(ROOT)}: {line}" for file in files for line in wrong_openings(file.read_text())]
    assert files and not found, "\n".join(found)


def test_a_docstring_without_a_statement_is_found() -> None:
    assert wrong_openings('"""What a module holds."""') == ["module: What a module holds."]
    assert wrong_openings('class A:\n    """Of all."""') == ["A: Of all."]
    assert wrong_openings('def f() -> int:\n    """Whether so."""') == ["f: Whether so."]
    assert wrong_openings('def f() -> bool:\n    """Whether so."""\n\n\ndef _g():\n    """As f."""') == []
