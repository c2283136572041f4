"""Two processes (DDP, and FSDP2 layer by layer) give the gradients of one, in both phases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from lformer_tools import make_trainee, toy_data
from xlayer_systems.lformer import AGGREGATORS

CASES = [(wrapper, kind, step) for wrapper in ("ddp", "fsdp") for kind in AGGREGATORS for step in (0, 1)]


def batch(rank: int = 0, world: int = 1) -> tuple[Any, dict[str, Tensor]]:
    data = toy_data()
    share = slice(rank * 32 // world, (rank + 1) * 32 // world)
    return data, data.collate(data.train[:32][share])


def gradients(kind: str, step: int, wrapper: str | None = None, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """Computes the gradients of step 0 in phase A, or of step 1 in phase B after a step of phase A."""
    data, inputs = batch(rank, world)
    trainee = make_trainee(data, aggregator=kind, blend_into_lm=kind == "ema").double().train()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    outer: Any = trainee
    if wrapper == "ddp":
        outer = nn.parallel.DistributedDataParallel(trainee, find_unused_parameters=True)
    elif wrapper == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for layer in trainee.model.base.model.layers:
            fully_shard(layer)
        outer = fully_shard(trainee)
    for number in range(step + 1):
        trainee.begin_step(number)
        outer.zero_grad()
        outer(**inputs).loss.backward()
    found = {name: p.grad for name, p in trainee.named_parameters() if p.grad is not None}
    return {n: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for n, g in found.items()}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {case: gradients(case[1], case[2], case[0], rank, 2) for case in CASES}
    if rank == 0:
        torch.save(results, f"{folder}/gradients.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("lformer")
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return torch.load(folder / "gradients.pt")


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_two_processes_give_the_gradients_of_one(results: Any, case: tuple[str, str, int]) -> None:
    expected, found = gradients(*case[1:]), results[case]
    assert found.keys() == expected.keys()
    assert any(".layers.3." in name for name in found) == (case[2] == 1)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
