"""Options and settings of the whole suite."""

from __future__ import annotations

import os

# Before anything imports a Hugging Face library: no test may reach for the network.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# Before torch: OpenMP threads that wait by spinning slow the tests with several processes by an order of magnitude.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings

import emulation

settings.register_profile("xlayer", deadline=None, print_blob=True)
settings.load_profile("xlayer")


def pytest_addoption(parser: pytest.Parser) -> None:
    choices = ("cpu", "emulated", "cuda")
    told = "whose kernels run; emulated: those of CUDA, on the CPU (tests/emulator)"
    parser.addoption("--device", choices=choices, default="cpu", help=told)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda, but torch finds no CUDA device")
    if config.getoption("--device") == "emulated":
        try:
            emulation.take_over()
        except FileNotFoundError as error:
            raise pytest.UsageError(f"--device emulated, but {error}") from None
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:  # the workers share the cores instead of each asking for all of them
        threads = max(1, (os.cpu_count() or 1) // workers)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kernels = config.getoption("--device")
    skips = {
        "cuda": (kernels != "cuda", "needs a CUDA device: run with --device cuda"),
        "cpu_kernels": (kernels != "cpu", "about the CPU kernels alone"),
        "emulated_kernels": (kernels != "emulated", "about the emulator: run with --device emulated"),
    }
    for item in items:
        for marker, (skips_here, reason) in skips.items():
            if skips_here and item.get_closest_marker(marker):  # keywords would match folders too
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def kernels(request: pytest.FixtureRequest) -> str:
    """Whose kernels the native operators run: `cpu`, `emulated` or `cuda`, as --device says."""
    chosen: str = request.config.getoption("--device")
    return chosen


@pytest.fixture(scope="session")
def device(kernels: str) -> str:
    """Where the tensors of the tests live: `cpu` or `cuda`."""
    return "cuda" if kernels == "cuda" else "cpu"


@pytest.fixture
def schedule(kernels: str) -> Iterator[Callable[[int], None]]:
    """Makes the kernels do their work in another order for every number from 1 on: with so many threads on the CPU,
    with blocks and threads taking other turns on the emulator."""
    if kernels == "emulated":
        yield emulation.set_seed
        emulation.set_seed(emulation.SEED)
        return
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
