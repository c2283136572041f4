"""The documentation: it builds without warnings or a network, its examples run, and what one looks for is found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cached_property
from html.parser import HTMLParser
from importlib import import_module
from inspect import ismodule
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer

import commands
from commands import ROOT
from xlayer_systems.cli import make_app

sys.path.insert(0, str(ROOT / "docs/_ext"))

from source_table import FAMILIES, LAYERS, SOURCES

SYSTEMS = ("xlrb", "telepathy", "lformer", "bypass", "hyper_lm")
PUBLIC = ("xlayer_ext", "xlayer_ext.functional", "xlayer_ext.nn", "xlayer_ext.reference")
MAX_LINKS = 3


class Site:
    """A built site and the inventory of what it documents."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*.html"))}
        self.pages = {name: Page(path.read_text()) for name, path in paths.items() if not name.startswith("_static")}

    @cached_property
    def objects(self) -> set[str]:
        from sphinx.util.inventory import InventoryFile

        with (self.folder / "objects.inv").open("rb") as file:
            inventory = InventoryFile.load(file, "", lambda _base, uri: uri)
        return {name for kind, names in inventory.items() if kind.startswith("py:") for name in names}


class Page(HTMLParser):
    """Links of a page, those of its article apart, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.article: list[str] = []
        self.anchors: set[str] = set()
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self._inside |= tag == "article"
        self.anchors |= {value for name in ("id", "name") if (value := found.get(name))}
        for name in ("href", "src"):
            if value := found.get(name):
                self.links.append(value)
                if self._inside and tag == "a":
                    self.article.append(value)

    def handle_endtag(self, tag: str) -> None:
        if tag == "article":
            self._inside = False


# Both builders in one process: the second takes the pages that the first has read, and torch is imported once.
BUILD = """
import sys
from sphinx.cmd.build import build_main

docs, out = sys.argv[1:]
for builder in ("html", "doctest"):
    arguments = ["-q", "-W", "--keep-going", "-b", builder, "-d", f"{out}/trees", docs, f"{out}/{builder}"]
    print(f"== {builder}:", build_main(arguments))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, str]:
    """Builds the site and runs its examples; returns the folder and what was printed."""
    folder = tmp_path_factory.mktemp("docs")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("XLAYER_DOCS_INTERSPHINX", None)
    command = [sys.executable, "-c", BUILD, str(ROOT / "docs"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return folder, done.stdout + done.stderr


@pytest.fixture(scope="module")
def site(built) -> Site:
    return Site(built[0] / "html")


def target(page: str, link: str) -> tuple[str, str] | None:
    """Resolves a link within the site to a file and an anchor; returns None where it leads out of it."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc or link.startswith("data:"):
        return None
    path = os.path.normpath(Path(page).parent / unquote(parts.path)) if parts.path else page
    return path, unquote(parts.fragment)


# ---- the site --------------------------------------------------------------------------------------------------------


def test_it_builds_without_warnings(built) -> None:
    _, printed = built
    assert "== html: 0" in printed, printed


def test_the_examples_on_its_pages_run(built) -> None:
    folder, printed = built
    assert "== doctest: 0" in printed, printed
    summary = (folder / "doctest/output.txt").read_text()
    assert int(re.search(r"Doctest summary\n=+\n +(\d+) tests", summary)[1]) >= 40
    for folder in ("families", "systems"):
        for path in (ROOT / "docs" / folder).glob("*.md"):
            assert path.stem == "index" or re.search(r"```\{(doctest|testcode)\}", path.read_text()), path


def test_its_links_and_anchors_lead_somewhere(site) -> None:
    broken = []
    for name, page in site.pages.items():
        for link in page.links:
            found = target(name, link)
            if found is None:
                continue
            path, anchor = found
            if path in site.pages:
                if anchor and anchor not in site.pages[path].anchors:
                    broken.append(f"{name}: {link} (no such anchor)")
            elif not (site.folder / path).exists():
                broken.append(f"{name}: {link}")
    assert broken == []


def test_nothing_on_it_is_loaded_from_elsewhere(site) -> None:
    loaded = re.compile(r"<(?:script|link|img)[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*\"")
    for name in site.pages:
        assert loaded.findall((site.folder / name).read_text()) == [], name


@pytest.mark.parametrize("module", [*PUBLIC, *(f"xlayer_systems.{system}" for system in SYSTEMS)])
def test_every_public_name_is_in_the_reference(site, module: str) -> None:
    documented = site.objects
    names = {name for name in import_module(module).__all__ if not ismodule(getattr(import_module(module), name))}
    assert {f"{module}.{name}" for name in names} - documented == set()


@pytest.mark.parametrize(
    "name",
    ["xlayer_systems.hyper_lm.HyperAttachment.save", "xlayer_ext.nn.HyperConnection.boundary",
     "xlayer_ext.nn.EMAAggregator.forward"],
)  # fmt: skip
def test_methods_of_a_base_class_are_in_the_reference(site, name: str) -> None:
    assert name in site.objects and f"{name.rpartition('.')[0]}.state_dict" not in site.objects


def test_every_file_of_a_family_is_listed_on_its_page(site) -> None:
    for family in FAMILIES:
        text = (site.folder / f"families/{family}.html").read_text()
        for folder in LAYERS.values():
            suffixes = (".h", ".cpp", ".cu", ".cuh")
            named = [path for path in (ROOT / folder).rglob(f"{family}*") if path.suffix in suffixes]
            named += [path for path in (ROOT / folder).glob(f"{family}/*") if path.suffix in suffixes]
            assert named, (family, folder)
            for path in named:
                assert f"source/{path.relative_to(ROOT)}.html" in text, path


def test_the_table_of_sources_names_files_and_is_used() -> None:
    pages = "".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    for key, path in SOURCES.items():
        assert (ROOT / path).is_file(), f"{key}: {path}"
        assert re.search(rf"\{{source\}}`(?:[^`<]*<)?{re.escape(key)}>?`", pages), f"{key} is in the table for nothing"


# ---- the way from the README -----------------------------------------------------------------------------------------


def reached(site: Site, links: int) -> set[str]:
    """Returns the pages and anchors that are at most so many links away from the README, following articles' links
    only."""
    text = (ROOT / "README.md").read_text()
    here = {
        (link.removeprefix("docs/").replace(".md", ".html"))
        for link in re.findall(r"\]\(([^)]+)\)", text)
        if link.startswith("docs/") and ".md" in link
    }
    found = set(here)
    for _ in range(links - 1):
        there = set()
        for place in here:
            name = place.split("#")[0]
            if name in site.pages:
                leads = [target(name, link) for link in site.pages[name].article]
                there |= {path + (f"#{anchor}" if anchor else "") for path, anchor in filter(None, leads)}
        here = there - found
        found |= there
    return found


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("the CUDA kernel of the boundary's backward", f"source/{SOURCES['hyper/cuda-backward']}.html"),
        ("where a preset's options are defined", "api/systems.html#xlayer_systems.xlrb.XLRBConfig"),
        ("how to add a system", "guides/add-a-system.html"),
        ("what is promised for bf16", "promises.html#bfloat16-and-float16"),
    ],
)
def test_an_answer_is_found_from_the_readme_in_few_links(site, question: str, answer: str) -> None:
    name, _, anchor = answer.partition("#")
    assert name in site.pages and (not anchor or anchor in site.pages[name].anchors), question
    assert answer in reached(site, MAX_LINKS), question


# ---- commands --------------------------------------------------------------------------------------------------------

SHOWN = sorted({command for page in commands.pages() for command in commands.shown(page)})


def parse(arguments: list[str]) -> None:
    """Parses arguments of the command line as it does itself, and runs nothing; raises for those that it refuses."""
    group = typer.main.get_command(make_app())
    context = group.make_context("xlayer", [], resilient_parsing=True)
    if arguments and arguments[0].startswith("-"):  # of the program itself, such as --version
        assert set(arguments) <= {option for parameter in group.params for option in (*parameter.opts, "--help")}
        return
    while hasattr(group, "resolve_command"):
        name, group, arguments = group.resolve_command(context, arguments)
        last = not hasattr(group, "resolve_command")
        kept = [argument for argument in arguments if argument != "--help"] if last else []
        incomplete = "--help" in arguments or not last or not kept
        context = group.make_context(name, kept, parent=context, resilient_parsing=incomplete)
        if not last and not arguments:
            return


@pytest.mark.parametrize("command", SHOWN)
def test_a_command_that_is_shown_works(command: str) -> None:
    if command.startswith("accelerate launch -m xlayer_systems.cli"):
        command = command.replace("accelerate launch -m xlayer_systems.cli", "xlayer")
    words = command.split()
    if words[0] == "xlayer":
        parse(words[1:])
    elif command.startswith("python examples/"):
        assert (ROOT / words[1]).is_file()  # tests/docs/test_examples.py runs it
    else:
        assert commands.exception(command), "run it in a test, or give the reason in tests/support/commands.py"


def test_every_exception_is_of_use() -> None:
    for pattern in commands.EXCEPTIONS:
        assert any(re.fullmatch(pattern, command) for command in SHOWN), pattern
