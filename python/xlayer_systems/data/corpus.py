"""The embedded corpus: the source of the Python standard library on this machine.

No download is needed, it is real text written by people, and it is the same for everyone with the same Python
version. What depends on how an interpreter was packaged is left out (site packages, test suites, build configuration),
so is what is a table rather than text (``encodings``, ``pydoc_data``).

One split serves every task: a file belongs to validation when the hash of its path inside the library says so. The
split thus depends on nothing but the path, so a backbone that was pretrained under one patch release has not seen the
validation files of another.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import platform
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from xlayer_systems.errors import UserError

EXCLUDED_FOLDERS = frozenset(
    {
        "__pycache__", "__phello__", "dist-packages", "encodings", "ensurepip", "idle_test", "lib-dynload",
        "pydoc_data", "site-packages", "test", "tests", "turtledemo",
    }
)  # fmt: skip
EXCLUDED_FILES = frozenset({"sitecustomize.py", "usercustomize.py"})
VALIDATION_PERCENT = 20
# Chosen once, by counting docstrings only: the first number with which each of the ten largest packages of
# Python 3.11 (and the next two) has between 10 % and 36 % of its docstrings in validation.
SPLIT_SALT = "xlayer-6174"


@dataclass(frozen=True)
class Definition:
    """Holds a module, class or function of the corpus.

    ``docstring`` is cleaned and "" where there is none; ``body`` is a function's source below its signature and
    docstring, dedented, and "" for modules and classes.
    """

    path: str
    name: str
    docstring: str
    body: str


@dataclass(frozen=True)
class SourceFile:
    """Holds one file of the library: its path relative to the library (with "/") and its text."""

    path: str
    text: str

    @property
    def package(self) -> str:
        """Returns the top-level package, or "" for a module that stands alone."""
        return self.path.split("/")[0] if "/" in self.path else ""

    @property
    def split(self) -> str:
        """Returns ``train`` or ``validation``, from the hash of the path alone."""
        return split_of(self.path)

    @cached_property
    def definitions(self) -> tuple[Definition, ...]:
        """Returns everything that is defined in the file, in its order; () when this Python cannot parse it."""
        try:
            tree = ast.parse(self.text)
        except SyntaxError:
            return ()
        return tuple(_definitions(self.path, tree, self.text.splitlines()))


@dataclass(frozen=True)
class Corpus:
    """Holds all files in the order of their paths, with a hash over paths and contents."""

    files: tuple[SourceFile, ...]
    hash: str

    def of(self, split: str) -> tuple[SourceFile, ...]:
        """Returns the files of one split."""
        return tuple(file for file in self.files if file.split == split)


def split_of(path: str, salt: str = SPLIT_SALT) -> str:
    """Returns the split of a library path such as ``"asyncio/events.py"``."""
    digest = hashlib.sha256(f"{salt}:{path}".encode()).digest()
    return "validation" if int.from_bytes(digest[:8], "big") % 100 < VALIDATION_PERCENT else "train"


@lru_cache(maxsize=2)
def load_corpus(root: Path | None = None) -> Corpus:
    """Reads the standard library below ``root`` (default: that of the running interpreter)."""
    folder = root or Path(sysconfig.get_path("stdlib"))
    files = tuple(SourceFile(path, text) for path, text in _read_sources(folder))
    if not files:
        version = platform.python_version()
        raise UserError(f"no Python source found in {folder}; Python {version} needs its standard library as .py files")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.path}\0{hashlib.sha256(file.text.encode()).hexdigest()}\n".encode())
    return Corpus(files, digest.hexdigest()[:16])


def _read_sources(root: Path) -> Iterator[tuple[str, str]]:
    paths = ((path.relative_to(root).as_posix(), path) for path in root.rglob("*.py"))
    for name, path in sorted(paths):
        if not _is_excluded(name):
            try:
                yield name, path.read_text("utf-8")
            except UnicodeDecodeError:
                continue


def _is_excluded(name: str) -> bool:
    *folders, file = name.split("/")
    if file in EXCLUDED_FILES or file.startswith("_sysconfigdata"):
        return True
    return any(folder in EXCLUDED_FOLDERS or folder.startswith("config-") for folder in folders)


def _definitions(path: str, tree: ast.Module, lines: list[str]) -> Iterator[Definition]:
    pending: list[tuple[str, ast.AST]] = [(path, tree)]
    while pending:
        name, node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = _docstring(node)
            body = "" if isinstance(node, ast.Module | ast.ClassDef) else _body(node, lines, bool(docstring))
            yield Definition(path, name, docstring, body)
        # Statements only: definitions do not hide inside expressions, and this is several times faster than ast.walk.
        children = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.ExceptHandler)]
        pending.extend((f"{name}.{getattr(child, 'name', '')}", child) for child in reversed(children))


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return inspect.cleandoc(first.value.value)
    return ""


def _body(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str], has_docstring: bool) -> str:
    statements = node.body[1:] if has_docstring else node.body
    if not statements or statements[0].lineno == node.lineno:
        return ""
    return textwrap.dedent("\n".join(lines[statements[0].lineno - 1 : node.end_lineno])).strip()
