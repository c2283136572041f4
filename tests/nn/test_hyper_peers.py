"""The modules against the PyPI package `hyper-connections`, with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracle import assert_near, draw, fresh_generator
from xlayer_ext.nn import HyperConnection, ManifoldHyperConnection

peers = pytest.importorskip("hyper_connections")

D = 24
SAME = {
    "dynamic_alpha_fn": "dynamic_alpha",
    "dynamic_beta_fn": "dynamic_beta",
    "dynamic_alpha_scale": "alpha_scale",
    "dynamic_beta_scale": "beta_scale",
    "pre_branch_scale": "pre_scale",
    "h_post_scale": "post_scale",
    "norm.gamma": "norm_weight",
}


def run(module: nn.Module, streams: Tensor, grads: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Returns branch input and new streams around a tanh, and the gradients of streams and parameters under our
    names."""
    streams = streams.clone().requires_grad_()
    x, add_residual = module(streams)
    out = add_residual(torch.tanh(2 * x))
    names, parameters = zip(*module.named_parameters(), strict=True)
    got = torch.autograd.grad([x, out], [streams, *parameters], grads)
    return [x, out], dict(zip(("streams", *(SAME.get(name, name) for name in names)), got, strict=True))


def compare(theirs: Any, ours: Any, tolerance: float, dtype: torch.dtype, device: str) -> None:
    generator = fresh_generator()
    for name, parameter in theirs.named_parameters():
        gain = D**-0.5 if name.endswith("_fn") else 1.0
        parameter.data = (gain * draw(generator, *parameter.shape)).to(dtype)
    ours = ours.from_hyper_connections(theirs).to(device)
    theirs.to(device)
    n = ours.expansion_rate
    for lead in ((2, 5), (3, 2, 4), (2,)):
        shape = (lead[0] * n, *lead[1:], D)
        streams = draw(generator, *shape).to(device, dtype)
        grads = [draw(generator, *lead, D).to(device, dtype), draw(generator, *shape).to(device, dtype)]
        expected, expected_grads = run(theirs, streams, grads)
        actual, actual_grads = run(ours, streams, grads)
        assert actual_grads.keys() == expected_grads.keys()
        outputs = (dict(zip(("x", "out"), side, strict=True)) for side in (actual, expected))
        assert_near(*outputs, tolerance)
        assert_near(actual_grads, {k: g.reshape(actual_grads[k].shape) for k, g in expected_grads.items()}, tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("tanh", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_hyper_connections(device: str, n: int, tanh: bool, dtype: torch.dtype) -> None:
    theirs = peers.HyperConnections(n, dim=D, layer_index=1, tanh=tanh)
    compare(theirs, HyperConnection, 1e-12 if dtype == torch.float64 else 1e-4, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_manifold_constrained_hyper_connections(device: str, n: int, dtype: torch.dtype) -> None:
    # Theirs computes in float32, whatever it is given.
    theirs = peers.ManifoldConstrainedHyperConnections(n, dim=D, layer_index=1)
    compare(theirs, ManifoldHyperConnection, 1e-4, dtype, device)


def test_a_branch_comes_along(device: str) -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor, gain: float) -> tuple[Tensor, float]:
            return gain * x.sin(), gain

    theirs = peers.HyperConnections(4, dim=D, layer_index=2, branch=Branch()).to(device)
    ours = HyperConnection.from_hyper_connections(theirs).to(device)
    streams = draw(fresh_generator(), 8, 5, D).float().to(device)
    (expected, kept), (actual, also) = theirs(streams, gain=3.0), ours(streams, gain=3.0)
    torch.testing.assert_close(actual, expected)
    assert kept == also == 3.0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_fracs": 2}, "num_fracs=2"),
        ({"num_input_views": 2}, "num_input_views=2"),
        ({"channel_first": True}, "channel_first=True"),
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"add_branch_out_to_residual": False}, "add_branch_out_to_residual=False"),
        ({"depth_residual_fn": torch.maximum}, "a depth_residual_fn of its own"),
    ],
)
def test_options_that_are_not_here_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        HyperConnection.from_hyper_connections(peers.HyperConnections(4, dim=D, **options))
