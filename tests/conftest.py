"""Options and settings of the whole suite."""

from __future__ import annotations

import os

# Before anything imports a Hugging Face library: no test may reach for the network.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# Before torch: OpenMP threads that wait by spinning slow the tests with several processes by an order of magnitude.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import gc
import random
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.core
import pytest
import torch
from _pytest.runner import runtestprotocol
from hypothesis import settings

import emulation
import seeding

settings.register_profile("xlayer", deadline=None, print_blob=True, derandomize=True)
settings.register_profile("soak", deadline=None, print_blob=True, database=None)

DREW = "drew inputs"  # a report's property


def pytest_addoption(parser: pytest.Parser) -> None:
    choices = ("cpu", "emulated", "cuda")
    told = "whose kernels run; emulated: those of CUDA, on the CPU (tests/emulator)"
    parser.addoption("--device", choices=choices, default="cpu", help=told)
    told = "the number that every test's seed is made of, beside the test's id (seeding.py)"
    parser.addoption("--seed", type=int, default=0, help=told)
    told = "run the tests that draw inputs N times, with --seed, --seed + 1, …; a random --seed unless it is given"
    parser.addoption("--seeds", type=int, default=0, metavar="N", help=told)


class _FailuresAtOnce:
    """Prints how to repeat a failure when it occurs: a soak takes an hour, and what is stopped prints no summary."""

    def __init__(self, config: pytest.Config) -> None:
        self._plugins = config.pluginmanager

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        reporter = self._plugins.get_plugin("terminalreporter")
        for title, command in report.sections:
            if title == "To repeat" and reporter is not None:
                reporter.ensure_newline()
                reporter.write_line(command)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--seeds") and not config.getoption("--seed"):
        given = getattr(config, "workerinput", {})  # of a worker of pytest-xdist: all of them take the same seeds
        config.option.seed = given.get("seed") or random.SystemRandom().randrange(1, 2**31)
    if config.getoption("--seeds") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_FailuresAtOnce(config))
    settings.load_profile("soak" if config.getoption("--seed") else "xlayer")
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


def pytest_collection_finish() -> None:
    """Leaves what imports and collection made, which lives to the end, out of every later garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tells a worker of pytest-xdist the first seed."""
    node.workerinput["seed"] = node.config.getoption("--seed")


def pytest_report_header(config: pytest.Config) -> str | None:
    first, count = config.getoption("--seed"), config.getoption("--seeds")
    return f"seeds {first} to {first + count - 1}" if count else None


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Runs a test, and again with every further seed if it has drawn inputs."""
    first, count = item.config.getoption("--seed"), max(1, item.config.getoption("--seeds"))
    hook = item.ihook
    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    properties = list(item.user_properties)
    for number in range(first, first + count):
        item.user_properties = list(properties)
        seeding.begin(item.nodeid, number)
        # Sets hypothesis' own draws; None leaves them to the test's source.
        hypothesis.core.global_force_seed = number if number else None
        # With the test's collector next, fixtures of the test alone are torn down and others stay.
        last = number == first + count - 1
        reports = runtestprotocol(item, log=False, nextitem=nextitem if last else item.parent)
        drew = seeding.drew() or hasattr(getattr(item, "obj", None), "hypothesis")
        for report in reports:
            if drew and report.when == "call":
                report.user_properties.append((DREW, number))
            if report.failed and number:
                device = item.config.getoption("--device")
                command = f"python -m pytest --device {device} --seed {number} '{item.nodeid}'"
                report.sections.append(("To repeat", command))
            hook.pytest_runtest_logreport(report=report)
        if not last and not drew:
            item.session._setupstate.teardown_exact(nextitem)
            break
    hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    drawing = {report.nodeid for report in reports if any(name == DREW for name, _ in report.user_properties)}
    calls = len({report.nodeid for report in reports if report.when == "call"})
    terminalreporter.write_line(f"{len(drawing)} of {calls} tests draw inputs")


@pytest.fixture(scope="session")
def kernels(request: pytest.FixtureRequest) -> str:
    """Returns whose kernels the native operators run, as --device says: `cpu`, `emulated` or `cuda`."""
    chosen: str = request.config.getoption("--device")
    return chosen


@pytest.fixture(scope="session")
def device(kernels: str) -> str:
    """Returns the device of the tests' tensors: `cpu` or `cuda`."""
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
