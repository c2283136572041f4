"""The numbers of the README, from the committed results: `make results` writes them, a test compares them.

README.md names its generated parts: what stands between `<!-- results: NAME -->` and `<!-- end -->` is the text of the
function NAME in readme_kernels.py or readme_studies.py. A new table is a new function, and a pair of such lines.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from benchmarks import readme_kernels, readme_studies
from benchmarks.readme_tables import BLOCKS

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

__all__ = ["readme_kernels", "readme_studies", "rewritten"]  # imported for what they register


def rewritten(text: str) -> str:
    """``text`` with every generated part made anew; a name without a function raises `KeyError`."""
    return BLOCK.sub(lambda match: f"{match[1]}{BLOCKS[match[2]]().rstrip()}\n{match[3]}", text)


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
