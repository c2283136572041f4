"""VectorQuantizer and FSQ: their formulas, the life of a codebook, and the rest of PyTorch around them."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_unflatten
from torch.utils.checkpoint import checkpoint

from oracle import draw, fresh_generator
from xlayer_ext import functional as XF
from xlayer_ext.nn import FSQ, VectorQuantizer
from xlayer_ext.nn.quantize import SURVIVED_MISSES, VQOutput

D, K = 6, 11
KINDS: dict[str, dict[str, Any]] = {
    "ema": {},
    "cosine": {"metric": "cosine"},
    "learned": {"ema": False},
    "learned-cosine": {"ema": False, "metric": "cosine"},
    "two": {"num_codebooks": 2},
    "projected": {"codebook_dim": 4, "num_codebooks": 2, "metric": "cosine"},
}


def quantizer(device: str = "cpu", **options: Any) -> VectorQuantizer:
    torch.manual_seed(0)
    return VectorQuantizer(D, K, **options).to(device)


def rows(*lead: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return draw(fresh_generator(), *lead, D, dtype=dtype).to(device)


def state(module: VectorQuantizer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(a: VectorQuantizer, b: VectorQuantizer) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


# ---- one forward -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_the_nearest_code_and_the_gradient_goes_straight_through(device: str, kind: str) -> None:
    module = quantizer(device, **KINDS[kind])
    x = rows(3, 7, device=device).requires_grad_()
    before = module.codebook.detach().clone()
    out = module(x)
    books, width = module.num_codebooks, module.codebook_dim
    parts = module.project_in(x).reshape(-1, books, width)
    if module.metric == "cosine":
        parts = nn.functional.normalize(parts, dim=-1)
        before = nn.functional.normalize(before, dim=-1)
    indices = out.indices.reshape(-1, books)
    chosen = torch.stack([before[book][indices[:, book]] for book in range(books)], 1)
    distance = (parts.unsqueeze(2) - before.unsqueeze(0)).square().sum(-1)  # [N, h, K]
    nearest = (parts - chosen).square().sum(-1)
    assert (nearest <= distance.amin(-1) + 1e-5).all()
    expected = module.project_out(chosen.flatten(1)).reshape(x.shape)
    torch.testing.assert_close(out.quantized, expected)
    if books * width == D and kind != "cosine":
        assert torch.equal(out.quantized.flatten(0, 1), chosen.flatten(1))
    cotangent = torch.randn_like(out.quantized)
    (grad,) = torch.autograd.grad(out.quantized, x, cotangent, retain_graph=True)
    (straight,) = torch.autograd.grad(module.project_out(parts.flatten(1)).reshape(x.shape), x, cotangent)
    torch.testing.assert_close(grad, straight)


@pytest.mark.parametrize("kind", ["ema", "learned", "learned-cosine"])
def test_losses_are_commitment_and_codebook(device: str, kind: str) -> None:
    module = quantizer(device, commitment_weight=0.3, codebook_weight=0.7, **KINDS[kind])
    x = rows(9, device=device).requires_grad_()
    codes = module.codebook.detach().clone()
    out = module(x)
    unit = nn.functional.normalize if module.metric == "cosine" else (lambda t, dim: t)
    error = (unit(x, dim=-1) - unit(codes[0], dim=-1)[out.indices]).square().mean()
    torch.testing.assert_close(out.loss, (0.3 if module.ema else 1.0) * error)
    (grad,) = torch.autograd.grad(out.loss, x, retain_graph=True)
    (wanted,) = torch.autograd.grad(0.3 * (unit(x, dim=-1) - unit(codes[0], dim=-1)[out.indices]).square().mean(), x)
    torch.testing.assert_close(grad, wanted)
    if not module.ema:
        (grad,) = torch.autograd.grad(out.loss, module.codebook)
        moved = torch.zeros(K, device=device).index_fill(0, out.indices.unique(), 1).bool()
        assert grad[0][moved].any(-1).all() and not grad[0][~moved].any()


def test_entropy_bonus_is_the_entropy_of_the_mean_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    import xlayer_ext.nn.quantize as quantize

    for metric in ("euclidean", "cosine"):
        module = quantizer(metric=metric, commitment_weight=0.0, entropy_weight=2.0, entropy_temperature=0.5).eval()
        x = rows(20).requires_grad_()
        unit = nn.functional.normalize if metric == "cosine" else (lambda t, dim: t)
        distance = (unit(x, dim=-1).unsqueeze(1) - unit(module.codebook[0], dim=-1)).square().sum(-1)
        share = (-distance / 0.5).softmax(-1).mean(0)
        wanted = 2.0 * (share * share.log()).sum()
        for scores in (1 << 22, 3 * K):  # at once, and three rows at a time
            monkeypatch.setattr(quantize, "CHUNK", scores)
            loss = module(x).loss
            torch.testing.assert_close(loss, wanted)
            grads = [torch.autograd.grad(value, x, retain_graph=True)[0] for value in (loss, wanted)]
            torch.testing.assert_close(*grads)


def test_perplexity_counts_codes_in_use() -> None:
    module = quantizer().eval()
    assert module(module.codebook[0, :1].repeat(5, 1)).perplexity == 1
    out = module(module.codebook[0].repeat(3, 1))
    torch.testing.assert_close(out.perplexity, torch.tensor(float(K)))
    assert torch.equal(out.indices, torch.arange(K).repeat(3))


def test_the_output_unpacks_as_three_and_has_four_attributes() -> None:
    module = quantizer().eval()
    x = rows(4, 6)
    output = module(x)
    quantized, indices, loss = output
    assert quantized is output.quantized and indices is output.indices and loss is output.loss and len(output) == 3
    leaves, structure = tree_flatten(output)
    assert len(leaves) == 4 and [path[0].name for path, _ in tree_flatten_with_path(output)[0]] == [
        "quantized", "indices", "loss", "perplexity"
    ]  # fmt: skip
    exported = torch.export.export(module, (x,))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    with torch.no_grad():
        detached = module(x)
    for other in (
        copy.deepcopy(detached),
        pickle.loads(pickle.dumps(detached)),
        tree_unflatten(leaves, structure),
        exported.module()(x),
        torch.export.load(file).module()(x),
    ):
        assert type(other) is VQOutput
        for name in ("quantized", "indices", "loss", "perplexity"):
            torch.testing.assert_close(getattr(other, name), getattr(output, name))
    assert "perplexity=tensor" in repr(output)


def test_the_output_unpacks_in_a_compiled_graph() -> None:
    module = quantizer().eval()
    x = rows(4, 6)

    def call(x: Tensor) -> tuple[VQOutput, Tensor]:
        output = module(x)
        quantized, _, loss = output
        return output, quantized.sum() + loss + output.perplexity

    output, total = torch.compile(call, backend="eager", fullgraph=True)(x)
    assert type(output) is VQOutput
    torch.testing.assert_close(total, call(x)[1])
    torch.testing.assert_close(output.perplexity, module(x).perplexity)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind: str, training: bool) -> None:
    x = rows(4, 6)
    mask = torch.rand(4, 6, generator=fresh_generator()) < 0.6
    mask[0, 0] = True
    options = {"threshold_ema_dead_code": 0.9 * KINDS[kind].get("ema", True), "entropy_weight": 0.1, **KINDS[kind]}
    modules = [quantizer(**options).train(training) for _ in range(2)]
    masked = modules[0](x.masked_fill(~mask.unsqueeze(-1), float("nan")), mask)
    alone = modules[1](x[mask])
    torch.testing.assert_close(masked.quantized[mask], alone.quantized)
    assert torch.equal(masked.indices[mask], alone.indices)
    assert not masked.quantized[~mask].any() and (masked.indices[~mask] == -1).all()
    torch.testing.assert_close((masked.loss, masked.perplexity), (alone.loss, alone.perplexity))
    for name, value in modules[0].state_dict().items():
        torch.testing.assert_close(value, modules[1].state_dict()[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_codes_of_indices_are_what_they_stand_for(kind: str) -> None:
    module = quantizer(**KINDS[kind]).eval()
    out = module(rows(5, 3))
    torch.testing.assert_close(module.project_out(module.indices_to_codes(out.indices)), out.quantized)
    assert not module.indices_to_codes(torch.full_like(out.indices, -1)).any()


def test_bfloat16_and_autocast_compute_in_float32() -> None:
    module = quantizer().eval()
    x = rows(30)
    with torch.autocast("cpu", torch.bfloat16):
        inside = module(x)
    for a, b in zip(inside, module(x), strict=True):
        assert torch.equal(a, b)
    small = quantizer().eval()(x.bfloat16())
    assert small.quantized.dtype == torch.bfloat16 and small.loss.dtype == torch.float32


def test_compile_in_evaluation() -> None:
    torch._dynamo.reset()
    module = quantizer(metric="cosine").eval()
    x = rows(4, 5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x), module(x), strict=True):
        torch.testing.assert_close(a, b)


def test_compile_in_training_goes_around_the_update() -> None:
    torch._dynamo.reset()
    module = quantizer(threshold_ema_dead_code=0.9)
    other = copy.deepcopy(module)
    compiled = torch.compile(module, backend="aot_eager")
    for _ in range(3):
        x = rows(30).requires_grad_()
        results = [run(x) for run in (compiled, other)]
        grads = [torch.autograd.grad(out.quantized.sum() + out.loss, x)[0] for out in results]
        torch.testing.assert_close(*grads)
        for name, value in other.state_dict().items():
            torch.testing.assert_close(module.state_dict()[name], value)


# ---- the life of a codebook ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_moving_averages_are_the_formula(device: str, metric: str) -> None:
    module = quantizer(device, metric=metric, decay=0.9)
    counts, sums = module.sizes.double(), module.sums.double()
    uses = torch.zeros(K, dtype=torch.int64, device=device)
    for _ in range(3):
        x = rows(50, device=device)
        index = module(x).indices
        unit = nn.functional.normalize(x, dim=-1) if metric == "cosine" else x
        for k in range(K):
            own = unit[index == k].double()
            counts[0, k] = 0.9 * counts[0, k] + 0.1 * len(own)
            sums[0, k] = 0.9 * sums[0, k] + 0.1 * own.sum(0)
            uses[k] += len(own)
        smoothed = (counts + 1e-5) / (counts.sum() + K * 1e-5) * counts.sum()
        codes = sums / smoothed.unsqueeze(-1)
        codes = nn.functional.normalize(codes, dim=-1) if metric == "cosine" else codes
        torch.testing.assert_close(module.codebook.double(), codes, rtol=1e-5, atol=1e-5)
    assert torch.equal(module.use_counts[0], uses) and module.steps == 3


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_moves_nothing(kind: str) -> None:
    module = quantizer(**KINDS[kind]).eval()
    before = state(module)
    module(rows(40))
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_dead_code_becomes_a_row_and_survives_twenty_misses() -> None:
    module = quantizer(threshold_ema_dead_code=0.5, decay=0.8)
    far = torch.full((K, D), 100.0) + torch.arange(K).unsqueeze(1)
    far[0] = 0
    module.set_codebook(far)
    near = rows(8).mul(0.01)
    steps = 0
    while not (module.sizes[0, 1:] > 1).any():  # no row uses codes 1 and up: their averages fall below 0.5
        module(near)
        steps += 1
        assert steps < 10
    size = 0.5 / 0.8**SURVIVED_MISSES
    torch.testing.assert_close(module.sizes[0, 1:9], torch.full((8,), size), rtol=1e-4, atol=0.0)
    revived = module.codebook.detach()[0, 1:9]  # as many as there were rows
    assert torch.cdist(revived, near).amin(1).max() == 0
    torch.testing.assert_close(module.sums[0, 1:9], revived * size, rtol=1e-4, atol=0.0)
    # They are far from the next rows, and none chooses them.
    survivors = module.sizes[0, 1:9].clone()
    away = torch.full((5, D), -3.0)
    module.set_codebook(torch.cat([away[:1], revived, far[9:]]))
    module.sizes[0, 1:9] = survivors
    module.sizes[0, 9:] = module.sizes[0, 0] = 1e6  # only the eight are at stake
    module.sums = module.codebook * module.sizes.unsqueeze(-1)
    for miss in range(SURVIVED_MISSES):
        module(away)
        assert (module.sizes[0, 1:9] >= 0.5).all(), miss
        torch.testing.assert_close(module.codebook.detach()[0, 1:9], revived, rtol=1e-3, atol=1e-4)
    module(away)
    assert torch.cdist(module.codebook.detach()[0, 1:6], away).amin(1).max() == 0  # dead, and revived again


def test_kmeans_starts_at_the_clusters() -> None:
    generator = fresh_generator()
    centers = 10 * draw(generator, K, D, dtype=torch.float32)
    x = centers[torch.arange(K).repeat(60)] + 0.01 * draw(generator, 60 * K, D, dtype=torch.float32)
    module = quantizer(kmeans_init=True, kmeans_iters=20, threshold_ema_dead_code=1.0, decay=0.99)
    assert not module.initialized
    spread = 0.25 * float((x - x.mean(0)).square().mean())
    assert float(module(x).loss) < 0.3 * spread and module.steps == 1 and module.initialized
    again = quantizer(kmeans_init=True, kmeans_iters=20, threshold_ema_dead_code=1.0, decay=0.99)
    again(x)
    assert_same_state(module, again)
    # On the last of its rounds every code was the mean of its rows: with all of the batch once more, hardly moved.
    before = module.codebook.clone()
    module(x)
    torch.testing.assert_close(module.codebook, before, rtol=1e-3, atol=1e-2)


def test_resuming_is_exact() -> None:
    batches = [rows(20) for _ in range(8)]
    whole, first = (quantizer(threshold_ema_dead_code=1.2, decay=0.7, kmeans_init=True) for _ in range(2))
    for x in batches:
        whole(x)
    for x in batches[:4]:
        first(x)
    second = quantizer(threshold_ema_dead_code=1.2, decay=0.7, kmeans_init=True)
    second.load_state_dict(first.state_dict())
    for x in batches[4:]:
        second(x)
    assert_same_state(whole, second)


def test_a_batch_with_nothing_in_it() -> None:
    module = quantizer(threshold_ema_dead_code=0.5, kmeans_init=True)
    out = module(torch.zeros(0, D))
    assert out.quantized.shape == (0, D) and out.loss == 0 and not module.initialized
    out = module(torch.full((2, D), float("nan")), torch.zeros(2, dtype=torch.bool))
    assert not out.quantized.any() and out.loss == 0 and out.loss.isfinite()


# ---- checkpointing ---------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two quantizers between linear layers; the first is called twice, so that recomputations come interleaved."""

    def __init__(self, options: dict[str, Any], recompute: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(3))
        self.quantizers = nn.ModuleList(VectorQuantizer(D, K, **options) for _ in range(2))
        self.recompute = recompute

    def block(self, which: int, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        out: VQOutput = self.quantizers[which](self.layers[layer](x).tanh())
        return x + out.quantized, out.loss

    def pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, first = self.block(0, 0, x)
        x, second = self.block(0, 1, x)
        return x, first + second

    def forward(self, x: Tensor) -> Tensor:
        x, first = self.run(self.pair, x)
        x, second = self.run(lambda x: self.block(1, 2, x), x)
        x, third = self.run(lambda x: self.block(0, 2, x), x)
        return x.square().mean() + first + second + third

    def run(self, function: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.recompute == "none":
            result: tuple[Tensor, Tensor] = function(x)
            return result
        result = checkpoint(function, x, use_reentrant=self.recompute == "reentrant")
        return result


@pytest.mark.parametrize("recompute", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("kind", ["ema", "cosine", "learned"])
def test_under_checkpointing_the_codebook_moves_once_and_gradients_are_the_same(kind: str, recompute: str) -> None:
    options = {"decay": 0.5, "threshold_ema_dead_code": 0.9 * (kind != "learned"), "entropy_weight": 0.1, **KINDS[kind]}
    nets = []
    for how in ("none", recompute):
        torch.manual_seed(0)
        nets.append(Net(options, how))
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
    for _ in range(4):
        x = rows(30).requires_grad_()
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            net(x).backward()
        for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            # What several calls add to a parameter's gradient comes in another order.
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()
        nets[1].load_state_dict(nets[0].state_dict() | dict(nets[1].named_buffers()))
        for a, b in zip(nets[0].quantizers, nets[1].quantizers, strict=True):
            assert_same_state(a, b)
    assert nets[1].quantizers[0].steps == 4 * 3 and nets[1].quantizers[1].steps == 4
    assert all(record.used for quantizer in nets[1].quantizers for record in quantizer._records)


def test_nothing_is_remembered_without_checkpoints() -> None:
    module = quantizer()
    (module(rows(9).requires_grad_()).loss).backward()
    assert not module._records
    assert_same_state(copy.deepcopy(module), module)


# ---- finite scalar quantization --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", ["tanh", "offset"])
def test_fsq_module(bound: str) -> None:
    torch.manual_seed(0)
    module = FSQ([8, 5, 3], bound=bound)
    z = rows(4)[:, :3].requires_grad_()
    out = module(z)
    codes, indices = XF.fsq(z, [8, 5, 3], bound=bound)
    assert torch.equal(out.quantized, codes) and torch.equal(out.indices, indices) and module.codebook_size == 120
    assert not list(module.parameters())
    projected = FSQ([8, 5, 3], hidden_size=D, bound=bound)
    x = rows(2, 4).requires_grad_()
    out = projected(x)
    expected = projected.project_out(XF.fsq(projected.project_in(x), [8, 5, 3], bound=bound)[0])
    assert torch.equal(out.quantized, expected)
    out.quantized.square().sum().backward()
    assert x.grad.any() and all(parameter.grad.any() for parameter in projected.parameters())


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: VectorQuantizer(8, 4, metric="dot"), "metric must be one of euclidean, cosine"),
        (lambda: VectorQuantizer(8, 0), "codebook_size must be at least 1, got 0"),
        (lambda: VectorQuantizer(8, 4, num_codebooks=3), "hidden_size must be a multiple of num_codebooks, 3"),
        (lambda: VectorQuantizer(8, 4, decay=1.0), "decay must be between 0 and 1, got 1.0"),
        (
            lambda: VectorQuantizer(8, 4, ema=False, threshold_ema_dead_code=1.0),
            "threshold_ema_dead_code needs ema=True",
        ),
        (lambda: VectorQuantizer(8, 4)(torch.ones(2, 7)), r"x must have shape \[..., 8\], got \[2, 7\]"),
        (lambda: VectorQuantizer(8, 4)(torch.ones(2, 8), torch.ones(3).bool()), r"mask must have shape \[2\]"),
        (lambda: FSQ([1]), "levels must be between 2"),
    ],
)
def test_what_cannot_be_is_refused(call: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()
