"""Finds the commands that README, CONTRIBUTING and docs show, and says how each is known to work."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAMS = ("make ", "xlayer ", "python ", "bash ", "pip ", "accelerate ", "git ", "XLAYER_NATIVE=0 ")

# What no test runs as it stands, with the reason. A pattern must match the whole command.
EXCEPTIONS = {
    r"make (demo|test|build|emulator|format|lint|nightly|clean)( \w+=\S+)?": "minutes long; CI runs `make test`",
    r"make soak( SEEDS=\d+)?": "an hour long; a part of `make nightly`",
    r"make docs|make docs-serve|make results": "what they run is run by tests/test_docs.py and tests/test_pages.py",
    r"pip install .*|XLAYER_NATIVE=0 pip install .*": "changes the environment; tests/test_build.py builds both ways",
    r"python -m pytest .*": "a part of the suite; tests/test_seeding.py and tests/test_emulated.py check the options",
    r"python tests/fuzz .*": "tests/test_fuzz.py runs it with fewer calls",
    r"python -m benchmarks( .*)?": "minutes long; tests/test_benchmarks_report.py runs the toy suite",
    r"python -m benchmarks\.bounds( FILE)?": "ends with 1 while a bound does not hold; tests/test_bench_bounds.py",
    r"python -m benchmarks\.pages --check": "tests/test_pages.py calls what it calls",
    r"python -m xlayer_ext\.info": "tests/test_info.py calls what it calls",
    r"bash benchmarks/gpu_check\.sh .*": "needs a GPU, or minutes; tests/test_gpu_check.py runs its dry run",
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
