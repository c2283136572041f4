"""Judges what compute-sanitizer found: `python -m benchmarks.gpu.sanitizer_report TOOL FILE`.

Exits with 1 if a finding is in our kernels.

FILE holds the tool's output and, in its last line, its exit code. Initcheck watches the kernels of torch and its
libraries too, and what it says of those is counted apart: a finding is ours where it is in a kernel of our namespace,
or a copy to the host, which is how a result that no kernel wrote comes to light.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

SUMMARY = re.compile(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", re.MULTILINE)
NO_FINDING = "COMPUTE-SANITIZER|ERROR SUMMARY|RACECHECK SUMMARY|Target application"
FINDING = re.compile(rf"^(?==+ (?=[A-Z])(?!{NO_FINDING}))", re.MULTILINE)
OURS = re.compile(r"^=+ +at .*xlayer::|Host API uninitialized", re.MULTILINE)  # not a frame of the host's


def findings(text: str) -> list[str]:
    """Splits the text into findings, each with its lines."""
    return FINDING.split(text)[1:]


def report(tool: str, text: str) -> tuple[str, bool]:
    """Returns the lines to print of a tool's output, and whether it found nothing in our kernels."""
    summary, exit_code = SUMMARY.search(text), text.rstrip().rpartition("exit code ")[2]
    if summary is None:
        return f"{tool}: did not run to its end, exit code {exit_code}\n{text[-3000:]}", False
    found = findings(text)
    ours = [finding for finding in found if OURS.search(finding)]
    if exit_code == "0":
        return f"{tool}: {summary[1]}", True
    if tool == "initcheck" and exit_code == "66" and found and not ours:
        return f"{tool}: {summary[1]}, all of them in other libraries' kernels\n{found[0]}", True
    return f"{tool}: {summary[1]}, exit code {exit_code}\n" + "".join((ours or found)[:5]), False


def main(tool: str, path: str) -> int:
    said, fine = report(tool, Path(path).read_text(errors="replace"))
    print(said)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
