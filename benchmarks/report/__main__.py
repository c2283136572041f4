"""`python -m benchmarks.report DIR` writes the page of a run anew, from its rows.jsonl and found.json."""

import sys
from pathlib import Path

from benchmarks.report.page import write

if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
