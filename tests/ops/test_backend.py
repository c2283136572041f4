"""The choice of the backend: contexts, threads, tasks, and what torch.compile makes of it."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from oracle import need_native
from xlayer_ext import _backend, backend
from xlayer_ext import functional as XF


def in_thread(function: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_one_object_can_be_entered_again() -> None:
    before, again = _backend.choice(), backend("reference")
    with again:
        with again:
            with backend("native"):
                assert _backend.choice() == "native"
            assert _backend.choice() == "reference"
        assert _backend.choice() == "reference"
    assert _backend.choice() == before


def test_threads_choose_alone() -> None:
    entered, leave = threading.Event(), threading.Event()
    shared = backend("reference")

    def hold() -> None:
        with shared:
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    before = _backend.choice()
    thread.start()
    assert entered.wait(10)
    assert _backend.choice() == before
    with shared:  # of the same object, left in another order
        leave.set()
        thread.join()
        assert _backend.choice() == "reference"
        assert in_thread(_backend.choice) == _backend._default
    assert _backend.choice() == before


def test_tasks_choose_alone() -> None:
    seen: dict[str, list[str]] = {"native": [], "reference": []}

    async def work(choice: str) -> None:
        with backend(choice):
            for _ in range(3):
                await asyncio.sleep(0)
                seen[choice].append(_backend.choice())

    async def both() -> None:
        await asyncio.gather(*(work(choice) for choice in seen))

    asyncio.run(both())
    assert seen == {choice: [choice] * 3 for choice in seen}


def test_backward_in_a_thread_of_its_own_has_the_choice_of_its_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's backend is in use in the threads that torch.autograd.backward and CUDA's engine start."""
    with backend("reference"):
        context = contextvars.copy_context()

    def chosen() -> str:
        torch._C._stash_obj_in_tls("context", context)
        return _backend.choice()

    assert in_thread(chosen) == _backend._default
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 0)
    assert in_thread(chosen) == "reference"


class Graphs:
    """A torch.compile backend that records whether each graph calls a kernel."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.native: list[bool] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.native.append("xlayer" in graph.code)
        return graph

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, backend=self)


@pytest.fixture
def native(device: str) -> str:
    need_native("masked_mean", device)
    return device


def test_compiled_functions_follow_the_context(native: str) -> None:
    graphs, x = Graphs(), torch.ones(2, 3, 4, device=native)
    ran: list[str] = []

    def mean(x: Tensor) -> Tensor:
        return XF.masked_mean(x)

    function = graphs.compile(mean)

    def run() -> None:
        before = len(graphs.native)
        function(x)
        ran.append("traced" if len(graphs.native) > before else "found")

    run()
    with backend("reference"):
        run()
        in_thread(run)
        contextvars.Context().run(run)
        run()
    run()
    assert graphs.native == [True, False]
    assert ran == ["traced", "traced", "found", "found", "found", "found"]


def test_compiled_functions_follow_tasks(native: str) -> None:
    graphs, x = Graphs(), torch.ones(2, 3, 4, device=native)
    mean = graphs.compile(lambda x: XF.masked_mean(x) if _backend.choice() == "native" else x)
    shapes: dict[str, set[int]] = {"native": set(), "reference": set()}

    async def work(choice: str) -> None:
        with backend(choice):
            for _ in range(3):
                await asyncio.sleep(0)
                shapes[choice].add(mean(x).dim())

    async def both() -> None:
        await asyncio.gather(*(work(choice) for choice in shapes))

    asyncio.run(both())
    assert shapes == {"native": {2}, "reference": {3}}


def test_choice_inside_of_a_compiled_function(native: str) -> None:
    graphs, x = Graphs(), torch.ones(2, 3, 4, device=native)

    def both(x: Tensor) -> Tensor:
        with backend("reference"):
            first = XF.masked_mean(x)
        return first + 1

    function = graphs.compile(both)
    for _ in range(2):
        assert torch.equal(function(x), torch.full((2, 4), 2.0, device=native))
    assert graphs.native == [False] and _backend._traced is None
