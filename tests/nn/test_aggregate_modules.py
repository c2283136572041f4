"""TapProjector, EMAAggregator, GRUAggregator and DepthAttentionAggregator."""

from __future__ import annotations

import copy
import doctest
import importlib
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from oracle import draw, fresh_generator
from processes import assert_same_gradients, join_processes, run_processes, whole_gradients
from xlayer_ext import backend
from xlayer_ext.nn import DepthAttentionAggregator, EMAAggregator, GRUAggregator, TapProjector
from xlayer_ext.nn.aggregate import POOLINGS

L, B, S, MODEL, D = 5, 3, 7, 12, 8
KINDS: dict[str, Callable[..., Any]] = {
    "ema": EMAAggregator,
    "tree": lambda *a: EMAAggregator(*a, tree_checkpoint=2),
    "gru": GRUAggregator,
    "attn": lambda *a: DepthAttentionAggregator(*a, num_heads=2, window=3),
}


def make(kind: str, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Any:
    """Makes an aggregator whose every parameter matters."""
    generator = fresh_generator()
    module = KINDS[kind](L, D).to(device, dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * draw(generator, *parameter.shape).to(parameter)
    return module


def taps_of(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Tensor:
    return draw(fresh_generator(), *shape).to(device, dtype)


# ---- Aggregators as loops --------------------------------------------------------------------------------------------


def ema_loop(module: EMAAggregator, taps: Tensor) -> Tensor:
    states, kept, carried = [], torch.zeros_like(taps[0]), torch.zeros_like(taps[0])
    up, act, norm, down = module.phi
    for layer, tap in enumerate(taps):
        hidden = F.layer_norm(act(tap @ up.weight.T + up.bias), norm.normalized_shape, norm.weight, norm.bias)
        phi = F.layer_norm(hidden @ down.weight.T + down.bias, (D,), module.norm_weight, module.norm_bias)
        alpha = 1 / (1 + torch.exp(-module.gate_logits[layer]))
        carried = (1 - alpha) * carried + alpha * phi
        k = module.tree_checkpoint
        if k and (layer + 1) % k == 0:
            beta = module.tree_gate_logits[(layer + 1) // k - 1].sigmoid()
            kept = (1 - beta) * kept + beta * carried
        states.append(carried + kept)
    return torch.stack(states)


def gru_loop(module: GRUAggregator, taps: Tensor) -> Tensor:
    cell = nn.GRUCell(D, D).to(taps)
    cell.load_state_dict(module.state_dict())
    parameters = dict(module.named_parameters())
    state, states = torch.zeros_like(taps[0]).reshape(-1, D), []
    for tap in taps:
        state = torch.func.functional_call(cell, parameters, (tap.reshape(-1, D), state))
        states.append(state.reshape(tap.shape))
    return torch.stack(states)


def attention_loop(module: DepthAttentionAggregator, taps: Tensor) -> Tensor:
    state, states = torch.zeros_like(taps[0]), []
    for layer in range(L):
        last = taps[max(0, layer - module.window + 1) : layer + 1]
        q, k, v = state @ module.weight_query.T, last @ module.weight_key.T, last @ module.weight_value.T
        parts = []
        for head in range(module.num_heads):
            of = slice(head * D // module.num_heads, (head + 1) * D // module.num_heads)
            score = (q[..., of] * k[..., of]).sum(-1, keepdim=True) / (D / module.num_heads) ** 0.5
            parts.append((score.softmax(0) * v[..., of]).sum(0))
        state = state + torch.cat(parts, -1) @ module.weight_out.T
        states.append(state)
    return torch.stack(states)


LOOPS: dict[str, Callable[..., Tensor]] = {
    "ema": ema_loop, "tree": ema_loop, "gru": gru_loop, "attn": attention_loop
}  # fmt: skip


@pytest.mark.parametrize("shape", [(L, B, D), (L, B, S, D), (L, D)])
@pytest.mark.parametrize("kind", KINDS)
def test_states_and_gradients_are_those_of_the_loop(device: str, kind: str, shape: tuple[int, ...]) -> None:
    module, taps = make(kind, device), taps_of(*shape, device=device).requires_grad_()
    leaves = [taps, *module.parameters()]
    found, wanted = module(taps), LOOPS[kind](module, taps)
    assert found.shape == shape
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    cotangent = draw(fresh_generator(), *shape).to(device)
    grads = [torch.autograd.grad(out, leaves, cotangent) for out in (found, wanted)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(module(taps, last_only=True), wanted[-1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_taps_may_be_a_list(kind: str) -> None:
    module = make(kind)
    taps = draw(fresh_generator(), L, B, S, D)
    for given in (list(taps), tuple(taps)):
        assert torch.equal(module(given), module(taps))
    with pytest.raises(ValueError, match=r"taps must be 5 tensors \[\.\.\., 8\] of one shape, got \[3, 7, 8\]$"):
        module([taps[0]])


def test_a_states_token_sees_no_other_token() -> None:
    for kind in KINDS:
        module, taps = make(kind), taps_of(L, B, S, D)
        other = taps.clone()
        other[:, :, 4:] += 1
        assert torch.equal(module(taps)[:, :, :4], module(other)[:, :, :4]), kind


def test_gates_start_at_an_eighth_and_can_be_penalized() -> None:
    module = EMAAggregator(L, D, tree_checkpoint=2)
    torch.testing.assert_close(module.gates, torch.full((L,), 0.11920292))
    alpha = torch.cat([module.gates, module.tree_gate_logits.detach().sigmoid()])
    assert len(alpha) == L + 2
    penalty = module.gate_penalty(l1=0.5, l2=2.0)
    torch.testing.assert_close(penalty, 0.5 * alpha.sum() + 2 * alpha.square().sum())
    penalty.backward()
    slope = alpha * (1 - alpha) * (0.5 + 4 * alpha)
    torch.testing.assert_close(torch.cat([module.gate_logits.grad, module.tree_gate_logits.grad]), slope)
    assert not module.gates.requires_grad


@pytest.mark.parametrize("kind", ["gru", "attn"])
def test_kinds_without_gates_say_so(kind: str) -> None:
    module = make(kind)
    assert module.gates is None
    with pytest.raises(ValueError, match="has no gates per layer"):
        module.gate_penalty(l1=1.0)


def test_a_cell_is_taken_over() -> None:
    cell = nn.GRUCell(D, D, dtype=torch.float64)
    made, taps = GRUAggregator.from_cell(cell, L), taps_of(L, B, D)
    state = torch.zeros(B, D, dtype=torch.float64)
    for tap in taps:
        state = cell(tap, state)
    torch.testing.assert_close(made(taps, last_only=True), state, rtol=1e-10, atol=1e-12)
    assert made.weight_ih.data_ptr() != cell.weight_ih.data_ptr()
    for wrong in (nn.GRUCell(D, D, bias=False), nn.GRUCell(D + 1, D)):
        with pytest.raises(ValueError, match="cell must have biases"):
            GRUAggregator.from_cell(wrong, L)


# ---- The projector ---------------------------------------------------------------------------------------------------


def projector(pooling: str | None, device: str = "cpu", dtype: torch.dtype = torch.float64) -> TapProjector:
    made = TapProjector(L, MODEL, D, pooling=pooling).to(device, dtype)
    if pooling == "attention":
        made.query.data = draw(fresh_generator(), L, MODEL).to(device, dtype)
    return made


def some_mask(device: str = "cpu") -> Tensor:
    mask = torch.rand(B, S, generator=fresh_generator()) < 0.6
    mask[:, 3] = True
    return mask.to(device)


def projector_loop(module: TapProjector, taps: Tensor, mask: Tensor | None) -> Tensor:
    """Computes taps one layer and one sequence after another, over the unmasked tokens alone."""
    layers = []
    for layer, hidden in enumerate(taps):
        rows = []
        for b, sequence in enumerate(hidden):
            tokens = F.layer_norm(sequence if mask is None else sequence[mask[b]], (MODEL,))
            if module.pooling == "mean":
                tokens = tokens.mean(0)
            elif module.pooling == "attention":
                tokens = (tokens @ module.query[layer] / MODEL**0.5).softmax(0) @ tokens
            elif module.pooling is not None:
                tokens = tokens[0 if module.pooling == "first" else -1]
            rows.append(tokens @ module.weight[layer].T + module.bias[layer])
        layers.append(torch.stack(rows))
    return torch.stack(layers)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooled_taps_are_those_of_the_loop(device: str, pooling: str, masked: bool) -> None:
    module, taps = projector(pooling, device), taps_of(L, B, S, MODEL, device=device)
    mask = some_mask(device) if masked else None
    given = taps if mask is None else taps.masked_fill(~mask[..., None], float("nan"))
    leaves = [given.requires_grad_(), *module.parameters()]
    found = module(list(given), mask)
    plain = taps.clone().requires_grad_()
    wanted = projector_loop(module, plain, mask)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    cotangent = draw(fresh_generator(), L, B, D).to(device)
    grads = torch.autograd.grad(found, leaves, cotangent)
    for a, b in zip(grads, torch.autograd.grad(wanted, [plain, *module.parameters()], cotangent), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_without_pooling_every_token_has_its_own(device: str) -> None:
    module, taps, mask = projector(None, device), taps_of(L, B, S, MODEL, device=device), some_mask(device)
    found = module(taps)
    torch.testing.assert_close(found, projector_loop(module, taps, None), rtol=1e-10, atol=1e-12)
    masked = module(taps.masked_fill(~mask[..., None], float("nan")), mask)
    assert torch.equal(masked[:, mask], found[:, mask])
    assert torch.equal(masked[:, ~mask], module.bias[:, None].expand(-1, int((~mask).sum()), -1))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_sequence_in_which_nothing_counts_gives_the_bias(pooling: str) -> None:
    module, mask = projector(pooling), some_mask()
    mask[1] = False
    taps = taps_of(L, B, S, MODEL).masked_fill(~mask[..., None], float("nan")).requires_grad_()
    found = module(taps, mask)
    torch.testing.assert_close(found[:, 1], module.bias.detach().requires_grad_(), rtol=0, atol=1e-12)
    found.sum().backward()
    assert taps.grad is not None and taps.grad.isfinite().all() and not taps.grad[:, 1].any()


def test_dropout_is_of_the_projections_and_in_training_alone() -> None:
    module = TapProjector(L, MODEL, D, dropout=0.5)
    taps = taps_of(L, B, S, MODEL, dtype=torch.float32)
    share = (module(taps) == 0).double().mean()
    assert 0.4 < share < 0.6
    assert (module.eval()(taps) != 0).all()


# ---- Both: what every module must stand ------------------------------------------------------------------------------


class Path_(nn.Module):
    """Taps to the last state."""

    def __init__(self, kind: str, pooling: str | None = "mean") -> None:
        super().__init__()
        self.projector = TapProjector(L, MODEL, D, pooling=pooling)
        self.aggregator = KINDS[kind](L, D)

    def forward(self, taps: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.aggregator(self.projector(taps, mask), last_only=True)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_deepcopy_and_pickle(kind: str) -> None:
    first, second = Path_(kind), Path_(kind)
    taps, mask = taps_of(L, B, S, MODEL, dtype=torch.float32), some_mask()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    wanted = first(taps, mask)
    for other in (second, copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert torch.equal(other(taps, mask), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_is_near_float32(device: str, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = Path_(kind).to(device)
    taps = taps_of(L, B, S, MODEL, device=device, dtype=torch.float32)
    wanted = module(taps)
    with torch.autocast(device, dtype=dtype):
        found = module(taps)
    assert not torch.equal(found.float(), wanted)  # it did something
    torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.05)
    found.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("choice", ["native", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_recomputation_gives_the_same_gradients(device: str, kind: str, choice: str) -> None:
    module = Path_(kind).double().to(device)
    taps = taps_of(L, B, S, MODEL, device=device).requires_grad_()
    leaves = [taps, *module.parameters()]
    with backend(choice):
        plain = torch.autograd.grad(module(taps).square().sum(), leaves)
        again = torch.autograd.grad(checkpoint(module, taps, use_reentrant=False).square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_gives_the_same(kind: str) -> None:
    module = Path_(kind).double()
    taps, mask = taps_of(L, B, S, MODEL), some_mask()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    wanted = module(taps, mask)
    found = compiled(taps, mask)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(out.square().sum(), list(module.parameters())) for out in (found, wanted)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_repr_tells_the_options() -> None:
    assert "5, hidden_size=12, side_size=8, pooling='last'" in repr(TapProjector(L, MODEL, D, pooling="last"))
    assert "5, hidden_size=8, tree_checkpoint=2" in repr(KINDS["tree"](L, D))
    assert "num_heads=2, window=3" in repr(KINDS["attn"](L, D))


def test_examples_in_the_docstrings() -> None:
    result = doctest.testmod(importlib.import_module("xlayer_ext.nn.aggregate"))
    assert result.attempted >= 5 and not result.failed


@pytest.mark.parametrize(
    ("make_it", "told"),
    [
        (lambda: TapProjector(0, MODEL, D), "layers must be at least 1, got 0"),
        (lambda: TapProjector(L, MODEL, D, pooling="cls"), "pooling must be one of mean, first, last, attention; got"),
        (lambda: TapProjector(L, MODEL, D)(torch.ones(L, B, S, D)), r"taps must have shape \[5, B, S, 12\], got"),
        (
            lambda: TapProjector(L, MODEL, D)(torch.ones(L, B, S, MODEL), torch.ones(B, 1).bool()),
            "mask must have shape",
        ),
        (lambda: EMAAggregator(L, 0), "hidden_size must be at least 1"),
        (lambda: EMAAggregator(L, D, expansion=0), "expansion must be at least 1"),
        (lambda: EMAAggregator(L, D, tree_checkpoint=6), "tree_checkpoint must be between 0 and num_layers = 5, got 6"),
        (lambda: EMAAggregator(L, D)(torch.ones(L + 1, B, D)), r"taps must have shape \[5, ..., 8\], got \[6, 3, 8\]"),
        (lambda: GRUAggregator(L, D)(torch.ones(L, B, D + 1)), r"taps must have shape \[5, ..., 8\]"),
        (lambda: DepthAttentionAggregator(L, D, num_heads=3), "hidden_size must be a multiple of num_heads = 3, got 8"),
        (lambda: DepthAttentionAggregator(L, D, window=0), "window must be at least 1, got 0"),
    ],
)
def test_bad_options_are_named(make_it: Callable[[], Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make_it()


# ---- Two processes ---------------------------------------------------------------------------------------------------

WORLD, BATCH = 2, 4
CASES = list(itertools.product(("ddp", "fsdp2"), KINDS, ("mean", None)))


def build(kind: str, pooling: str | None) -> Path_:
    torch.manual_seed(7)
    return Path_(kind, pooling).double()


def gradients(net: nn.Module, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """Computes the gradients of the mean loss from this rank's share of the global batch."""
    generator = torch.Generator().manual_seed(11)
    taps = torch.randn(L, BATCH, S, MODEL, generator=generator, dtype=torch.float64)
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    net(taps[:, share]).square().mean().backward()
    return whole_gradients(net)


def distributed_gradients(wrapper: str, kind: str, pooling: str | None, rank: int) -> dict[str, Tensor]:
    net: Any = build(kind, pooling)
    if wrapper == "ddp":
        return gradients(nn.parallel.DistributedDataParallel(net), rank, WORLD)
    from torch.distributed.fsdp import fully_shard

    fully_shard(net.aggregator)
    return gradients(fully_shard(net), rank, WORLD)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    join_processes(rank, folder, WORLD)
    torch.save({case: distributed_gradients(*case, rank) for case in CASES}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, device: str) -> list[dict[Any, dict[str, Tensor]]]:
    return run_processes(worker, tmp_path_factory.mktemp("aggregate"), device, WORLD)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_two_processes_give_the_gradients_of_one(
    results: list[dict[Any, dict[str, Tensor]]], case: tuple[str, str, str | None]
) -> None:
    expected = gradients(build(*case[1:]))
    for rank in range(WORLD):
        assert_same_gradients(results[rank][case], expected)
    # Large enough for a lost share to show. The first state of attention is 0, and so is its query.
    assert all(grad.abs().max() > 1e-8 for grad in expected.values())
