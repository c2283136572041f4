"""The packages of `xlayer_systems` import in one direction, and no module imports itself in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import xlayer_systems

ROOT = Path(xlayer_systems.__file__).parent
SYSTEMS = ("xlrb", "hyper_lm", "telepathy", "bypass", "lformer", "pretraining")
# What a package may import, beside itself and what is further right.
LAYERS = ("cli", "profiling", "registry", SYSTEMS, "runs", "hf", "training", "data", "reporting", "errors")
RANK = {
    name: rank for rank, layer in enumerate(LAYERS) for name in ((layer,) if isinstance(layer, str) else layer)
}  # fmt: skip
MAX_ENTRIES = 16


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_of(path): path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"}


def imports(name: str) -> set[str]:
    """The modules of `xlayer_systems` that a module imports, anywhere in it but for type checkers."""
    tree = ast.parse(MODULES[name].read_text())
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if node in skipped or not isinstance(node, ast.ImportFrom):
            continue
        source = f"{package}.{node.module or ''}".rstrip(".") if node.level else (node.module or "")
        if not node.level and source.split(".")[0] != "xlayer_systems":
            continue
        source = source.removeprefix("xlayer_systems").removeprefix(".")
        for alias in node.names:
            inner = f"{source}.{alias.name}".removeprefix(".")
            found.add(inner if inner in MODULES else source)
    return found - {"", name}


def test_the_top_level_is_small() -> None:
    entries = {path.name for path in ROOT.iterdir()} - {"__init__.py", "py.typed", "__pycache__"}
    assert len(entries) <= MAX_ENTRIES and {name.removesuffix(".py") for name in entries} - {"assets"} == set(RANK)


def test_imports_point_down() -> None:
    wrong = []
    for name in MODULES:
        mine = name.split(".")[0]
        for other in imports(name):
            theirs = other.split(".")[0]
            if mine != theirs and RANK[mine] >= RANK[theirs]:
                wrong.append(f"{name} imports {other}")
    assert not wrong, wrong


def test_no_circles() -> None:
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in imports(name):
                if not (name.startswith(f"{other}.") or other == name):  # a package runs before its modules anyway
                    visit(other, (*above, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())
