"""`python -m benchmarks FAMILY [options]`: runs one family's benchmark; without a family, names them.

Here `--device emulated` is known as well.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from benchmarks import emulator


def main(arguments: list[str]) -> int:
    families = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
    if not arguments or arguments[0] not in families:
        print(f"usage: python -m benchmarks {{{','.join(families)}}} [options]", file=sys.stderr)
        return 2
    family = importlib.import_module(f"benchmarks.bench_{arguments[0]}")
    return int(family.main(emulator.take_over(arguments[1:])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
