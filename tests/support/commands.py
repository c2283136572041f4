"""Finds the commands that README, CONTRIBUTING and docs show, and says how each is known to work."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ("make ", "xlayer ", "python ", "bash ", "pip ", "accelerate ", "git ", "XLAYER_NATIVE=0 ")

# Commands that no test runs as they are, with the reason. A pattern must match the whole command.
EXCEPTIONS = {
    r"make (demo|test|build|emulator|format|lint|nightly|clean)( \w+=\S+)?": "minutes long; CI runs `make test`",
    r"make soak( SEEDS=\d+)?": "an hour long; a part of `make nightly`",
    r"make docs|make docs-serve|make results": "what they run is run by test_docs and test_pages",
    r"pip install .*|XLAYER_NATIVE=0 pip install .*": "changes the environment; test_build builds both ways",
    r"python -m pytest .*": "a part of the suite; test_seeding and test_emulated check the options",
    r"python -m tools\.house": "test_house calls what it calls",
    r"python tests/fuzz .*": "test_fuzz runs it with fewer calls",
    r"python -m benchmarks( .*)?": "minutes long; test_benchmarks_report runs the toy suite",
    r"python -m benchmarks\.report\.bounds( FILE)?": "ends with 1 while a bound does not hold; test_bench_bounds",
    r"python -m benchmarks\.pages --check": "test_pages calls what it calls",
    r"python -m xlayer_ext\.info( --kernels)?": "test_info calls what it calls",
    r"bash benchmarks/gpu_check\.sh .*": "needs a GPU, or minutes; test_gpu_check runs its dry run",
}


def pages() -> list[Path]:
    """Lists the pages that show commands."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def shown(page: Path) -> Iterator[str]:
    """Yields the commands of a page: lines of shell blocks, and inline code that begins with a program."""
    text = page.read_text()
    for block in re.findall(r"^ *```sh\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if command := " ".join(shlex.split(line, comments=True)):
                yield command
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`([^`]+)`", prose):
        command = " ".join(code.split())
        if command.startswith(PROGRAMS) and "…" not in command:
            yield command


def exception(command: str) -> str | None:
    """Returns why no test runs the command, or None."""
    return next((reason for pattern, reason in EXCEPTIONS.items() if re.fullmatch(pattern, command)), None)
