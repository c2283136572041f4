"""`python -m benchmarks`: every family, its plots and a report; `python -m benchmarks FAMILY [options]`: one script.

One family alone is run by its own script, which prints a table and knows more options (`hdim --help`), unless
`--suite quick` or `toy`, or a folder as `--out`, asks for a report. Here `--device emulated` is known as well.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from benchmarks.gpu import emulator
from benchmarks.report import suite


def main(arguments: list[str]) -> int:
    arguments = emulator.take_over(arguments)
    if wants_script(arguments):
        script = importlib.import_module(f"benchmarks.cases.{arguments[0]}")
        return int(script.main(arguments[1:]))
    return suite.main(arguments)


def wants_script(arguments: list[str]) -> bool:
    """Tells whether the arguments name one family and no option that only the suite has."""
    names = [argument for argument in arguments[:2] if argument in suite.FAMILIES]
    if not arguments or len(names) != 1 or arguments[0] != names[0]:
        return False
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--suite")
    parser.add_argument("--out", default="rows.jsonl")
    parser.add_argument("--minutes")
    known, _ = parser.parse_known_args(arguments)
    return known.suite in (None, "main", "full") and known.out.endswith(".jsonl") and known.minutes is None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
