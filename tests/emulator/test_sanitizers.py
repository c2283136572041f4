"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: those of CUDA on the emulator, on small cases, and
those of the CPU, fuzzed.

The emulator's own checker knows the bounds of what it was told about; these know every allocation and every operation.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import emulation

ROOT = Path(__file__).parents[2]
# One case of the oracle rule per dtype; sizes that fill no tile; masks; what is not contiguous.
SELECTION = {
    "ops/test_aggregate.py": "(oracle_rule and not last) or strided or no_layers",
    "ops/test_hdim.py": "(oracle_rule and relu and both) or odd_sizes or rows_without_a_pair or expanded or empty",
    "ops/test_quantize.py": "exhaustive or statistics_obey or not_chosen or (formula and 8)",
    "ops/test_routing.py": "oracle_rule or masked_tokens or empty_dimensions",
}


def sanitizer_library(name: str) -> str:
    """Returns the path of the compiler's lib<name>.so; skips the test where there is none."""
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, f"-print-file-name=lib{name}.so"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(path):
        pytest.skip(f"{compiler} has no lib{name}")
    return path


@pytest.fixture
def environment() -> dict[str, str]:
    """Returns the environment of a process that loads a library made for AddressSanitizer."""
    return os.environ | {
        "LD_PRELOAD": sanitizer_library("asan"),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python leaves much to the end of the process
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "XLAYER_EMULATOR_LIBRARY": str(emulation.FOLDER / "libxlayer_emulated_asan.so"),
    }


# Launches one of the planted faults (emulator/faults), or its corrected twin.
PLANTED = """
import ctypes, sys
library, name, fixed = sys.argv[1:]
ctypes.CDLL(library).run_fault(name.encode(), int(fixed), ctypes.create_string_buffer(1000), 1000)
"""


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("off_by_one_in_global_memory", "AddressSanitizer: heap-buffer-overflow"),
        ("off_by_one_in_shared_memory", "AddressSanitizer: use-after-poison"),
    ],
)
def test_planted_overflow_is_reported(environment: dict[str, str], name: str, told: str) -> None:
    library = str(emulation.FOLDER / "libemulator_faults_asan.so")
    faulty, fixed = (
        subprocess.run(
            [sys.executable, "-c", PLANTED, library, name, which],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        for which in "01"
    )
    assert faulty.returncode != 0
    assert told in faulty.stderr and "faults/out_of_bounds.cu" in faulty.stderr, faulty.stderr
    assert fixed.returncode == 0, fixed.stderr


def test_instructions_and_launches(environment: dict[str, str]) -> None:
    program = emulation.FOLDER / "emulator_selftest_asan"
    child = subprocess.run([program], env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout + child.stderr


@pytest.mark.slow
@pytest.mark.parametrize("file", SELECTION)
def test_operators(environment: dict[str, str], file: str) -> None:
    program = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", "emulated"]
    program += [str(ROOT / "tests" / file), "-k", SELECTION[file]]
    child = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-4000:]
    assert "skipped" not in child.stdout.splitlines()[-1]


SANITIZED = ROOT / "build" / "sanitized" / "libxlayer_sanitized.so"
needs_sanitized = pytest.mark.skipif(
    not SANITIZED.exists(), reason=f"{SANITIZED.name} has not been built: cmake --build build/native --target sanitized"
)


def fuzz(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs `python tests/fuzz --sanitized` with these words."""
    command = [sys.executable, "tests/fuzz", "--sanitized", *words]
    told = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.cpu_kernels
@needs_sanitized
def test_fuzzed_operators() -> None:
    sanitizer_library("asan")
    child = fuzz("--calls", "12000", "--seconds", "45", "--seed", "2")
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]


@pytest.mark.cpu_kernels
@needs_sanitized
def test_fuzzer_reports_a_planted_overflow() -> None:
    sanitizer_library("asan")
    child = fuzz("--plugin", "tests/fuzz/planted.py", "--op", "planted_overflow", "--calls", "3")
    assert child.returncode == 1, child.stdout + child.stderr
    assert "sanitizer: planted_overflow: AddressSanitizer: heap-buffer-overflow" in child.stdout, child.stdout
    assert "--op planted_overflow --plugin tests/fuzz/planted.py --sanitized" in child.stdout
