"""Takes a picture of a report as a phone shows it, with Chromium.

`python -m benchmarks.report.screenshot REPORT.html OUT.png` fails where the browser's console has an error in it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 500, 2400  # headless Chromium has no narrower window


def browser() -> str | None:
    """Returns the browser's command, or None if there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def take(report: Path, picture: Path, timeout: float = 120) -> None:
    """Raises `RuntimeError` with the browser's output where it fails or complains."""
    command = browser()
    if command is None:
        raise RuntimeError(f"none of {', '.join(NAMES)} is installed")
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
        options += [f"--user-data-dir={profile}", f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={picture}"]
        url = report.resolve().as_uri()
        done = subprocess.run([command, *options, url], capture_output=True, text=True, timeout=timeout, check=False)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    if done.returncode or complaints or not picture.exists():
        raise RuntimeError("\n".join(complaints) or done.stderr[-2000:])


if __name__ == "__main__":
    take(Path(sys.argv[1]), Path(sys.argv[2]))
