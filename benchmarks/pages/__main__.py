"""Writes the generated pages and figures: `python -m benchmarks.pages`. With --check it names those out of date."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.pages import performance, studies
from benchmarks.pages.text import ROOT


def generated() -> dict[Path, str]:
    """Builds every page and figure, by its path below the root."""
    docs = Path("docs")
    pictures = performance.pictures() | studies.pictures()
    pages = {docs / "performance.md": performance.page(), docs / "studies.md": studies.page()}
    return pages | {docs / f"_static/figures/{name}.svg": svg for name, svg in pictures.items()}


def stale(root: Path = ROOT) -> list[str]:
    """Names the generated files that differ from the committed results, or are missing."""
    return [
        str(path)
        for path, content in generated().items()
        if not (root / path).is_file() or (root / path).read_text() != content
    ]


def main(arguments: Sequence[str]) -> int:
    """Writes the files, or with --check only compares them; returns the exit code."""
    if list(arguments) == ["--check"]:
        found = stale()
        if found:
            print(f"run `make results`: out of date are {', '.join(found)}", file=sys.stderr)
        return int(bool(found))
    for path, content in generated().items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(content)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
