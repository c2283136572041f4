"""Checks that imports point down the layers of the project: `python -m tools.house [--root DIR]`.

Prints the layers with their modules and the imports between them, and then every fault; exits with 1 if there is one:

- an import of a module in a higher layer, at the top of a file or inside a function
- a circle of imports: by those at the top of files, and by those inside functions as well
- a module that belongs to no layer
- a call of `getattr` or `hasattr` with a constant name where systems are driven, which hides a protocol
- more entries at the top level of xlayer_systems than one can keep in mind

Imports below `if TYPE_CHECKING:` do not count, as nothing runs them.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "benchmarks": "benchmarks",
    "xlayer_ext": "xlayer_ext",
    "xlayer_server": "python/xlayer_server",
    "xlayer_systems": "python/xlayer_systems",
}

# From the top down. A module may import those of its own layer and of all below. An entry that ends with `.*` covers
# a package and all in it, any other one a single module; of several that cover a module the longest counts.
LAYERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("benchmarks: command", ("benchmarks.*",)),
    ("benchmarks: report", ("benchmarks.report.*",)),
    ("benchmarks: GPU tools", ("benchmarks.gpu.*",)),
    ("benchmarks: cases", ("benchmarks.cases.*",)),
    ("benchmarks: harness", ("benchmarks.harness.*",)),
    ("run platform", ("xlayer_server.*",)),
    ("systems: command", ("xlayer_systems.cli.*", "xlayer_systems.__main__")),
    ("systems: profiling", ("xlayer_systems.profiling.*",)),
    ("systems: registry", ("xlayer_systems.registry.*",)),
    (
        "systems",
        (
            "xlayer_systems.bypass.*",
            "xlayer_systems.hyper_lm.*",
            "xlayer_systems.lformer.*",
            "xlayer_systems.pretraining.*",
            "xlayer_systems.telepathy.*",
            "xlayer_systems.xlrb.*",
        ),
    ),
    ("systems: runs", ("xlayer_systems.runs.*",)),
    ("systems: training", ("xlayer_systems.hf.*", "xlayer_systems.training.*")),
    ("systems: data", ("xlayer_systems.data.*",)),
    ("systems: reporting", ("xlayer_systems", "xlayer_systems.errors", "xlayer_systems.reporting.*")),
    ("package", ("xlayer_ext", "xlayer_ext.info", "xlayer_ext.testing")),
    ("integrations", ("xlayer_ext.integrations.*",)),
    ("modules", ("xlayer_ext.nn.*",)),
    ("functional API", ("xlayer_ext.functional.*",)),
    ("registration", ("xlayer_ext._ops.*",)),
    ("Triton kernels", ("xlayer_ext.triton.*",)),
    ("choice of backend", ("xlayer_ext._backend", "xlayer_ext._library")),
    ("reference", ("xlayer_ext.reference.*",)),
    ("types", ("xlayer_ext.memory", "xlayer_ext.types")),
)

ROOMS_OF = "xlayer_systems"
MAX_ROOMS = 16
NO_PROBES_IN = (
    "xlayer_systems.cli.*",
    "xlayer_systems.registry.*",
    "xlayer_systems.runs.*",
    "xlayer_systems.training.*",
)


@dataclass(frozen=True)
class Import:
    """One import of a module of the project: its line, and whether it stands inside a function."""

    source: str
    target: str
    line: int
    inside: bool


@dataclass(frozen=True)
class Probe:
    """A call of `getattr` or `hasattr` with a constant name."""

    source: str
    line: int
    call: str


@dataclass(frozen=True)
class Fault:
    """A broken rule, and the modules that break it."""

    kind: str
    text: str
    modules: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


@dataclass
class House:
    """The modules of a checkout, by name, with their imports and probes."""

    files: dict[str, Path]
    imports: list[Import] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)


# ---- reading ---------------------------------------------------------------------------------------------------------


def read(root: Path) -> House:
    """Reads all Python files of the packages that the checkout has."""
    files = {}
    for package, folder in PACKAGES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            files[".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])] = path
    house = House(files)
    for name, path in files.items():
        reader = _Reader(name, path.name == "__init__.py", files)
        reader.visit(ast.parse(path.read_text(), str(path)))
        house.imports += reader.imports
        house.probes += reader.probes
    return house


class _Reader(ast.NodeVisitor):
    """Collects the imports and probes of one module."""

    def __init__(self, name: str, is_package: bool, known: Mapping[str, Path]) -> None:
        self._name, self._known = name, known
        self._package = name if is_package else name.rpartition(".")[0]
        self._functions = 0
        self.imports: list[Import] = []
        self.probes: list[Probe] = []

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        self._functions += 1
        self.generic_visit(node)
        self._functions -= 1

    visit_AsyncFunctionDef = visit_FunctionDef
    visit_Lambda = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        test = node.test
        if (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
            isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
        ):
            for statement in node.orelse:
                self.visit(statement)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            parts = self._package.split(".")
            base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [base])])
        for alias in node.names:
            self._add(f"{base}.{alias.name}", node.lineno)

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        called = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
        constants = [argument.value if isinstance(argument, ast.Constant) else None for argument in node.args]
        if called in ("getattr", "hasattr") and len(constants) > 1 and isinstance(constants[1], str):
            self.probes.append(Probe(self._name, node.lineno, ast.unparse(node)))
        if called == "import_module" and constants and isinstance(constants[0], str):
            self._add(constants[0], node.lineno)
        self.generic_visit(node)

    def _add(self, target: str, line: int) -> None:
        """Adds the module that is the longest known prefix of the name: `package.module` of `package.module.name`."""
        while target and target not in self._known:
            target = target.rpartition(".")[0]
        one = Import(self._name, target, line, self._functions > 0)
        if target and target != self._name and one not in self.imports:
            self.imports.append(one)


# ---- judging ---------------------------------------------------------------------------------------------------------


def covers(entry: str, name: str) -> bool:
    """Tells whether an entry of the table covers a module."""
    package = entry.removesuffix(".*")
    return name == package or (entry != package and name.startswith(package + "."))


def layer_of(name: str) -> int | None:
    """Returns the index of the module's layer, counted from the top, or None where the table has none for it."""
    found = [(len(entry), at) for at, (_, entries) in enumerate(LAYERS) for entry in entries if covers(entry, name)]
    return max(found)[1] if found else None


def faults(house: House) -> list[Fault]:
    """Returns all that breaks a rule."""
    return [
        *_without_layer(house),
        *_upward(house),
        *_circles(house),
        *_probes(house),
        *_rooms(house),
    ]


def _without_layer(house: House) -> Iterator[Fault]:
    for name in house.files:
        if layer_of(name) is None:
            yield Fault("no layer", f"{name} belongs to none of the layers", (name,))


def _upward(house: House) -> Iterator[Fault]:
    for one in house.imports:
        source, target = layer_of(one.source), layer_of(one.target)
        if source is not None and target is not None and target < source:
            where = f"{one.source}:{one.line}" + (", inside a function," if one.inside else "")
            text = f"{where} ({LAYERS[source][0]}) imports {one.target} ({LAYERS[target][0]})"
            yield Fault("upward import", text, (one.source,))


def _circles(house: House) -> Iterator[Fault]:
    outer = components((one.source, one.target) for one in house.imports if not one.inside)
    for circle in outer:
        yield Fault("circle", " ⇄ ".join(circle), tuple(circle))
    for circle in components((one.source, one.target) for one in house.imports):
        if circle not in outer:
            yield Fault("circle through imports inside functions", " ⇄ ".join(circle), tuple(circle))


def components(edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Returns the strongly connected components of more than one module, sorted."""
    after: dict[str, set[str]] = defaultdict(set)
    for source, target in edges:
        after[source].add(target)
    reach = {name: _reachable(name, after) for name in list(after)}
    found = {tuple(sorted(m for m in reach[name] if name in reach.get(m, ()))) for name in reach if name in reach[name]}
    return [list(circle) for circle in sorted(found) if len(circle) > 1]


def _reachable(start: str, after: Mapping[str, set[str]]) -> set[str]:
    """Returns the modules that one or more imports lead to."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = after.get(waiting.pop(), set()) - found
        found |= new
        waiting += new
    return found


def _probes(house: House) -> Iterator[Fault]:
    for probe in house.probes:
        if any(covers(entry, probe.source) for entry in NO_PROBES_IN):
            yield Fault("probe", f"{probe.source}:{probe.line} calls {probe.call}", (probe.source,))


def rooms(house: House) -> list[str]:
    """Returns the modules and packages at the top level of the systems."""
    inside = (name.split(".") for name in house.files)
    return sorted({parts[1] for parts in inside if parts[0] == ROOMS_OF and len(parts) > 1 and parts[1] != "__main__"})


def _rooms(house: House) -> Iterator[Fault]:
    found = rooms(house)
    if len(found) > MAX_ROOMS:
        text = f"{ROOMS_OF} has {len(found)} entries at its top level, at most {MAX_ROOMS} are allowed"
        yield Fault("top level", text, (ROOMS_OF,))


# ---- printing --------------------------------------------------------------------------------------------------------


def described(house: House) -> list[str]:
    """Returns the lines that show the layers, the imports between them, and the top level of the systems."""
    members: dict[int, list[str]] = defaultdict(list)
    for name in house.files:
        if (at := layer_of(name)) is not None:
            members[at].append(name)
    lines = ["layers, from the top:"]
    lines += [f"  {LAYERS[at][0]}: {', '.join(members[at])}" for at in sorted(members)]
    pairs: Counter[tuple[int, int]] = Counter()
    for one in house.imports:
        source, target = layer_of(one.source), layer_of(one.target)
        if source is not None and target is not None and source != target:
            pairs[source, target] += 1
    lines += ["imports between layers:"]
    lines += [f"  {LAYERS[a][0]} → {LAYERS[b][0]}: {count}" for (a, b), count in sorted(pairs.items())]
    return [*lines, f"top level of {ROOMS_OF}: {len(rooms(house))} of at most {MAX_ROOMS}: {', '.join(rooms(house))}"]


def main(arguments: Sequence[str]) -> int:
    """Prints the layers and the faults of a checkout; returns 1 if it has faults, else 0."""
    parser = argparse.ArgumentParser(prog="python -m tools.house", description=__doc__.partition("\n")[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the checkout (default: this one)")
    options = parser.parse_args(arguments)
    house = read(options.root)
    print("\n".join(described(house)))
    found = faults(house)
    print("\n".join(map(str, found)) if found else "no faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
