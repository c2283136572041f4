"""Hyper-connections in two processes, wrapped by DDP and FSDP2: the gradients are those of one process."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hyper_module_tools import KINDS, D, randomize
from processes import assert_same_gradients, join_processes, run_processes, whole_gradients

pytestmark = pytest.mark.operators

WORLD, BATCH, TOKENS, N = 2, 4, 6, 3


class Block(nn.Module):
    """Two sublayers; returns streams, the last sublayer's output and its coefficients, as a model's layers do."""

    def __init__(self, kind: str, index: int) -> None:
        super().__init__()
        self.first, self.second = (KINDS[kind](D, expansion_rate=N, layer_index=2 * index + i) for i in range(2))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(2))

    def forward(self, state: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        begins = isinstance(state, Tensor)
        state = (state, *self.first.pre(state)) if begins else self.first.boundary(*state)
        streams, x, coefficients = self.second.boundary(state[0], self.mlps[0](state[1]), state[2])
        return streams, self.mlps[1](x), coefficients


class Net(nn.Module):
    def __init__(self, kind: str, recompute: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(kind, index) for index in range(2))
        self.last, self.recompute = KINDS[kind](D, expansion_rate=N, layer_index=4), recompute

    def forward(self, streams: Tensor) -> Tensor:
        state: Any = streams
        for block in self.blocks:
            state = checkpoint(block, state, use_reentrant=False) if self.recompute else block(state)
        streams, x, coefficients = self.last.boundary(*state)
        return self.last.post(streams, x.sin(), coefficients)


CASES = list(itertools.product(("ddp", "fsdp2"), KINDS, (False, True)))


def build(kind: str, recompute: bool) -> nn.Module:
    torch.manual_seed(7)
    return randomize(Net(kind, recompute).double(), torch.Generator().manual_seed(8))


def gradients(net: nn.Module, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """Computes the gradients of the mean loss from this rank's share of the global batch."""
    generator = torch.Generator().manual_seed(11)
    x, target = (torch.randn(BATCH, TOKENS, N, D, generator=generator, dtype=torch.float64) for _ in range(2))
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    (net(x[share]) - target[share]).square().mean().backward()
    return whole_gradients(net)


def distributed_gradients(wrapper: str, kind: str, recompute: bool, rank: int) -> dict[str, Tensor]:
    net: Any = build(kind, recompute)
    if wrapper == "ddp":
        return gradients(nn.parallel.DistributedDataParallel(net), rank, WORLD)
    from torch.distributed.fsdp import fully_shard

    for block in net.blocks:
        fully_shard(block)
    return gradients(fully_shard(net), rank, WORLD)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    join_processes(rank, folder, WORLD)
    torch.save({case: distributed_gradients(*case, rank) for case in CASES}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, device: str) -> list[dict[Any, dict[str, Tensor]]]:
    return run_processes(worker, tmp_path_factory.mktemp("distributed"), device, WORLD)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_two_processes_give_the_gradients_of_one(
    results: list[dict[Any, dict[str, Tensor]]], case: tuple[str, str, bool]
) -> None:
    expected = gradients(build(case[1], recompute=False))
    for rank in range(WORLD):
        assert_same_gradients(results[rank][case], expected)
    assert all(grad.abs().max() > 1e-6 for grad in expected.values())  # so that a lost share would show
