"""Runs the command line for launchers that take a module: ``accelerate launch -m xlayer_systems.cli``."""

from xlayer_systems.cli import main

if __name__ == "__main__":
    main()
