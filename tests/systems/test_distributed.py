"""Two processes, DDP and FSDP2, give the gradients of one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from processes import join_processes, run_processes
from xlayer_ext.nn import HDIMMessage, LayerRouter, QKVMessage

WORLD, BATCH, TOKENS, H = 2, 4, 6, 32


# Every net maps (layers [L, B, S, H], mask [B, S]) to (output [B, S, H], entropy []); the entropy is added to the loss.
Output = tuple[Tensor, Tensor]


class HDIMNet(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.message = HDIMMessage(H, proj_dim=8, mlp_dim=12, dropout=0.0, **options)

    def forward(self, layers: Tensor, mask: Tensor) -> Output:
        return self.message(layers[0], layers[1], key_mask=mask, return_entropy=True)


class QKVNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.message = QKVMessage(4, 8, dropout=0.0, extra_value_projection=True)

    def forward(self, layers: Tensor, mask: Tensor) -> Output:
        return self.message(layers[0], layers[1], layers[2], key_mask=mask), layers.new_zeros(())


class RouterNet(nn.Module):
    def __init__(self, weighting: str) -> None:
        super().__init__()
        self.router = LayerRouter(H, route_dim=16, top_k=2, weighting=weighting)

    def forward(self, layers: Tensor, mask: Tensor) -> Output:
        summaries = torch.stack([self.router.summarize(layer, mask) for layer in layers])
        indices, weights = self.router(summaries[0], summaries[1:])
        chosen = layers[1:][indices.t(), torch.arange(layers.shape[1])]  # [k, B, S, H]
        return (weights.t()[:, :, None, None] * chosen).sum(0), layers.new_zeros(())


class Block(nn.Module):
    """Routes to two of the layers so far, and adds both messages."""

    def __init__(self) -> None:
        super().__init__()
        self.route = RouterNet("full_softmax")
        self.qkv, self.hdim = QKVNet(), HDIMNet(value_residual=True, alpha_init=0.5, norm_projections=True)
        self.norm = nn.LayerNorm(H)

    def forward(self, layers: Tensor, mask: Tensor) -> Output:
        source, _ = self.route(layers, mask)
        pair = torch.stack([layers[0], source, source])
        (qkv, _), (hdim, entropy) = self.qkv(pair, mask), self.hdim(pair, mask)
        return self.norm(layers[0] + qkv + hdim), entropy


class SmallNet(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.blocks, self.checkpointed = nn.ModuleList([Block(), Block()]), checkpointed

    def forward(self, layers: Tensor, mask: Tensor) -> Output:
        entropy = layers.new_zeros(())
        for block in self.blocks:
            out = checkpoint(block, layers, mask, use_reentrant=False) if self.checkpointed else block(layers, mask)
            layers, entropy = torch.cat([out[0].unsqueeze(0), layers]), entropy + out[1]
        return layers[0], entropy


NETS: dict[str, Callable[[], nn.Module]] = {
    "hdim": HDIMNet,
    "hdim bilinear": lambda: HDIMNet(scorer="bilinear", share_projections=True),
    "qkv": QKVNet,
    "router": lambda: RouterNet("full_softmax"),
    "router as published": lambda: RouterNet("topk_softmax"),
    "net": lambda: SmallNet(checkpointed=False),
    "net, checkpointed": lambda: SmallNet(checkpointed=True),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(7)
    return NETS[name]()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Draws the global batch, the same in every process: layers [L, B, S, H], mask [B, S] and target [B, S, H]."""
    generator = torch.Generator().manual_seed(11)
    layers = torch.randn(4, BATCH, TOKENS, H, generator=generator)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    mask[::2, 4:] = False
    return layers, mask, torch.randn(BATCH, TOKENS, H, generator=generator)


def gradients(net: nn.Module, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """Computes the gradients of the mean loss from this rank's share of the global batch."""
    layers, mask, target = batch()
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    out, entropy = net(layers[:, share], mask[share])
    ((out - target[share]).square().sum(-1).mean() + entropy).backward()
    grads = {name.removeprefix("module."): parameter.grad for name, parameter in net.named_parameters()}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}


def distributed_gradients(name: str, wrapper: str, rank: int) -> dict[str, Tensor]:
    net = build(name)
    if wrapper == "ddp":
        return gradients(nn.parallel.DistributedDataParallel(net), rank, WORLD)
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (WORLD,))
    for block in getattr(net, "blocks", ()):
        fully_shard(block, mesh=mesh)
    return gradients(fully_shard(net, mesh=mesh), rank, WORLD)


def worker(rank: int, folder: str) -> None:
    """Runs every net under every wrapper in one pair of processes: starting them costs more than all the rest."""
    torch.set_num_threads(1)
    join_processes(rank, folder, WORLD)
    results = {key: distributed_gradients(*key, rank) for key in itertools.product(NETS, ("ddp", "fsdp2"))}
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, device: str) -> list[dict[tuple[str, str], dict[str, Tensor]]]:
    return run_processes(worker, tmp_path_factory.mktemp("distributed"), device, WORLD)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", NETS)
def test_two_processes_give_the_gradients_of_one(
    results: list[dict[tuple[str, str], dict[str, Tensor]]], name: str, wrapper: str
) -> None:
    expected = gradients(build(name))
    for rank in range(WORLD):
        actual = results[rank][name, wrapper]
        assert actual.keys() == expected.keys()
        for parameter, grad in actual.items():
            torch.testing.assert_close(
                grad, expected[parameter], rtol=1e-5, atol=1e-5, msg=lambda m, n=parameter: f"{n}: {m}"
            )
    acting = [grad for parameter, grad in expected.items() if not parameter.endswith(("pair_out.bias", "key.bias"))]
    assert all(grad.abs().max() > 1e-4 for grad in acting)  # far above the tolerance, so that a lost share would show


def test_checkpointing_changes_no_bit() -> None:
    plain, checkpointed = gradients(build("net")), gradients(build("net, checkpointed"))
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
