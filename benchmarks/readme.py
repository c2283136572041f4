"""The numbers of the README, from the committed results: `make results` writes them, a test compares them.

README.md names its generated parts: what stands between `<!-- results: NAME -->` and `<!-- end -->` is the text of the
function NAME in one of the modules below. Marks on lines of their own hold a table, marks inside a sentence a number. A
new part is a new function, and a pair of marks. `unsourced` finds the numbers that stand outside of all of them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from benchmarks import readme_facts, readme_kernels, readme_numbers, readme_studies
from benchmarks.readme_tables import BLOCKS

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- results: (\w+) -->(\n?)).*?(<!-- end -->)", re.DOTALL)

MODULES = (readme_facts, readme_kernels, readme_numbers, readme_studies)  # imported for what they register


def rewritten(text: str) -> str:
    """``text`` with every generated part made anew; a name without a function raises `KeyError`."""
    return BLOCK.sub(lambda match: f"{match[1]}{BLOCKS[match[2]]().rstrip()}{match[3]}{match[4]}", text)


def main(arguments: list[str]) -> int:
    """Rewrites README.md; with --check only says whether that would change it."""
    path = ROOT / "README.md"
    before = path.read_text()
    after = rewritten(before)
    if arguments == ["--check"]:
        if before != after:
            print("README.md does not show the committed results: run `make results`", file=sys.stderr)
        return int(before != after)
    path.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
