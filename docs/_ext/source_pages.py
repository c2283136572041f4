"""Links to source files, which the site shows as pages of its own, so that it is whole without a network.

``{source}`hyper/cuda-backward``` links to a file of `source_table.SOURCES`; ``{source}`text <hyper/cuda-backward>```
gives the link another text. ``{kernel-files} hyper`` lists what a family has in csrc, as it is found there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound
from source_table import FAMILIES, LAYERS, SOURCES
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective, SphinxRole

ROOT = Path(__file__).parents[2]
SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}
LONGEST = 400_000  # characters of a file that is shown


class SourceRole(SphinxRole):
    """Links to a source file by its name in the table."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        titled = re.fullmatch(r"(.+?)\s*<([^<>]+)>", self.text, re.DOTALL)
        title, key = (titled[1], titled[2]) if titled else (None, self.text)
        if key not in SOURCES:
            raise ExtensionError(f"{self.env.docname}: {key} is not in source_table.SOURCES")
        return [_link(self.env, SOURCES[key], title)], []


class KernelFiles(SphinxDirective):
    """Lists the files of a family in csrc, layer by layer, each with the first sentence of its comment."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        listed = nodes.definition_list()
        for layer, folder in LAYERS.items():
            items = nodes.bullet_list()
            for path in files_of(self.arguments[0], folder):
                paragraph = nodes.paragraph("", "", _link(self.env, str(path.relative_to(ROOT)), None))
                paragraph += nodes.Text(f": {said}" if (said := first_sentence(path)) else "")
                items += nodes.list_item("", paragraph)
            if items.children:
                definition = nodes.definition("", items)
                listed += nodes.definition_list_item("", nodes.term("", f"{layer}, {folder}/"), definition)
        if not listed.children:
            raise ExtensionError(f"csrc has no files of the family {self.arguments[0]}")
        return [listed]


def files_of(family: str, folder: str) -> list[Path]:
    """Lists the files of a family below ``folder``: in a folder of its name, or named for it."""
    names = FAMILIES[family]
    found = (path for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)
    below = [path for path in found if path.parent.name in names or path.name.startswith(names)]
    return sorted(below, key=lambda path: (path.parent, path.name))


def first_sentence(path: Path) -> str:
    """Returns the first sentence of the comment that a file begins with."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("//"):
            break
        lines.append(line.removeprefix("//").strip())
    text = " ".join(lines)
    end = re.search(r"[.:;](?=\s|$)", text)
    return text[: end.start()] + "." if end else text


def _link(env: Any, path: str, title: str | None) -> nodes.reference:
    """Makes a link whose target depends on the builder, which sets it when a page is written."""
    if not (ROOT / path).is_file():
        raise ExtensionError(f"{env.docname} names {path}, which does not exist")
    shown = getattr(env, "xlayer_sources", None)
    if shown is None:
        shown = env.xlayer_sources = {}
    shown.setdefault(env.docname, set()).add(path)
    text = nodes.Text(title) if title else nodes.literal(path, "/".join(Path(path).parts[-2:]))
    return nodes.reference("", "", text, internal=True, xlayer_source=path, reftitle=path)


def _resolve(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    for node in doctree.findall(nodes.reference):
        if "xlayer_source" in node:
            page = f"source/{node['xlayer_source']}"
            node["refuri"] = app.builder.get_relative_uri(docname, page) if app.builder.format == "html" else page


def _purge(_app: Sphinx, env: Any, docname: str) -> None:
    getattr(env, "xlayer_sources", {}).pop(docname, None)


def _merge(_app: Sphinx, env: Any, _docnames: list[str], other: Any) -> None:
    env.xlayer_sources = {**getattr(env, "xlayer_sources", {}), **getattr(other, "xlayer_sources", {})}


def _pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yields one page per source file that any page links to."""
    named = getattr(app.env, "xlayer_sources", {})
    formatter = HtmlFormatter(linenos="inline", lineanchors="L", wrapcode=True)
    for path in sorted(set().union(*named.values())):
        text = (ROOT / path).read_text()[:LONGEST]
        try:
            lexer = get_lexer_for_filename("kernel.cpp" if path.endswith((".cu", ".cuh")) else path)
        except ClassNotFound:
            lexer = get_lexer_for_filename("rows.txt")
        body = f"<h1><code>{path}</code></h1>\n{highlight(text, lexer, formatter)}"
        yield f"source/{path}", {"title": path, "body": body}, "page.html"


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the role, the directive and the pages."""
    app.add_role("source", SourceRole())
    app.add_directive("kernel-files", KernelFiles)
    app.connect("doctree-resolved", _resolve)
    app.connect("env-purge-doc", _purge)
    app.connect("env-merge-info", _merge)
    app.connect("html-collect-pages", _pages)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
