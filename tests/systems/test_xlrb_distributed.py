"""Two processes (DDP, and FSDP2 layer by layer) give the gradients of one, with and without recomputation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from processes import join_processes
from xlayer_systems.xlrb import PRESETS, XLRBClassifier, XLRBConfig
from xlrb_tools import gradients, make_batch, make_classifier

CONFIGS = {
    "H9": replace(PRESETS["H9"], dropout=0.0, router_weight="full_softmax"),
    "A12": replace(PRESETS["A12"], dropout=0.0),
}
CASES = [(wrapper, id, recompute) for wrapper in ("ddp", "fsdp") for id in CONFIGS for recompute in (False, True)]


def shard(model: XLRBClassifier) -> nn.Module:
    """Applies FSDP2 as users do: every encoder layer by itself, then the rest."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.encoder.encoder.layer:
        fully_shard(layer)
    return fully_shard(model)


def whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def wrapped(wrapper: str, config: XLRBConfig, recompute: bool) -> nn.Module:
    model = make_classifier(config).double()
    if recompute:
        model.gradient_checkpointing_enable()
    return nn.parallel.DistributedDataParallel(model) if wrapper == "ddp" else shard(model)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    join_processes(rank, folder)
    batch = {name: value.chunk(2)[rank] for name, value in make_batch(size=8).items()}
    results = {}
    for wrapper, id, recompute in CASES:
        model = wrapped(wrapper, CONFIGS[id], recompute)
        for _ in range(2):  # the second step meets what the first left behind
            model.zero_grad()
            model(**batch).loss.backward()
        grads = {n.removeprefix("module."): whole(p.grad).clone() for n, p in model.named_parameters()}
        results[wrapper, id, recompute] = grads
        usage = getattr(model, "module", model).usage()["layers"]["7"]  # rank 0 alone may ask
        assert sum(usage["sources"]) == 8 * CONFIGS[id].top_k and abs(usage["gate_hdim"] - 0.05) < 1e-6
    if rank == 0:
        torch.save(results, f"{folder}/gradients.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder: Path = tmp_path_factory.mktemp("xlrb")
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return torch.load(folder / "gradients.pt")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_two_processes_equal_one(results: dict, case: tuple[str, str, bool]) -> None:
    _, expected = gradients(make_classifier(CONFIGS[case[1]]).double(), make_batch(size=8))
    assert results[case].keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(results[case][name], grad, rtol=1e-5, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
