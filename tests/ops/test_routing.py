"""masked_mean and LayerRouter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from operator_table import draw_masked_mean
from oracle import DTYPES, Draw, Results, check_oracle_rule, fresh_generator, need_native
from xlayer_ext import backend, reference
from xlayer_ext import functional as XF
from xlayer_ext.nn import LayerRouter

pytestmark = pytest.mark.operators

H = 16


@pytest.fixture
def native(device: str) -> str:
    need_native("masked_mean", device)
    return device


@pytest.fixture(params=["native", "reference"])
def choice(request: pytest.FixtureRequest, device: str) -> str:
    if request.param == "native":
        need_native("masked_mean", device)
    return request.param


def tokens(generator: torch.Generator, device: str, *shape: int, dtype: torch.dtype = torch.float64) -> Any:
    """Draws hidden states and a mask whose last row allows no token."""
    return tuple(t.to(device) for t in draw_masked_mean(generator, dtype, *shape))


# ---- masked_mean -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_oracle_rule(native: str, dtype: torch.dtype, masked: bool) -> None:
    def evaluate(function: Any, x: Tensor, mask: Tensor | None, cotangent: Tensor) -> Results:
        x = x.requires_grad_()
        out = function(x, mask)
        (grad,) = torch.autograd.grad(out, x, cotangent)
        return {"out": out.detach(), "grad": grad}

    def plain(x: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return x.mean(1)
        weights = mask.unsqueeze(-1).to(x.dtype)
        return (x * weights).sum(1) / weights.sum(1).clamp(min=1)

    generator = fresh_generator()

    def make() -> Draw:
        x, mask = tokens(generator, native, 3, 37, 65, dtype=dtype)
        mask = mask if masked else None
        cotangent = torch.randn(3, 65, generator=generator, dtype=torch.float64).to(native, dtype)
        exact = evaluate(plain, x.double(), mask, cotangent.double())
        with backend("native"):
            actual = evaluate(XF.masked_mean, x, mask, cotangent)
        return Draw(actual, exact, evaluate(plain, x, mask, cotangent))

    check_oracle_rule(make, dtype, draws=4)


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(choice: str, device: str, masked: bool) -> None:
    x, mask = tokens(fresh_generator(), device, 2, 4, 3)
    with backend(choice):
        assert torch.autograd.gradcheck(lambda x: XF.masked_mean(x, mask if masked else None), x.requires_grad_())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_masked_tokens_change_nothing(choice: str, device: str, poison: float) -> None:
    x, mask = tokens(fresh_generator(), device, 3, 9, 5)
    dirty = x.masked_fill(~mask.unsqueeze(-1), poison).requires_grad_()
    with backend(choice):
        out = XF.masked_mean(dirty, mask)
        assert torch.equal(out, XF.masked_mean(x, mask))
        assert not out[-1].any()
        (grad,) = torch.autograd.grad(out.sum(), dirty)
    assert not grad.masked_select(~mask.unsqueeze(-1)).any() and grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_empty_dimensions(choice: str, device: str, shape: tuple[int, ...], masked: bool) -> None:
    x = torch.ones(shape, device=device, requires_grad=True)
    mask = torch.ones(shape[:2], dtype=torch.bool, device=device) if masked else None
    with backend(choice):
        out = XF.masked_mean(x, mask)
    out.sum().backward()
    assert out.shape == (shape[0], shape[2]) and not out.any() and x.grad.shape == shape


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31 - 1),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 70), st.integers(1, 70)),
    order=st.permutations(range(3)),
    step=st.integers(1, 3),
    masked=st.booleans(),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
)
def test_fuzz(native: str, seed: int, shape: Any, order: list[int], step: int, masked: bool, scale: float) -> None:
    b, s, h = shape
    x, mask = tokens(fresh_generator(seed), native, b, s, h * step)
    x = (scale * x.permute(order).contiguous().permute([order.index(d) for d in range(3)]))[..., ::step]
    mask = mask.t().contiguous().t() if masked else None
    with backend("native"):
        actual = XF.masked_mean(x, mask)
    torch.testing.assert_close(actual, reference.masked_mean(x, mask), rtol=1e-12, atol=1e-13 * scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_in_any_order(native: str, schedule: Callable[[int], None], dtype: torch.dtype) -> None:
    x, mask = tokens(fresh_generator(), native, 5, 200, 300, dtype=dtype)
    results = []
    for order in (1, 2, 3):
        schedule(order)
        leaf = x.clone().requires_grad_()
        out = XF.masked_mean(leaf, mask)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize(
    ("x", "mask", "error", "told"),
    [
        (torch.ones(3, 4), None, ValueError, "x must have shape"),
        (torch.ones(2, 3, 4).long(), None, TypeError, "x must be a floating-point tensor"),
        ([[1.0]], None, TypeError, "x must be a torch.Tensor"),
        (torch.ones(2, 3, 4), torch.ones(2, 4, dtype=torch.bool), ValueError, "mask must have shape"),
        (torch.ones(2, 3, 4), torch.ones(2, 3), TypeError, "mask must be a bool tensor"),
    ],
)
def test_bad_arguments_are_named(x: Any, mask: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        XF.masked_mean(x, mask)


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.ones(3, 4), None),
        (torch.ones(2, 3, 4).int(), None),
        (torch.ones(2, 3, 4), torch.ones(2, 4, dtype=torch.bool)),
        (torch.ones(2, 3, 4), torch.ones(1, 3, dtype=torch.bool)),
        (torch.ones(2, 3, 4), torch.ones(2, 3)),
        (torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool, device="meta")),
    ],
)
def test_operator_called_with_nonsense_raises(native: str, arguments: Any) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.xlayer.masked_mean(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.ones(2, 3, 4), None, 5),
        (torch.ones(2, 4), None, -1),
        (torch.ones(2, 4).int(), None, 5),
        (torch.ones(2, 4), torch.ones(2, 3, dtype=torch.bool), 5),
        (torch.ones(2, 4), torch.ones(3, 5, dtype=torch.bool), 5),
        (torch.ones(2, 4), torch.ones(2, 5), 5),
    ],
)
def test_backward_operator_called_with_nonsense_raises(native: str, arguments: Any) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.xlayer.masked_mean_backward(*arguments)


# ---- LayerRouter -----------------------------------------------------------------------------------------------------


def summaries(generator: torch.Generator, device: str, sources: int = 4, wide: int = 1) -> tuple[Tensor, Tensor]:
    target = torch.randn(5, wide * H, generator=generator, dtype=torch.float64)
    return target.to(device), torch.randn(sources, 5, H, generator=generator, dtype=torch.float64).to(device)


def router(device: str, **options: Any) -> LayerRouter:
    return LayerRouter(H, route_dim=8, **options).to(device, torch.float64)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("weighting", ["topk_softmax", "full_softmax"])
def test_router_is_its_formula(device: str, weighting: str, top_k: int) -> None:
    target, sources = summaries(fresh_generator(), device)
    module = router(device, top_k=top_k, weighting=weighting, temperature=0.6)
    indices, weights = module(target, sources)
    assert indices.dtype == torch.int64 and indices.shape == weights.shape == (5, top_k)
    scores = torch.einsum("br,nbr->bn", module.query(target), module.key(sources)) / 0.6
    for row in range(5):
        order = sorted(range(4), key=lambda n: -scores[row, n].item())[:top_k]
        assert indices[row].tolist() == order
        every = scores[row] if weighting == "full_softmax" else scores[row, order]
        torch.testing.assert_close(weights[row], scores[row, order].exp() / every.exp().sum())


def test_select_takes_all_sources_where_there_are_fewer_than_k(device: str) -> None:
    target, sources = summaries(fresh_generator(), device, sources=2)
    module = router(device, top_k=3)
    indices, weights = module.select(module.logits(target, sources))
    assert indices.shape == (5, 2) and torch.allclose(weights.sum(1), torch.ones(5, dtype=torch.float64, device=device))


def gradients(module: LayerRouter, target: Tensor, sources: Tensor) -> list[Tensor]:
    indices, weights = module(target, sources)
    chosen = sources[indices.t(), torch.arange(5, device=target.device)]  # [k, B, H]
    loss = (weights.t().unsqueeze(-1) * chosen).sum(0).square().sum()
    return list(torch.autograd.grad(loss, list(module.parameters())))


def test_a_top_1_router_as_published_gets_exactly_no_gradient(device: str) -> None:
    target, sources = summaries(fresh_generator(), device)
    published = gradients(router(device, top_k=1, weighting="topk_softmax"), target, sources)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in published)
    full = gradients(router(device, top_k=1, weighting="full_softmax"), target, sources)
    names = [name for name, _ in router(device).named_parameters()]
    for name, grad in zip(names, full, strict=True):
        # The key's bias moves every score of a row alike.
        assert grad.abs().max() < 1e-12 if name == "key.bias" else grad.abs().max() > 1e-6, name
    two = gradients(router(device, top_k=2, weighting="topk_softmax"), target, sources)
    assert two[0].any()


def test_router_on_a_sentence_pair(device: str) -> None:
    generator = fresh_generator()
    module = router(device, query_mlp=True, top_k=2)
    hidden = torch.randn(5, 6, H, generator=generator, dtype=torch.float64).to(device)
    first = torch.tensor([[1, 1, 0, 0, 0, 0]] * 5, dtype=torch.bool, device=device)
    second = torch.tensor([[0, 0, 1, 1, 1, 0]] * 5, dtype=torch.bool, device=device)
    summary = module.pair_summary(hidden, first, second)
    a, b = hidden[:, :2].mean(1), hidden[:, 2:5].mean(1)
    torch.testing.assert_close(summary, torch.cat([a, b, (a - b).abs(), a * b], -1))
    indices, weights = module(summary, summaries(generator, device)[1])
    assert indices.shape == weights.shape == (5, 2)
    assert [tuple(layer.weight.shape) for layer in module.query if hasattr(layer, "weight")] == [(32, 64), (8, 32)]


def test_summaries(device: str) -> None:
    hidden, mask = tokens(fresh_generator(), device, 3, 6, H)
    expected = torch.stack(
        [row[keep].mean(0) if keep.any() else row[0] * 0 for row, keep in zip(hidden, mask, strict=True)]
    )
    torch.testing.assert_close(router(device).summarize(hidden, mask), expected)
    torch.testing.assert_close(router(device).summarize(hidden), hidden.mean(1))
    assert torch.equal(router(device, pooling="cls").summarize(hidden, mask), hidden[:, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_router_scores_in_float32_under_autocast(device: str, dtype: torch.dtype) -> None:
    target, sources = (tensor.float() for tensor in summaries(fresh_generator(), device))
    module = LayerRouter(H, route_dim=8, top_k=2, weighting="full_softmax").to(device)
    with torch.autocast(torch.device(device).type, dtype):
        _, weights = module(target, sources)
    assert weights.dtype == torch.float32
    weights.sum().backward()
    assert module.query.weight.grad.isfinite().all()
    _, half = module.to(dtype)(target.to(dtype), sources.to(dtype))
    assert half.dtype == torch.float32


@pytest.mark.traced
def test_router_compiles_to_one_graph(device: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = router(device, top_k=2, weighting="full_softmax")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    generator = fresh_generator()
    for sources in (3, 4, 6):
        arguments = summaries(generator, device, sources)
        for actual, expected in zip(compiled(*arguments), module(*arguments), strict=True):
            torch.testing.assert_close(actual, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_router_state_and_reset(device: str) -> None:
    first, second = router(device, query_mlp=True), router(device, query_mlp=True)
    second.load_state_dict(first.state_dict())
    arguments = summaries(fresh_generator(), device, wide=4)
    assert torch.equal(first(*arguments)[0], second(*arguments)[0])
    first.reset_parameters()
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in pairs)
    assert "top_k=1" in repr(first) and "query_mlp=True" in repr(first)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"weighting": "softmax"}, "weighting must be one of topk_softmax, full_softmax; got 'softmax'"),
        ({"pooling": "max"}, "pooling must be one of mean, cls"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_bad_router_options_are_named(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        LayerRouter(H, **options)


@pytest.mark.parametrize(
    ("target", "sources", "told"),
    [
        (torch.ones(5, H), torch.ones(2, 5, H), "top_k is 3, but there are only 2 source layers"),
        (torch.ones(5, 4 * H), torch.ones(3, 5, H), "target_summary must have shape"),
        (torch.ones(4, H), torch.ones(3, 5, H), "target_summary must have shape"),
        (torch.ones(5, H), torch.ones(5, H), "source_summaries must have shape"),
    ],
)
def test_bad_router_calls_are_named(target: Tensor, sources: Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        LayerRouter(H, top_k=3)(target, sources)
