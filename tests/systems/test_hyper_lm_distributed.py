"""Two processes (DDP, and FSDP2 block by block) give the gradients of one, with and without recomputation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from hyper_lm_tools import gradients, make_batch, make_model
from processes import join_processes
from xlayer_systems.hyper_lm import HyperTransformer, LanguageModel
from xlayer_systems.training.trainer import gradient_norm

KINDS = ("plain", "shc", "dhc", "mhc")
CASES = [(wrapper, kind, recompute) for wrapper in ("ddp", "fsdp") for kind in KINDS for recompute in (False, True)]


def wrapped(wrapper: str, model: HyperTransformer) -> nn.Module:
    """Wraps the model as users do: DDP around all, or FSDP2 on every block by itself, then the rest."""
    from torch.distributed.fsdp import fully_shard

    if wrapper == "ddp":
        return nn.parallel.DistributedDataParallel(LanguageModel(model))
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(LanguageModel(model))


def whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    join_processes(rank, folder)
    batch = {name: value.chunk(2)[rank] for name, value in make_batch(8).items()}
    results, norms = {}, {}
    for wrapper, kind, recompute in CASES:
        model = make_model(kind).double()
        if recompute:
            model.gradient_checkpointing_enable()
        outer = wrapped(wrapper, model)
        for _ in range(2):  # the second step meets what the first left behind
            outer.zero_grad()
            outer(**batch).loss.backward()
        results[wrapper, kind, recompute] = {n: whole(p.grad).clone() for n, p in model.named_parameters()}
        norms[wrapper, kind, recompute] = gradient_norm(list(model.parameters()))
    if rank == 0:
        torch.save((results, norms), f"{folder}/gradients.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    folder: Path = tmp_path_factory.mktemp("hyper_lm")
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return torch.load(folder / "gradients.pt")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_two_processes_equal_one(results: tuple[dict, dict], case: tuple[str, str, bool]) -> None:
    found, norms = results
    expected = gradients(make_model(case[1]).double(), make_batch(8))
    assert found[case].keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[case][name], grad, rtol=1e-5, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    total = torch.stack([grad.square().sum() for grad in expected.values()]).sum().sqrt()
    assert norms[case] == pytest.approx(float(total), rel=1e-5)
