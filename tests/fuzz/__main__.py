"""Fuzzes the operators and the functional API: `python tests/fuzz --calls 1000000 --workers 2`.

Every call is made of the seed and its number alone. Ends with status 1 where anything was found: a crash, a hang, a
report of a sanitizer, a wrong answer, a refused valid call, or an error that tells a user nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
MODES = ("hostile", "functional", "valid", "functional-valid", "racing")  # fuzz.calls.MODES, which needs torch
SANITIZED = TESTS.parent / "build" / "sanitized" / "libxlayer_sanitized.so"
# Python leaves much to the end of the process; memory of huge calls is refused as it is without a sanitizer.
ASAN_OPTIONS = (
    "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=1024:quarantine_size_mb=64:exitcode=99:"
    "handle_abort=1:detect_stack_use_after_return=0"
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop then, however many calls were made")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    told = "this kind of calls alone (several times: these)"
    parser.add_argument("--mode", action="append", default=[], choices=MODES, help=told)
    parser.add_argument("--op", action="append", default=[], help="this operator or function alone")
    parser.add_argument("--call", type=int, help="make this one call, in this process, and show its arguments")
    parser.add_argument("--isa", default="", help="avx512, avx2 or baseline; all in turn by default")
    parser.add_argument("--patience", type=float, default=20.0, help="seconds after which a call hangs")
    parser.add_argument("--sanitized", action="store_true", help=f"with {SANITIZED.name}: `make sanitized`")
    parser.add_argument("--plugin", default="", help="a Python file to run first: operators of its own (the tests)")
    return parser.parse_args()


def restart_with_sanitizer() -> None:
    """Starts this program again with the sanitizer's library before all others."""
    if "XLAYER_FUZZ_SANITIZED" in os.environ:
        return
    if not SANITIZED.exists():
        sys.exit(f"{SANITIZED} has not been built: cmake --build build/native --target sanitized")
    compiler = os.environ.get("CXX", "c++")
    # The C++ library too: the sanitizer looks for what throws exceptions when it starts.
    names = (f"-print-file-name=lib{name}" for name in ("asan.so", "stdc++.so.6"))
    paths = [subprocess.run([compiler, name], capture_output=True, text=True, check=True).stdout for name in names]
    told = {"LD_PRELOAD": " ".join(path.strip() for path in paths), "ASAN_OPTIONS": ASAN_OPTIONS}
    told |= {"UBSAN_OPTIONS": "print_stacktrace=1", "XLAYER_FUZZ_SANITIZED": "1"}
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | told)


def load(sanitized: bool, plugin: str) -> None:
    """Imports the package; with the sanitized operators in the place of its own."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    if sanitized:
        own = torch.ops.load_library
        torch.ops.load_library = lambda path: own(str(SANITIZED) if Path(path).name == "libxlayer.so" else path)
    import xlayer_ext

    if not xlayer_ext._library.LOADED:
        sys.exit(f"nothing to fuzz: {xlayer_ext._library.REASON}")
    if plugin:
        exec(compile(Path(plugin).read_text(), plugin, "exec"), {"__name__": "plugin"})


def main() -> int:
    asked = parse()
    if asked.sanitized:
        restart_with_sanitizer()
    sys.path[0] = str(TESTS)
    load(asked.sanitized, asked.plugin)
    from fuzz import driver

    options = driver.Options(
        asked.seed, asked.calls, asked.seconds, asked.workers, asked.mode, asked.op, asked.isa, asked.patience,
        asked.sanitized, asked.plugin,
    )  # fmt: skip
    driver.prepare()
    try:
        driver.Maker(asked.seed, asked.mode or None, asked.op or None)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if asked.call is not None:
        driver.choose_isa(options, asked.call)
        if not asked.sanitized:
            driver.limit_memory()
        call = driver.Maker(asked.seed, asked.mode or None, asked.op or None).make(asked.call)
        print(call.description(), flush=True)
        driver.torch.set_num_threads(call.threads)
        print(call.run())
        return 0
    result = driver.fuzz(options)
    driver.tell(result)
    return 1 if result.reports else 0


if __name__ == "__main__":
    sys.exit(main())
