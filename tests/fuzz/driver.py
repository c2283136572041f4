"""Makes calls in processes of their own, and reports how to reproduce every crash, hang and bad answer.

A process is forked for every few thousand calls, so that one that ends in a crash costs milliseconds. It notes each
call's number in shared memory before it makes it.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fuzz.calls import MODES, Finding, Maker

CHUNK = 2000  # calls of one process
ISAS = ("avx512", "avx2", "baseline")  # of one chunk after another; one that the machine lacks falls back
IMPATIENCE = 0.5  # seconds that a very large call may take before it counts as a hang
MEMORY = 3 * 2**29  # bytes that a process may have beyond what it starts with
CLEAN_EXIT, SANITIZER_EXIT = 0, 99
# The fields of a process in shared memory.
NUMBER, STARTED, MUCH, DONE, SLOTS = 0, 1, 2, 3, 8


@dataclass
class Options:
    """The choice of calls, and how they are made."""

    seed: int = 0
    calls: int = 10_000
    seconds: float = float("inf")
    workers: int = 1
    modes: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    isa: str = ""
    patience: float = 20.0
    sanitized: bool = False
    plugin: str = ""
    first: int = 0

    def repeat(self, number: int) -> str:
        """Returns the command that makes this one call again."""
        words = ["python tests/fuzz", f"--seed {self.seed}", f"--call {number}"]
        words += [f"--mode {mode}" for mode in self.modes] + [f"--op {name}" for name in self.targets]
        words += [f"--isa {self.isa}"] if self.isa else []
        words += [f"--plugin {self.plugin}"] if self.plugin else []
        return " ".join(words + ["--sanitized"] * self.sanitized)

    def isa_of(self, number: int) -> str:
        return self.isa or ISAS[number // CHUNK % len(ISAS)]


@dataclass
class Report:
    """One kind of finding: the first call that showed it, and how many did."""

    kind: str
    target: str
    text: str
    number: int
    description: str
    count: int = 1


@dataclass
class Result:
    """Counts, findings and duration of a run."""

    counts: Counter[str]
    reports: list[Report]
    calls: int
    seconds: float


def choose_isa(options: Options, number: int) -> None:
    os.environ["XLAYER_CPU_ISA"] = options.isa_of(number)  # read by the process's first call of a kernel


def prepare() -> None:
    """Loads in the parent what every process would load anew. No kernel may run here, and no second thread."""
    torch.set_num_threads(1)
    meta = torch.empty(1, 1, 1, device="meta")
    torch.ops.xlayer.masked_mean(meta, None)


class Worker:
    """A process that makes calls, and its state as the parent sees it."""

    def __init__(self, slot: int, shared: memoryview, options: Options) -> None:
        self._slot, self._shared, self._options = slot, shared, options
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115  # what it writes to stderr
        self.pid = 0
        self.end = 0

    def field(self, name: int) -> float:
        return self._shared[self._slot * SLOTS + name]

    def start(self, first: int, end: int) -> None:
        """Forks a process for the calls from ``first`` to before ``end``."""
        self.end = end
        for name in (NUMBER, STARTED, MUCH):
            self._shared[self._slot * SLOTS + name] = 0
        self._shared[self._slot * SLOTS + NUMBER] = -1
        self._complaints.seek(0)
        self._complaints.truncate()
        receive, send = os.pipe()
        os.set_blocking(receive, False)
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(receive)
            status = 1
            try:
                self._work(first, end, send)
                status = CLEAN_EXIT
            except BaseException:  # the parent must see it, and no handler of the parent's may run here
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        os.close(send)
        self._receive, self._buffer = receive, b""

    def _work(self, first: int, end: int, send: int) -> None:
        os.dup2(self._complaints.fileno(), 2)
        faulthandler.enable()
        if not self._options.sanitized:
            limit_memory()
        choose_isa(self._options, first)
        maker = Maker(self._options.seed, self._options.modes or None, self._options.targets or None)
        base, shared = self._slot * SLOTS, self._shared
        counts: Counter[str] = Counter()
        for number in range(first, end):
            shared[base + STARTED] = time.monotonic()
            shared[base + NUMBER] = number
            call = maker.make(number)
            shared[base + MUCH] = call.much
            torch.set_num_threads(call.threads)
            try:
                ended = call.run()
            except Finding as found:
                ended = "found"
                told = [found.kind, call.target, str(found)[:500], number, call.description()[:3000]]
                os.write(send, (json.dumps({"finding": told}) + "\n").encode())
            except Exception as error:  # a valid call may not raise
                ended = "found"
                text = f"{type(error).__name__}: {error}".split("\n", 1)[0][:500]
                told = ["refused", call.target, text, number, call.description()[:3000]]
                os.write(send, (json.dumps({"finding": told}) + "\n").encode())
            counts[f"{call.mode} {ended}"] += 1
            shared[base + DONE] += 1
            if len(counts) and number % 500 == 499:
                os.write(send, (json.dumps({"counts": counts}) + "\n").encode())
                counts.clear()
        os.write(send, (json.dumps({"counts": counts}) + "\n").encode())

    def messages(self) -> list[dict[str, list | dict]]:
        """Returns the messages that have arrived since the previous call."""
        try:
            while data := os.read(self._receive, 1 << 16):
                self._buffer += data
        except BlockingIOError:
            pass
        *lines, self._buffer = self._buffer.split(b"\n")
        return [json.loads(line) for line in lines]

    def ended(self) -> int | None:
        """Returns the exit status as `os.waitstatus_to_exitcode` has it, or None while the process runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            return None
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.pid = 0

    def close(self) -> None:
        os.close(self._receive)

    def complaints(self) -> str:
        self._complaints.seek(0)
        return self._complaints.read().decode(errors="replace")


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * mmap.PAGESIZE + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def describe(options: Options, number: int) -> str:
    """Describes the call of that number in words; a process of its own makes it."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            maker = Maker(options.seed, options.modes or None, options.targets or None)
            os.write(send, maker.make(number).description()[:3000].encode())
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as stream:
        told = stream.read().decode(errors="replace")
    os.waitpid(pid, 0)
    return told or "(the call could not be made again)"


def summary_of_crash(status: int, complaints: str) -> tuple[str, str]:
    """Returns the kind of a process's end and one line about it."""
    for pattern in (r"SUMMARY: (.*)", r"(\S+: runtime error: .*)", r"ERROR: (AddressSanitizer.*)"):
        if found := re.search(pattern, complaints):
            runtime = re.search(r"(\S+: runtime error: .*)", complaints)
            frame = re.search(r"#\d+ \S+ in (.*(?:csrc|libxlayer)\S*)", complaints)
            parts = [runtime.group(1) if runtime else found.group(1), f"in {frame.group(1)}" if frame else ""]
            return "sanitizer", " ".join(part for part in parts if part)
    last = [line for line in complaints.splitlines() if line.strip()][-3:]
    if status < 0:
        return "crash", f"{signal.Signals(-status).name} {_native_line(complaints)}".strip()
    return "crash", f"exit status {status}: {' / '.join(last)[-300:]}"


def _native_line(complaints: str) -> str:
    """Returns the last message of the C library or C++ runtime before an abort."""
    for line in complaints.splitlines():
        if re.search(r"terminate called|what\(\)|malloc|free\(\)|corrupt|stack smashing|invalid", line):
            return line.strip()[:200]
    return ""


def _signature(kind: str, target: str, text: str) -> str:
    return f"{kind}|{target}|{re.sub(r'0x[0-9a-f]+|[-+.0-9e]+|<.*?>', '#', text)[:160]}"


def fuzz(options: Options, say=print) -> Result:
    """Makes the calls, reporting each kind of finding when it is first seen."""
    begun = time.monotonic()
    memory = mmap.mmap(-1, 8 * SLOTS * options.workers)
    shared = memoryview(memory).cast("d")
    counts: Counter[str] = Counter()
    reports: dict[str, Report] = {}
    retired = options.first  # the next call that no process has yet
    last = options.first + options.calls
    complained: set[int] = set()

    def note(kind: str, target: str, text: str, number: int, description: str) -> None:
        signature = _signature(kind, target, text)
        if signature in reports:
            reports[signature].count += 1
            return
        reports[signature] = Report(kind, target, text, number, description)
        say(f"{kind}: {target}: {text}\n    {description}\n    repeat: {options.repeat(number)}", flush=True)

    def hear(worker: Worker) -> None:
        for message in worker.messages():
            if "finding" in message:
                kind, target, text, number, description = message["finding"]
                if number not in complained:
                    complained.add(number)
                    note(kind, target, text, number, description)
            else:
                counts.update(message["counts"])

    def next_chunk() -> tuple[int, int] | None:
        nonlocal retired
        if retired >= last or time.monotonic() - begun > options.seconds:
            return None
        first, retired = retired, min(last, (retired // CHUNK + 1) * CHUNK)
        return first, retired

    workers = [Worker(slot, shared, options) for slot in range(options.workers)]
    running: list[Worker] = []
    for worker in workers:
        if chunk := next_chunk():
            worker.start(*chunk)
            running.append(worker)
    while running:
        time.sleep(0.01)
        for worker in list(running):
            hear(worker)
            now, number = time.monotonic(), int(worker.field(NUMBER))
            status = worker.ended()
            resume = None  # the call after one that ended its process
            if status is None:
                patience = IMPATIENCE if worker.field(MUCH) else options.patience
                out_of_time = now - begun > options.seconds
                if number >= 0 and now - worker.field(STARTED) > patience:
                    much = bool(worker.field(MUCH))
                    if int(worker.field(NUMBER)) != number:
                        continue
                    worker.kill()
                    hear(worker)
                    told = describe(options, number)
                    counts["much asked for, long" if much else "hangs"] += 1
                    if not much:
                        note("hang", _target_of(told), f"more than {patience:g} s", number, told)
                    resume = number + 1
                elif out_of_time:
                    worker.kill()
                    hear(worker)
                else:
                    continue
            elif status != CLEAN_EXIT:
                hear(worker)
                kind, text = summary_of_crash(status, worker.complaints())
                told = describe(options, number)
                counts["crashes"] += 1
                note(kind, _target_of(told), text, number, told)
                if number < 0:
                    raise RuntimeError(f"a process could not start: {worker.complaints()[-2000:]}")
                resume = number + 1
            hear(worker)
            worker.close()
            if resume is not None and resume < worker.end and now - begun < options.seconds:
                worker.start(resume, worker.end)
            elif chunk := next_chunk():
                worker.start(*chunk)
            else:
                running.remove(worker)
    calls = sum(int(worker.field(DONE)) for worker in workers) + counts["crashes"] + counts["hangs"]
    return Result(counts, list(reports.values()), calls, time.monotonic() - begun)


def _target_of(description: str) -> str:
    found = re.match(r"(?:torch\.ops\.xlayer|xlayer_ext\.functional)\.(\w+)", description)
    return found.group(1) if found else "?"


def tell(result: Result, say=print) -> None:
    """Prints a table of what was called, how that ended, and what was found."""
    rate = result.calls / max(result.seconds, 1e-9)
    say(f"{result.calls} calls in {result.seconds:.0f} s ({rate:.0f}/s), {len(result.reports)} kinds of findings")
    for mode in MODES:
        ends = {name.split()[-1]: n for name, n in sorted(result.counts.items()) if name.rsplit(" ", 1)[0] == mode}
        if ends:
            say(f"  {mode:17}" + "".join(f"{n:>9} {name}" for name, n in ends.items()))
    for name in ("crashes", "hangs", "much asked for, long"):
        if result.counts[name]:
            say(f"  {name}: {result.counts[name]}")
    for report in result.reports:
        say(f"  {report.kind} × {report.count}: {report.target}: {report.text}")
