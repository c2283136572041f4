"""Measures the limits of the machine, times, and peak memory, and keeps them as rows.

A time alone says little. Each row therefore counts the fewest bytes that must move and the fewest operations that must
be done, and reports how near the machine's measured limit the implementation came:

    fraction_of_limit = max(bytes / byte rate, flops / flop rate, alu / alu_rate) / median time

1 means that nothing faster is possible by that count. On a CPU the rates are its roof, by `roof`: independent
multiply-adds, and the fastest of copying, reading and writing within as many bytes as the case touches. Nothing can be
faster, so a fraction above `BEYOND` is an error of the benchmark. torch's GEMM and copy are rivals there, beside the
others. On a GPU they are the limits, and the third term, float32 operations outside GEMMs, counts too: matrix units are
so fast that the rest can bound.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import roof

Work = Callable[[], object]
Builder = Callable[..., Work]
PASSES = ("fwd", "bwd", "fwd+bwd")


class Unavailable(RuntimeError):
    """Raised by a builder whose implementation cannot run here; the benchmark skips it and reports why."""


# ---- the machine's limits ------------------------------------------------------------------------------------------


BEYOND = 1.03  # a fraction above it is beyond the limit: clocks and rates differ by less from round to round


@dataclass(frozen=True)
class Limits:
    """Rates of one device for one dtype: `byte_rate` in bytes/s (read + written), `flop_rate` in flop/s.

    `alu_rate` is in float32 operations/s, a fused multiply-add being one; infinite where it was not measured. `facts`
    are keys of the rows: the rates, by what was measured.
    """

    byte_rate: float
    flop_rate: float
    alu_rate: float = math.inf
    facts: Mapping[str, Any] = field(default_factory=dict)

    def seconds(self, bytes_moved: float, flops: float, alu: float = 0) -> dict[str, float]:
        """Computes the least time for each of the three alone, by their names in rows."""
        return {"bytes": bytes_moved / self.byte_rate, "flops": flops / self.flop_rate, "alu": alu / self.alu_rate}

    def bound(self, bytes_moved: float, flops: float, alu: float = 0) -> str:
        """Returns the name of the one of the three that needs the most time."""
        needed = self.seconds(bytes_moved, flops, alu)
        return max(needed, key=needed.__getitem__)

    def fraction(self, bytes_moved: float, flops: float, seconds: float, alu: float = 0) -> float:
        """Computes the least time for that many bytes and operations, which overlap perfectly, ÷ the time taken."""
        return max(self.seconds(bytes_moved, flops, alu).values()) / seconds


PROBE = "limit: "  # begins the names of the works that show limits


class LimitProbe:
    """Works that measure a device's limits, and the rates that torch reaches.

    `works` go into `compare` beside what is measured, and `limits` reads the rates off its result. A processor's clock
    and a shared host's load drift within seconds, so only rates from the same rounds are those of the same machine.

    Args:
        device: where to measure, with all of torch's threads.
        dtype: of the GEMM, and of the multiply-adds; 16-bit types are computed in float32.
        seconds: spent here on finding the fastest GEMM shape; which one that is differs between machines and dtypes.
        buffer_bytes: most bytes that the probes touch on a CPU, four times its largest cache by default; on CUDA the
            size of each copy buffer, 1 GiB by default, as a smaller copy does not reach the memory's full rate.
        gemm_sizes: two edges of the matrices that are tried; small ones save time, and may miss the best rate.

    Raises `Unavailable` on a CPU without the extension `_native`, which measures its limits.
    """

    def __init__(
        self,
        device: str,
        dtype: torch.dtype,
        *,
        seconds: float = 0.5,
        buffer_bytes: int = 0,
        gemm_sizes: tuple[int, int] | None = None,
    ) -> None:
        cuda = torch.device(device).type == "cuda"
        self._device, self._dtype = device, dtype
        self._most_bytes = buffer_bytes
        sizes = gemm_sizes or ((4096, 8192) if cuda else (1024, 2048))
        if dtype == torch.float16 and not cuda:
            sizes = (256, 512)  # most processors do these products one number at a time
        shapes = [(n, n, n) for n in sizes] + [(4 * sizes[0], sizes[0], sizes[0] // 2)]
        gemms: dict[float, tuple[Work, int]] = {}
        for m, n, k in shapes:
            work = partial(torch.mm, *(torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (k, n))))
            gemms[2 * m * n * k / _fastest(work, device, seconds / len(shapes))] = (work, 2 * m * n * k)
        self.best_gemm_rate = max(gemms)  # the fastest single call: what torch can do at its best moment
        self._gemm, self._flops = gemms[self.best_gemm_rate]
        self._source = self._target = torch.empty(0)
        self.alu_source: str | None = None  # where limits().alu_rate comes from: "probe", "nominal", or nowhere
        self._alu_work: Work | None = None
        self._alu, self._alu_rate = 0, math.inf
        if cuda:
            self._source = torch.ones((buffer_bytes or 1 << 30) // 4, device=device)
            self._target = torch.zeros_like(self._source)
            self._probe_alu(device)
        elif not roof.isas():
            raise Unavailable("a CPU's limits need xlayer_ext._native: pip install -e . --no-build-isolation")
        else:
            self._roof = roof.widest(torch.get_num_threads())

    def works(self, footprint: int) -> dict[str, Work]:
        """Makes the works for a case that touches this many bytes; earlier results are dropped."""
        found: dict[str, Work]
        if torch.device(self._device).type == "cuda":
            found = {PROBE + "copy": partial(self._target.copy_, self._source), PROBE + "gemm": self._gemm}
            return found if self._alu_work is None else found | {PROBE + "alu": self._alu_work}
        footprint = max(1, min(footprint, self._most_bytes or roof.memory_footprint(self._roof.threads)[0]))
        self._copied = max(1, footprint // 8)  # float32 numbers, of source and target each
        if self._copied > self._source.numel():
            self._source, self._target = torch.ones(self._copied), torch.zeros(self._copied)
        copy = partial(self._target[: self._copied].copy_, self._source[: self._copied])
        dtype = "float64" if self._dtype == torch.float64 else "float32"
        self._multiply_adds = roof.MultiplyAdds(self._roof, dtype)
        self._moves = roof.Moves(self._roof, footprint)
        found = {PROBE + "multiply-add": self._multiply_adds, PROBE + "bytes": self._moves}
        return found | {PROBE + "copy": copy, PROBE + "gemm": self._gemm}

    def limits(self, times: Mapping[str, Timing]) -> Limits:
        """Returns the rates of the last `works` in `compare`: the best ones of a CPU, the median ones of a GPU."""
        copy, gemm = times[PROBE + "copy"], times[PROBE + "gemm"]
        if torch.device(self._device).type == "cuda":
            copy_rate, gemm_rate = 2 * self._source.nbytes / copy.median, self._flops / gemm.median
            probed = self.alu_source == "probe"
            alu_rate = self._alu / times[PROBE + "alu"].median if probed else self._alu_rate
            facts = {"copy_rate": copy_rate, "gemm_rate": gemm_rate, "best_gemm_rate": self.best_gemm_rate}
            return Limits(copy_rate, gemm_rate, alu_rate, facts)
        facts = roof.rates(self._multiply_adds, self._moves)
        torch_gemm_rate = self._flops / gemm.minimum
        facts |= {"torch_copy_rate": 8 * self._copied / copy.minimum, "torch_gemm_rate": torch_gemm_rate}
        flop_rate = self._multiply_adds.rate
        if self._dtype.itemsize == 2:  # matrix units of 16-bit numbers, where torch shows that there are some
            flop_rate = max(flop_rate, torch_gemm_rate, self.best_gemm_rate)
        return Limits(self._moves.rate, flop_rate, facts=facts)

    def _probe_alu(self, device: str) -> None:
        try:
            work, self._alu = multiply_add_chains(device)
            work()
        except Exception as error:  # it needs a run-time compiler, which a machine may lack
            print(f"note: no float32 probe on {device}: {error}", file=sys.stderr)
            rate = nominal_alu_rate(device)
            self.alu_source, self._alu_rate = ("nominal", rate) if rate else (None, math.inf)
        else:
            self._alu_work, self.alu_source = work, "probe"


def _fastest(work: Work, device: str, seconds: float) -> float:
    timing = compare({"work": work}, device=device, seconds=seconds, min_rounds=3, turn_seconds=0.0, cold=False)
    return timing["work"].minimum


# Each step needs the one before, and no compiler may reorder it; the chains of other elements fill the pipeline.
_CHAIN_LENGTH = 1024
_CHAIN = f"""template <typename T> T chain(T x, T a, T b) {{
    for (int i = 0; i < {_CHAIN_LENGTH}; ++i) x = x * a + b;
    return x;
}}"""


def multiply_add_chains(device: str, elements: int = 1 << 24) -> tuple[Work, int]:
    """Makes a work of float32 multiply-adds in registers alone, compiled at run time; returns it and their number."""
    chain = torch.cuda.jiterator._create_jit_fn(_CHAIN, a=0.5, b=1.0)
    return partial(chain, torch.rand(elements, device=device)), elements * _CHAIN_LENGTH


def nominal_alu_rate(device: str) -> float | None:
    """Computes float32 operations/s as multiprocessors · 128 lanes · highest clock; None where it is unknown."""
    command = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        megahertz = float(answer.splitlines()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    return torch.cuda.get_device_properties(device).multi_processor_count * 128 * megahertz * 1e6


def cache_bytes(device: str) -> int:
    """Returns the size of the device's largest cache; 64 MiB where it is unknown."""
    if torch.device(device).type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20))
    return max((size for size, _ in roof.cache_levels().values()), default=64 << 20)


# ---- timing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Samples of one implementation, in seconds."""

    samples: list[float] = field(repr=False)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def minimum(self) -> float:
        return min(self.samples)

    @property
    def spread(self) -> float:
        """Returns the interquartile range ÷ the median: 0.02 on a quiet machine, 0.2 on one that is busy with something
        else."""
        low, _, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / self.median


def compare(
    works: Mapping[str, Work],
    *,
    device: str = "cpu",
    seconds: float = 3.0,
    min_rounds: int = 5,
    turn_seconds: float = 0.05,
    cold: bool | None = None,
    seed: int = 0,
) -> dict[str, Timing]:
    """Times several implementations of one thing in turns, so that a slow minute of the machine affects all of them.

    Each round gives every implementation one turn, in a fresh random order; a turn repeats a short call until it fills
    `turn_seconds`, so that what its neighbour left in the caches does not decide. Rounds run for `seconds`, and for
    at least `min_rounds`. `cold` empties the caches before every call: the default on CUDA, where a sample is the time
    that the device takes, without the host's for launching.
    """
    cuda = torch.device(device).type == "cuda"
    scratch = None
    if cuda if cold is None else cold:
        scratch = torch.empty(2 * cache_bytes(device), dtype=torch.int8, device=device)
    turn = _cuda_turn if cuda else _cpu_turn
    calls = {}
    for name, work in works.items():
        turn(work, 1, scratch)  # compilation, allocation, first touch
        estimate = max(min(turn(work, 2, scratch)), 1e-9)
        calls[name] = max(1, min(100, int(turn_seconds / estimate)))
    samples: dict[str, list[float]] = {name: [] for name in works}
    shuffle = random.Random(seed).shuffle
    start, rounds, order = time.perf_counter(), 0, list(works)
    while rounds < min_rounds or time.perf_counter() - start < seconds:
        shuffle(order)
        for name in order:
            samples[name] += turn(works[name], calls[name], scratch)
        rounds += 1
    return {name: Timing(values) for name, values in samples.items()}


def _cpu_turn(work: Work, calls: int, scratch: Tensor | None) -> list[float]:
    times = []
    for _ in range(calls):
        if scratch is not None:
            scratch.fill_(1)
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


_SLEEP_CYCLES = 3e9  # per second: above every GPU's clock, so that a wait is rather too long than too short


def _cuda_turn(work: Work, calls: int, scratch: Tensor | None) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    launching = 0.0
    for start, end in events:
        if scratch is not None:
            scratch.fill_(1)
        if launching:  # the device waits for as long as the host took for the last call, and so never waits within one
            torch.cuda._sleep(int(launching * _SLEEP_CYCLES))
        start.record()
        begin = time.perf_counter()
        work()
        launching = min(time.perf_counter() - begin, 0.02)
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e-3 for start, end in events]


# ---- peak memory ---------------------------------------------------------------------------------------------------

# glibc and MKL keep freed memory for later, which would hide a temporary from the resident size. With these, every
# block of 64 KiB or more is a mapping of its own that goes back to the system when freed, and MKL caches nothing.
# One arena: a second thread's arena would otherwise count as memory of the kernel that first woke that thread.
_PLAIN_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_MMAP_MAX_": "1000000",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_ARENA_MAX": "1",
    "MKL_DISABLE_FAST_MM": "1",
}
_PR_SET_THP_DISABLE = 41  # huge pages would round every allocation up to 2 MiB


def peak_memory(build: Builder, arguments: Mapping[str, Any], *, timeout: float = 600) -> int:
    """Measures the bytes that `build(**arguments)()` needs at its peak beyond its inputs and results.

    Runs in a fresh process, which imports `build` by name (a function at the top of a module) and gets `arguments` as
    JSON. `build` makes the inputs and returns the work; the work returns every output and gradient that it makes.
    It reads the resident size's high-water mark (Linux); for CUDA there is `cuda_peak`, which needs no process.
    Raises `Unavailable` when the child fails, with the last line of its output.
    """
    request = json.dumps([*_importable_name(build), dict(arguments), torch.get_num_threads()])
    environment = os.environ | _PLAIN_ALLOCATOR | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", f"from {__name__} import _child; _child()", request]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    lines = (child.stderr if child.returncode else child.stdout).strip().splitlines()
    if child.returncode or not lines:
        raise Unavailable(f"peak memory: {lines[-1] if lines else f'child ended with {child.returncode}'}")
    return int(lines[-1])


def _importable_name(build: Builder) -> tuple[str, str]:
    module = build.__module__
    if module == "__main__":  # run as `python -m package.name` or as `python folder/name.py`
        main = sys.modules["__main__"]
        module = main.__spec__.name if main.__spec__ else Path(str(main.__file__)).stem
    return module, build.__qualname__


def _child() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    module, name, arguments, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    work = getattr(__import__(module, fromlist=[name]), name)(**arguments)
    work()  # what is made once and kept (thread pools, compiled code, workspaces) is no part of a call's need
    print(statistics.median(_resident_peak(work) for _ in "123"))


def _resident_peak(work: Work) -> int:
    result = work()
    settled = _status_bytes("VmRSS")  # inputs, outputs and gradients exist
    del result  # the measured call makes its own
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present size
    work()
    return max(0, _status_bytes("VmHWM") - settled)


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))


def cuda_peak(work: Work, device: str = "cuda") -> int:
    """Measures the peak memory of a work on a GPU as `peak_memory` does, by torch's allocator."""
    result = work()  # what is made once and kept exists from here on
    settled = torch.cuda.memory_allocated(device)
    del result
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return max(0, torch.cuda.max_memory_allocated(device) - settled)


# ---- rows ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of a results file; `benchmarks/README.md` explains every key. JSON calls `pass_` "pass"."""

    family: str
    op: str
    case: str
    pass_: str
    dtype: str
    device: str
    impl: str
    ms_median: float
    ms_min: float
    bytes: int
    flops: int
    peak_bytes: int | None
    fraction_of_limit: float
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.pass_ not in PASSES:
            raise ValueError(f"pass: got {self.pass_!r}, expected one of {', '.join(PASSES)}")
        if not 0 < self.ms_min <= self.ms_median:
            raise ValueError(f"times: got ms_min {self.ms_min} and ms_median {self.ms_median}")

    def to_json(self) -> str:
        values = asdict(self)
        extra = values.pop("extra")
        return json.dumps({key.rstrip("_"): value for key, value in values.items()} | extra)

    @classmethod
    def from_json(cls, line: str) -> Row:
        """Parses a row, with keys beyond the schema in `extra`; raises `ValueError` when one of its own is missing."""
        values = json.loads(line)
        names = {item.name.rstrip("_"): item.name for item in fields(cls) if item.name != "extra"}
        if missing := names.keys() - values.keys():
            raise ValueError(f"row lacks {', '.join(sorted(missing))}")
        known = {attribute: values.pop(key) for key, attribute in names.items()}
        return cls(**known, extra=values)


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Appends rows to a JSON-lines file, which is made with its folder if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(row.to_json() + "\n" for row in rows)


def read_rows(path: str | Path) -> list[Row]:
    return [Row.from_json(line) for line in Path(path).read_text().splitlines() if line]


def provenance() -> dict[str, Any]:
    """Returns the origin of rows: date, commit (with "-dirty" when tracked files differ), versions, threads.

    XLAYER_COMMIT names the commit where the files were copied without their git folder.
    """
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = os.environ.get("XLAYER_COMMIT") or "unknown"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"date": now, "commit": commit, "versions": versions, "threads": torch.get_num_threads()}


def device_name(device: str) -> str:
    """Returns the device's name for rows: the GPU's, or the processor's with the instruction set that torch uses."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{roof.processor_name()} {torch.backends.cpu.get_cpu_capability()}"
