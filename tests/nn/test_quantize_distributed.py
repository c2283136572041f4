"""Two processes under DDP without broadcast buffers have one codebook: that of one process on the joined batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from processes import join_processes, run_processes
from xlayer_ext.nn import VectorQuantizer

WORLD, STEPS, ROWS, D, K = 2, 20, 48, 5, 24
KINDS: dict[str, dict[str, Any]] = {
    "ema": {},
    "cosine": {"metric": "cosine"},
    "learned": {"ema": False, "threshold_ema_dead_code": 0.0},
    "kmeans": {"kmeans_init": True},
}
Result = tuple[list[dict[str, Tensor]], int]


class Net(nn.Module):
    """A linear layer and a quantizer whose codes die often enough."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        options = {"threshold_ema_dead_code": 0.6, **KINDS[kind]}
        self.quantizer = VectorQuantizer(D, K, decay=0.8, **options)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        hidden = x + 0.1 * self.linear(x)
        out = self.quantizer(hidden, mask)
        return (out.quantized - x).square().mean() + out.loss


def batches() -> list[tuple[Tensor, Tensor]]:
    """Draws rows around centers that move, so that codes fall out of use; both halves mask equally many."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for step in range(STEPS):
        centers = 3 * torch.randn(K, D, generator=generator) if step % 7 == 0 else centers  # noqa: F821
        which = torch.randint(K // 2, (ROWS,), generator=generator)
        mask = torch.ones(ROWS, dtype=torch.bool)
        mask[[3, ROWS // 2 + 9]] = False
        found.append((centers[which] + 0.05 * torch.randn(ROWS, D, generator=generator), mask))
    return found


def train(kind: str, rank: int = 0, world: int = 1) -> Result:
    """Returns the states after every step, and how many codes were revived."""
    torch.manual_seed(1)
    net = Net(kind)
    quantizer = net.quantizer
    outer: Any = net
    if world > 1:
        outer = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    states, revived = [], 0
    revive = quantizer._revive

    def counting(*arguments: Tensor) -> None:
        nonlocal revived
        before = quantizer.sizes < quantizer.threshold_ema_dead_code
        revive(*arguments)
        revived += int((before & (quantizer.sizes > quantizer.threshold_ema_dead_code)).sum())

    quantizer._revive = counting  # type: ignore[method-assign]
    for x, mask in batches():
        share = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
        optimizer.zero_grad()
        outer(x[share], mask[share]).backward()
        optimizer.step()
        states.append({name: value.clone() for name, value in net.state_dict().items()})
    return states, revived


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    join_processes(rank, folder, WORLD)
    torch.save({kind: train(kind, rank, WORLD) for kind in KINDS}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, device: str) -> list[dict[str, Result]]:
    return run_processes(worker, tmp_path_factory.mktemp("quantize"), device, WORLD)


@pytest.mark.parametrize("kind", KINDS)
def test_both_processes_have_the_same_codebook_bit_for_bit(results: list[dict[str, Result]], kind: str) -> None:
    (first, revived), (second, _) = results[0][kind], results[1][kind]
    assert revived > 10 or kind == "learned"  # codes died and were set to rows of either process
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_that_of_one_process_on_the_joined_batch(results: list[dict[str, Result]], kind: str) -> None:
    expected, revived = train(kind)
    found, also_revived = results[0][kind]
    assert revived == also_revived
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        for name, value in b.items():
            torch.testing.assert_close(
                a[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name, s=step: f"{n} after step {s}: {m}"
            )
