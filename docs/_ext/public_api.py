"""``.. public:: MODULE``: everything in a module's ``__all__``, so that the API reference cannot fall behind it.

Documents functions and classes under the name of the module that exports them, grouped by the module that defines them,
which is a family's. A constant shows its value where that is short. A Markdown page needs ``{eval-rst}`` around it.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections import defaultdict
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import nested_parse_with_titles
from torch.nn import Module

SHORT = 200  # characters of a constant's value that are shown


class Public(SphinxDirective):
    """Documents the public names of a module."""

    required_arguments = 1
    option_spec = {"grouped": lambda _: True}  # noqa: RUF012  (as docutils declares it)

    def run(self) -> list[nodes.Node]:
        module_name = self.arguments[0]
        module = importlib.import_module(module_name)
        groups: dict[str, list[str]] = defaultdict(list)
        for name in sorted(module.__all__, key=str.lower):
            value = getattr(module, name)
            if not inspect.ismodule(value):
                groups[family(value) if "grouped" in self.options else ""].append(name)
        lines = [f".. py:currentmodule:: {module_name}", ""]
        for group in sorted(groups):
            if group:
                lines += [f".. rubric:: {group}", ""]
            for name in groups[group]:
                lines += [*_entry(module_name, name, getattr(module, name)), ""]
        rst = StringList(lines, source=self.env.doc2path(self.env.docname))
        node = nodes.section()
        node.document = self.state.document
        nested_parse_with_titles(self.state, rst, node)
        return node.children


def family(value: Any) -> str:
    """Returns the last part of the module that defines an object: a family's name for operators and modules."""
    return getattr(value, "__module__", "").rsplit(".", 1)[-1]


def _entry(module: str, name: str, value: Any) -> list[str]:
    full = f"{module}.{name}"
    if inspect.isclass(value):
        # What a base class of the package gives, such as `save`, is public here; what torch gives is in its own docs.
        inherited = ["   :inherited-members: Module"] if issubclass(value, Module) else []
        return [f".. autoclass:: {full}", "   :members:", *inherited, *_options(value)]
    if inspect.isroutine(value):
        return [f".. autofunction:: {full}"]
    shown = repr(value)
    entry = [f".. py:data:: {name}", f"   :type: {type(value).__name__}"]
    if len(shown) <= SHORT:
        entry.append(f"   :value: {shown}")
    elif hasattr(value, "__len__"):
        names = [getattr(item, "id", item) for item in list(value)[:3]]
        entry += ["", f"   {len(value)} entries: {', '.join(map(str, names))}, …"]
    return entry


def _options(kind: type) -> list[str]:
    """Describes the fields of a dataclass that carry a help text, with their defaults."""
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    described = [field for field in fields if "help" in field.metadata]
    lines = ["", "   Options:", ""] if described else []
    for field in described:
        choices = field.metadata.get("choices")
        allowed = f" One of {', '.join(map(str, choices))}." if choices else ""
        lines.append(f"   * ``{field.name}``, by default ``{field.default!r}``: {field.metadata['help']}.{allowed}")
    return lines


class PresetTable(SphinxDirective):
    """Lists the ablations of XLRB with what each changes and its published accuracy."""

    def run(self) -> list[nodes.Node]:
        from xlayer_systems.xlrb import ABLATIONS, PUBLISHED_ACCURACY

        lines = ["| preset | changes | published |", "|---|---|---|"]
        for ablation in ABLATIONS:
            changes = ", ".join(f"`{key}={value!r}`" for key, value in ablation.changes.items()) or "the base itself"
            accuracy = PUBLISHED_ACCURACY.get(ablation.id)
            lines.append(f"| {ablation.id} | {changes} | {'–' if accuracy is None else f'{accuracy:.4f}'} |")
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the directives."""
    app.add_directive("public", Public)
    app.add_directive("preset-table", PresetTable)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
