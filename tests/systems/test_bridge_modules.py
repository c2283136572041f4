"""Normalizer, resampler, output scales and the diffusion bridge."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from oracle import draw, fresh_generator
from xlayer_systems.telepathy.diffusion import CONDITIONINGS, DiffusionBridge, timestep_embedding
from xlayer_systems.telepathy.resampler import PerceiverResampler, RMSScale, StatisticalNormalizer, TanhScale

SOURCE, TARGET, TOKENS = 12, 16, 3


def states(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Draws hidden states ``[4, 6, 12]`` and a mask with padding; every row has a token that is not masked."""
    generator = fresh_generator()
    mask = torch.rand(4, 6, generator=generator) < 0.6
    mask[:, 2] = True
    return draw(generator, 4, 6, SOURCE, dtype=dtype), mask


def resampler(**options: Any) -> PerceiverResampler:
    torch.manual_seed(0)
    return PerceiverResampler(SOURCE, TARGET, TOKENS, **{"num_layers": 2, "num_heads": 2, **options})


def diffusion(conditioning: str = "hybrid", moved: bool = True) -> DiffusionBridge:
    """Makes a diffusion bridge; with ``moved`` all that starts as zero is random, so that every path matters."""
    torch.manual_seed(0)
    bridge = DiffusionBridge(
        SOURCE, TARGET, TOKENS, hidden_size=16, num_layers=2, num_heads=2, conditioning=conditioning
    )
    if moved:
        for parameter in bridge.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.2)
    return bridge


class Flow(nn.Module):
    """The velocity at fixed noise and times, as a module of states and mask."""

    def __init__(self, bridge: DiffusionBridge) -> None:
        super().__init__()
        self.bridge = bridge
        generator = torch.Generator().manual_seed(1)
        self.register_buffer("x_t", torch.randn(4, TOKENS, TARGET, generator=generator))
        self.register_buffer("t", torch.rand(4, generator=generator))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.bridge(x, mask, self.x_t[: len(x)], self.t[: len(x)])


MODULES = {"resampler": resampler, **{name: lambda name=name: Flow(diffusion(name)) for name in CONDITIONINGS}}


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> nn.Module:
    return MODULES[request.param]()


# ---- what they share -------------------------------------------------------------------------------------------------


def test_masked_states_change_nothing(module: nn.Module) -> None:
    x, mask = states()
    expected = module(x, mask)
    spoiled = x.masked_fill(~mask.unsqueeze(-1), float("nan")).requires_grad_()
    out = module(spoiled, mask)
    assert torch.equal(out, expected) and out.shape == (4, TOKENS, TARGET)
    (grad,) = torch.autograd.grad(out.square().sum(), spoiled)
    assert grad.isfinite().all() and not grad[~mask].any() and grad[mask].any()


def test_padding_changes_next_to_nothing(module: nn.Module) -> None:
    x, _ = states()
    longer = torch.cat([x, torch.full((4, 5, SOURCE), float("inf"))], 1)
    mask = torch.arange(11).expand(4, 11) < 6
    torch.testing.assert_close(module(longer, mask), module(x, None), rtol=1e-4, atol=1e-5)


def test_a_row_that_may_read_nothing_is_finite_and_reads_nothing(module: nn.Module) -> None:
    x, mask = states()
    mask[1] = False
    x = x.requires_grad_()
    out = module(x, mask)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert out.isfinite().all() and grad.isfinite().all() and not grad[1].any()
    other = x.detach().clone()
    other[1] += 1
    assert torch.equal(module(other, mask), out)


def test_compile_makes_one_graph(module: nn.Module) -> None:
    torch._dynamo.reset()
    x, mask = states()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mask), module(x, mask))


def test_checkpointing_changes_no_bit(module: nn.Module) -> None:
    x, mask = states()
    parameters = [p for p in module.parameters() if p.requires_grad]
    plain = torch.autograd.grad(module(x, mask).square().sum(), parameters, allow_unused=True)
    again = torch.autograd.grad(
        checkpoint(module, x, mask, use_reentrant=False).square().sum(), parameters, allow_unused=True
    )
    assert all(a is b or torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_autocast_and_state(module: nn.Module) -> None:
    x, mask = states()
    expected = module(x, mask)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x, mask)
    assert (out.float() - expected).norm() < 0.05 * expected.norm()
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x, mask), expected)


@pytest.mark.parametrize("module_class", [PerceiverResampler, DiffusionBridge])
def test_heads_must_divide_the_width(module_class: Any) -> None:
    arguments = {"num_layers": 1, "num_heads": 5, "hidden_size": 16}
    with pytest.raises(ValueError, match="num_heads"):
        module_class(SOURCE, TARGET, TOKENS, **arguments)
    with pytest.raises(ValueError, match="conditioning must be one of pooled, cross, hybrid; got 'none'"):
        DiffusionBridge(SOURCE, TARGET, TOKENS, 16, 1, 2, conditioning="none")


# ---- normalizer and scales -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("target_dim", [SOURCE, 5])
def test_calibration_gives_the_targets_statistics(target_dim: int, learnable: bool) -> None:
    generator = fresh_generator()
    gain = torch.rand(SOURCE, generator=generator) * 50
    batches = []
    for length in (5, 1, 9):
        x = 1e3 + draw(generator, 3, length, SOURCE, dtype=torch.float32) * gain
        mask = torch.rand(3, length, generator=generator) < 0.7
        mask[0, 0] = True
        batches.append((x.masked_fill(~mask.unsqueeze(-1), float("nan")), mask))
    batches.append((torch.full((1, 2, SOURCE), float("nan")), torch.zeros(1, 2, dtype=torch.bool)))
    table = 0.03 * draw(generator, 40, target_dim, dtype=torch.float32) + 0.01
    normalizer = StatisticalNormalizer(SOURCE, target_dim, learnable=learnable)
    x = torch.cat([x[mask] for x, mask in batches])
    assert torch.equal(normalizer(x), x / (1 + 1e-6))  # the identity before
    normalizer.calibrate(batches, table)
    out = normalizer(x).double()
    wanted = table.double() if target_dim == SOURCE else table.double().reshape(-1, 1)
    torch.testing.assert_close(out.mean(0), wanted.mean(0).expand(SOURCE), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        out.std(0, unbiased=False), wanted.std(0, unbiased=False).expand(SOURCE), rtol=1e-3, atol=1e-6
    )
    assert len(list(normalizer.parameters())) == 4 * learnable
    assert all(parameter.dim() == 1 for parameter in normalizer.parameters())


def test_calibration_needs_states() -> None:
    with pytest.raises(ValueError, match="at least one state"):
        StatisticalNormalizer(3, 3).calibrate([(torch.ones(1, 2, 3), torch.zeros(1, 2).bool())], torch.ones(2, 3))


def test_scales_bound_what_goes_out() -> None:
    x = (100 * draw(fresh_generator(), 5, 64, dtype=torch.float32)).requires_grad_()
    rms = RMSScale(0.03)(x)
    torch.testing.assert_close(rms.square().mean(-1).sqrt(), torch.full((5,), 0.03))
    torch.testing.assert_close(RMSScale(0.03)(1e3 * x), rms)
    tanh = TanhScale(0.03)(x)
    assert tanh.abs().max() <= 0.03
    grads = [torch.autograd.grad(out.sum(), x, retain_graph=True)[0].abs().mean() for out in (rms, tanh)]
    assert grads[0] > 0
    zero = torch.zeros(2, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(RMSScale(0.03)(zero).sum(), zero)
    assert grad.isfinite().all()
    assert RMSScale(1.0)(x.bfloat16()).dtype == torch.bfloat16 and RMSScale(1.0).scale.dim() == 1


# ---- diffusion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_the_velocity_starts_as_zero_and_sampling_repeats(conditioning: str) -> None:
    x, mask = states()
    fresh = diffusion(conditioning, moved=False)
    assert not fresh(x, mask, torch.randn(4, TOKENS, TARGET), torch.rand(4)).any()
    bridge = diffusion(conditioning)
    first, second = (bridge.sample(x, mask, 4, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (4, TOKENS, TARGET)
    assert not torch.equal(first, bridge.sample(x, mask, 4, torch.Generator().manual_seed(4)))
    parameters = list(bridge.parameters())
    grads = torch.autograd.grad(first.square().sum(), parameters)
    assert all(grad.any() for grad in grads)


def test_euler_steps_follow_the_velocity() -> None:
    x, mask = states()
    bridge = diffusion()
    expected = torch.randn(4, TOKENS, TARGET, generator=torch.Generator().manual_seed(5))
    for t in (0.0, 0.5):
        expected = expected + bridge(x, mask, expected, torch.full((4,), t)) / 2
    actual = bridge.sample(x, mask, 2, torch.Generator().manual_seed(5))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_the_flow_learns_which_of_two_points(conditioning: str) -> None:
    """Trained on two points that the source tells apart, the velocity costs far less than without the source, and
    samples land on the right point."""
    torch.manual_seed(0)
    points = torch.randn(2, 1, 4).repeat(1, 2, 1)
    bridge = DiffusionBridge(
        3, 4, 2, hidden_size=32, num_layers=2, num_heads=2, conditioning=conditioning, target_scale=0.5
    )
    optimizer = torch.optim.AdamW(bridge.parameters(), lr=3e-3)
    losses = []
    for _ in range(350):
        which = torch.randint(2, (64,))
        x = torch.nn.functional.one_hot(which, 3).float().unsqueeze(1).repeat(1, 2, 1)
        loss = bridge.loss(x, None, points[which])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < 0.3 * losses[0]
    which = torch.arange(2).repeat(8)
    x = torch.nn.functional.one_hot(which, 3).float().unsqueeze(1).repeat(1, 2, 1)
    made = bridge.sample(x, None, 10, torch.Generator().manual_seed(0))
    near = (made.unsqueeze(1) - points.unsqueeze(0)).square().sum((2, 3)).argmin(1)
    assert torch.equal(near, which)


def test_timesteps_are_told_apart() -> None:
    embedded = timestep_embedding(torch.linspace(0, 1, 50), 16)
    assert embedded.shape == (50, 16) and torch.cdist(embedded, embedded).add(torch.eye(50)).min() > 1e-3
