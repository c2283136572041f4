"""Starts the ``xlayer`` command, or names what to install where its packages are missing."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line.

    Raises:
        SystemExit: with the command's exit code, or with one line where the extra ``systems`` is not installed.
    """
    try:
        from xlayer_systems.cli import main as run

        run()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("xlayer_ext", "xlayer_systems"):
            raise
        sys.exit(f"xlayer needs the package {error.name}: pip install 'xlayer-ext[systems]'")


if __name__ == "__main__":
    main()
