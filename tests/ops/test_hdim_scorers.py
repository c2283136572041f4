"""The scorers that go through PyTorch's own attention, and the fusion of values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oracle import DTYPES, Draw, Results, check_oracle_rule, draw, draw_layers, fresh_generator
from xlayer_ext import functional as XF
from xlayer_ext import reference

FUSIONS = {"concat_hadam": 3, "concat_only": 2, "concat_diff_hadam": 4}
H, D = 32, 8


def evaluate(function: Any, floats: list[Tensor], cotangent: Tensor, dtype: torch.dtype, **options: Any) -> Results:
    """Returns the function's (first) output and the gradients of its inputs, all at ``dtype``."""
    leaves = [tensor.to(dtype).requires_grad_() for tensor in floats]
    out = function(*leaves, **options)
    out = out if isinstance(out, Tensor) else out[0]
    grads = torch.autograd.grad(out, leaves, cotangent.to(dtype))
    return {"out": out.detach()} | {f"grad {index}": grad for index, grad in enumerate(grads)}


# ---- bilinear and cosine scorers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "masks",
    [(), ("key_mask",), ("attn_mask",), ("key_mask", "attn_mask")],
    ids=["()", "('key_mask',)", "('pair_mask',)", "('key_mask', 'pair_mask')"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scorer", ["bilinear", "cosine"])
def test_other_scorers_agree_with_their_formula(
    device: str, scorer: str, dtype: torch.dtype, masks: tuple[str, ...]
) -> None:
    generator = fresh_generator()
    function, formula = (getattr(module, f"{scorer}_attention") for module in (XF, reference))

    def make() -> Draw:
        drawn = draw_layers(generator, H, device)
        options = {name: drawn[name] for name in masks} | {"temperature": 0.8}
        floats = [draw(generator, 2, 5, D), draw(generator, 2, 7, D), draw(generator, 2, 7, H)]
        if scorer == "bilinear":
            floats.append(draw(generator, D, D) / math.sqrt(D))
        floats = [tensor.to(device, dtype) for tensor in floats]
        cotangent = draw(generator, 2, 5, H).to(device, dtype)
        runs = ((function, dtype), (formula, torch.float64), (formula, dtype))
        return Draw(*(evaluate(f, floats, cotangent, d, **options) for f, d in runs))

    check_oracle_rule(make, dtype, draws=8)


@pytest.mark.parametrize("scorer", ["bilinear", "cosine"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_other_scorers_ignore_what_is_masked(device: str, scorer: str, poison: float) -> None:
    generator = fresh_generator()
    masks = {name: mask for name, mask in draw_layers(generator, H, device).items() if name.endswith("mask")}
    masks["attn_mask"][:, :, 2] = False
    masks["attn_mask"][:, 3, 2] = True  # row 3 may use key 2, no other row may
    masks["key_mask"][:] = True
    masks["key_mask"][:, 5] = False
    clean = [draw(generator, 2, 5, D), draw(generator, 2, 7, D), draw(generator, 2, 7, H), draw(generator, D, D)]
    clean = [tensor.to(device) for tensor in clean][: 4 if scorer == "bilinear" else 3]
    dirty = [tensor.clone() for tensor in clean]
    for tensor in dirty[1:3]:
        tensor[:, 5] = poison
        tensor[:, 2] = poison
    dirty[0][-1, 0] = poison  # a row without an allowed key

    def run(floats: list[Tensor]) -> tuple[Tensor, Tensor]:
        leaves = [tensor.requires_grad_() for tensor in floats]
        context = getattr(XF, f"{scorer}_attention")(*leaves, **masks)
        others = torch.arange(5) != 3
        (grad,) = torch.autograd.grad(context[:, others].square().sum(), leaves[0])
        return context, grad

    (actual, grad), (expected, expected_grad) = run(dirty), run(clean)
    others = torch.arange(5) != 3
    assert torch.equal(actual[:, others], expected[:, others]) and torch.equal(grad, expected_grad)
    assert actual[:, 3].isnan().all()
    assert not actual[-1, 0].any()


@pytest.mark.parametrize("scorer", ["bilinear", "cosine"])
@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_other_scorers_take_empty_dimensions(device: str, scorer: str, sizes: tuple[int, ...], masked: bool) -> None:
    b, sq, sk = sizes
    floats = [torch.ones(shape, device=device, requires_grad=True) for shape in [(b, sq, D), (b, sk, D), (b, sk, H)]]
    if scorer == "bilinear":
        floats.append(torch.ones(D, D, device=device, requires_grad=True))
    masks = {"key_mask": torch.ones(b, sk, dtype=torch.bool, device=device)} if masked else {}
    context = getattr(XF, f"{scorer}_attention")(*floats, **masks)
    context.sum().backward()
    assert context.shape == (b, sq, H) and not context.any()
    assert all(tensor.grad.shape == tensor.shape for tensor in floats)


@pytest.mark.parametrize("scorer", ["bilinear", "cosine"])
def test_entropy_of_other_scorers(device: str, scorer: str) -> None:
    generator = fresh_generator()
    q, k, v = (draw(generator, 2, n, D).to(device) for n in (5, 7, 7))
    extra = [draw(generator, D, D).to(device)] if scorer == "bilinear" else []
    mask = draw_layers(generator, H, device)["key_mask"]
    mask[:, 0] = True
    context, entropy = getattr(XF, f"{scorer}_attention")(q, k, v, *extra, key_mask=mask, return_entropy=True)
    logits = q @ extra[0] @ k.mT if extra else 10 * F.cosine_similarity(q.unsqueeze(2), k.unsqueeze(1), dim=-1)
    weights = logits.masked_fill(~mask.unsqueeze(1), -torch.inf).softmax(-1)
    torch.testing.assert_close(context, weights @ v)
    torch.testing.assert_close(entropy, torch.special.entr(weights).sum(-1).mean())


# ---- value fusion ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", FUSIONS)
def test_value_fusion_agrees_with_the_concatenation(device: str, mode: str, dtype: torch.dtype) -> None:
    generator = fresh_generator()
    shapes = [(3, 50, H), (3, 50, H), (40, FUSIONS[mode] * H), (40,)]
    runs = ((XF.value_fusion, dtype), (reference.value_fusion, torch.float64), (reference.value_fusion, dtype))

    def make() -> Draw:
        floats = [draw(generator, *shape).to(device, dtype) for shape in shapes]
        cotangent = draw(generator, 3, 50, 40).to(device, dtype)
        return Draw(*(evaluate(f, floats, cotangent, d, mode=mode) for f, d in runs))

    check_oracle_rule(make, dtype, draws=4)


@pytest.mark.parametrize("mode", FUSIONS)
def test_value_fusion_never_concatenates(mode: str) -> None:
    context, hidden = torch.randn(4, 16, H), torch.randn(4, 16, H)
    weight = torch.randn(9, FUSIONS[mode] * H)
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max(
                [largest, *(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))]
            )
            return out

    with Largest():
        out = XF.value_fusion(context, hidden, weight, None, mode)
    assert largest == context.numel()
    torch.testing.assert_close(out, reference.value_fusion(context, hidden, weight, None, mode))


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"mode": "sum"}, ValueError, "mode must be one of concat_hadam, concat_only, concat_diff_hadam; got 'sum'"),
        ({"weight": torch.ones(6, 8)}, ValueError, r"weight must have shape \[E, 12\]"),
        ({"weight": torch.ones(12)}, ValueError, "weight must have shape"),
        ({"hidden": torch.ones(2, 4)}, ValueError, "hidden must have the shape of context"),
        ({"bias": torch.ones(5)}, ValueError, "bias must have shape"),
        ({"bias": torch.ones(6).double()}, TypeError, "bias must have the dtype of context"),
        ({"context": torch.ones(3, 4).long()}, TypeError, "context must be a floating-point tensor"),
    ],
)
def test_value_fusion_names_bad_arguments(change: dict[str, Any], error: type[Exception], told: str) -> None:
    good = {"context": torch.ones(3, 4), "hidden": torch.ones(3, 4), "weight": torch.ones(6, 12)}
    with pytest.raises(error, match=told):
        XF.value_fusion(**(good | {"bias": torch.ones(6), "mode": "concat_hadam"} | change))
