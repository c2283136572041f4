"""HDIMMessage and QKVMessage."""

from __future__ import annotations

import doctest
import importlib
import io
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracle import draw, draw_layers, fresh_generator
from xlayer_ext import backend
from xlayer_ext.nn import HDIMMessage, QKVMessage

pytestmark = pytest.mark.operators

SCORERS = ("4term", "bilinear", "cosine")
FUSIONS = ("concat_hadam", "concat_only", "concat_diff_hadam")
H, D, M = 32, 8, 12


def message(device: str, dtype: torch.dtype = torch.float64, **options: Any) -> HDIMMessage:
    return HDIMMessage(H, proj_dim=D, mlp_dim=M, **({"dropout": 0.0} | options)).to(device, dtype)


# ---- HDIMMessage -----------------------------------------------------------------------------------------------------


def formula(module: HDIMMessage, target: Tensor, source: Tensor, allowed: Tensor, scorer: str, fusion: str) -> Tensor:
    """Computes the message without any code of the package."""
    p = dict(module.named_parameters())
    z, y = target @ p["target_proj.weight"].T, source @ p.get("source_proj.weight", p["target_proj.weight"]).T
    if "target_norm.weight" in p:
        z = F.layer_norm(z, (D,), p["target_norm.weight"], p["target_norm.bias"])
        y = F.layer_norm(y, (D,), p["source_norm.weight"], p["source_norm.bias"])
    zi, yj = z[:, :, None], y[:, None]
    if scorer == "4term":
        features = torch.cat([zi + 0 * yj, yj + 0 * zi, zi * yj, (zi - yj).abs()], -1)
        activation = F.relu if module.activation == "relu" else F.gelu
        hidden = activation(features @ p["pair_in.weight"].T + p["pair_in.bias"])
        logits = (hidden @ p["pair_out.weight"].T).squeeze(-1)
    elif scorer == "bilinear":
        logits = torch.einsum("bid,de,bje->bij", z, p["pair_weight"], y)
    else:
        logits = 10 * F.cosine_similarity(zi, yj, dim=-1)
    weights = (logits / module.temperature).masked_fill(~allowed, -1e30).softmax(-1) * allowed
    c, h = weights @ source, target
    blocks = {
        "concat_hadam": [c, h, c * h],
        "concat_only": [c, h],
        "concat_diff_hadam": [c, h, (c - h).abs(), c * h],
    }[fusion]
    activation = F.relu if module.value_activation == "relu" else F.gelu
    out = activation(torch.cat(blocks, -1) @ p["value_in.weight"].T + p["value_in.bias"])
    out = out @ p["value_out.weight"].T + p["value_out.bias"]
    if "beta" in p:
        out = out + p["beta"] * (c - h)
    return out * p.get("alpha", 1)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gelu pair": {"activation": "gelu"},
    "gelu value": {"value_activation": "gelu"},
    "shared": {"share_projections": True},
    "normed": {"norm_projections": True},
    "temperature": {"temperature": 0.8},
    "residual": {"value_residual": True, "residual_beta": 0.3},
    "alpha": {"alpha_init": 0.05},
    "all": {"share_projections": True, "norm_projections": True, "value_residual": True, "alpha_init": 0.2},
}


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize(("scorer", "fusion"), list(itertools.product(SCORERS, FUSIONS)))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_message_is_its_formula(device: str, choice: str, scorer: str, fusion: str, options: dict[str, Any]) -> None:
    generator = fresh_generator()
    module = message(device, scorer=scorer, fusion=fusion, **options)
    for parameter in module.parameters():  # norms and biases away from 1 and 0
        parameter.data += 0.1 * draw(generator, *parameter.shape).to(device)
    arguments = draw_layers(generator, H, device)
    allowed = arguments["key_mask"].unsqueeze(1) & arguments["attn_mask"]
    with backend(choice):
        actual = module(**arguments)
    expected = formula(module, arguments["target"], arguments["source"], allowed, scorer, fusion)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    cotangent = draw(generator, *actual.shape).to(device)
    names, leaves = zip(*module.named_parameters(), strict=True)
    grads = torch.autograd.grad(actual, leaves, cotangent)
    wanted = torch.autograd.grad(expected, leaves, cotangent, materialize_grads=True, allow_unused=True)
    for name, grad, want in zip(names, grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("scorer", SCORERS)
def test_every_parameter_gets_a_finite_gradient(device: str, scorer: str) -> None:
    module = message(device, scorer=scorer, value_residual=True, alpha_init=0.1, norm_projections=True)
    arguments = draw_layers(fresh_generator(), H, device)
    arguments["source"][~arguments["key_mask"]] = float("nan")
    out, entropy = module(**arguments, return_entropy=True)
    (out.square().sum() + entropy).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or name == "pair_out.bias", name


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_message_in_half_precision(device: str, scorer: str, dtype: torch.dtype) -> None:
    arguments = draw_layers(fresh_generator(), H, device, torch.float32)
    module = message(device, torch.float32, scorer=scorer, value_residual=True, alpha_init=0.1, norm_projections=True)
    exact = module(**arguments)
    with torch.autocast(torch.device(device).type, dtype):
        mixed, entropy = module(**arguments, return_entropy=True)
    assert mixed.dtype == dtype and entropy.dtype == torch.float32
    mixed.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters() if parameter.grad is not None)
    torch.testing.assert_close(mixed.float(), exact, rtol=0.1, atol=0.05)
    arguments |= {name: arguments[name].to(dtype) for name in ("target", "source")}
    half = module.to(dtype)(**arguments)
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.05)


def test_dropout_acts_in_training_only(device: str) -> None:
    module = message(device, dropout=0.5)
    arguments = draw_layers(fresh_generator(), H, device)
    zeros = (module(**arguments) == 0).double().mean()
    assert 0.2 < zeros < 0.8
    module.eval()
    assert torch.equal(module(**arguments), module(**arguments)) and (module(**arguments) != 0).all()


@pytest.mark.parametrize("scorer", SCORERS)
def test_state_dict_round_trip(device: str, scorer: str) -> None:
    options = {"scorer": scorer, "value_residual": True, "alpha_init": 0.1, "norm_projections": True}
    first, second = message(device, **options), message(device, **options)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    arguments = draw_layers(fresh_generator(), H, device)
    assert torch.equal(first(**arguments), second(**arguments))


def test_shared_projections_are_one_parameter(device: str) -> None:
    names = [name for name, _ in message(device, share_projections=True).named_parameters()]
    assert "target_proj.weight" in names and "source_proj.weight" not in names
    assert sorted(message(device, share_projections=True).state_dict()) == sorted(names)


def test_reset_parameters_restores_the_initial_values(device: str) -> None:
    module = message(device, scorer="bilinear", value_residual=True, residual_beta=0.25, alpha_init=0.05)
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7.0)
    module.reset_parameters()
    assert module.beta.item() == 0.25 and module.alpha.item() == pytest.approx(0.05)
    for name, parameter in module.named_parameters():
        assert not (parameter == 7).any(), name
        assert parameter.std(unbiased=False) <= 2 * before[name].std(unbiased=False) + 1e-12, name


def test_meta_construction_then_materialization() -> None:
    with torch.device("meta"):
        module = HDIMMessage(H, proj_dim=D, mlp_dim=M, alpha_init=0.1)
    module.to_empty(device="cpu").reset_parameters()
    assert module(torch.randn(1, 2, H), torch.randn(1, 3, H)).isfinite().all()


def test_repr_tells_the_options() -> None:
    text = repr(
        HDIMMessage(
            H, proj_dim=D, mlp_dim=M, fusion="concat_only", share_projections=True, value_residual=True, alpha_init=0.1
        )
    )
    for part in (
        "proj_dim=8",
        "mlp_dim=12",
        "'concat_only'",
        "share_projections=True",
        "residual_beta=0.1",
        "alpha_init",
    ):
        assert part in text
    assert "num_heads=4, head_dim=8" in repr(QKVMessage(4, 8))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"scorer": "mlp"}, "scorer must be one of 4term, bilinear, cosine; got 'mlp'"),
        ({"fusion": "sum"}, "fusion must be one of"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"value_activation": "tanh"}, "value_activation must be one of"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"dropout": 1.5}, "dropout"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        HDIMMessage(H, **options)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"source": torch.ones(3, 7, H)}, ValueError, "source must have shape"),
        ({"source": torch.ones(2, 7, H + 1)}, ValueError, "source must have shape"),
        ({"target": torch.ones(5, H)}, ValueError, "target must have shape"),
        ({"target": torch.ones(2, 5, H).long()}, TypeError, "target must be a floating-point tensor"),
        ({"key_mask": torch.ones(2, 8, dtype=torch.bool)}, ValueError, "key_mask must have shape"),
        ({"key_mask": torch.ones(2, 7)}, TypeError, "key_mask must be a bool tensor"),
        ({"attn_mask": torch.ones(2, 7, 5, dtype=torch.bool)}, ValueError, "attn_mask must have shape"),
    ],
)
def test_bad_calls_are_named(change: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        HDIMMessage(H)(**({"target": torch.ones(2, 5, H), "source": torch.ones(2, 7, H)} | change))


# ---- QKVMessage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_qkv_message_is_multi_head_attention(device: str, masked: bool, extra: bool) -> None:
    generator = fresh_generator()
    module = QKVMessage(4, 8, extra_value_projection=extra).to(device, torch.float64).eval()
    q, k, v = (draw(generator, 2, n, 32).to(device) for n in (5, 7, 7))
    mask = draw_layers(generator, H, device)["key_mask"] if masked else None
    expected = torch.zeros_like(q)
    for head in range(4):
        columns = slice(8 * head, 8 * head + 8)
        logits = q[..., columns] @ k[..., columns].mT / math.sqrt(8)
        if mask is not None:
            logits = logits.masked_fill(~mask.unsqueeze(1), -torch.inf)
        values = v[..., columns] if module.value_proj is None else v[..., columns] @ module.value_proj.weight.T
        expected[..., columns] = logits.softmax(-1) @ values
    torch.testing.assert_close(module(q, k, v, key_mask=mask), expected)


def test_qkv_message_ignores_masked_keys_and_zeroes_empty_rows(device: str) -> None:
    generator = fresh_generator()
    module = QKVMessage(4, 8, extra_value_projection=True).to(device, torch.float64).eval()
    mask = draw_layers(generator, H, device)["key_mask"]
    mask[0, :2] = True
    mask[1] = False
    clean = [draw(generator, 2, n, 32).to(device) for n in (5, 7, 7)]
    results = []
    for filler in (0.0, float("nan")):
        q, k, v = (tensor.clone() for tensor in clean)
        k[~mask], v[~mask] = filler, filler
        leaves = [tensor.requires_grad_() for tensor in (q, k, v)] + list(module.parameters())
        out = module(q, k, v, key_mask=mask)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not results[1][0][1].any() and not results[1][1][1].any()


def test_qkv_dropout_acts_in_training_only(device: str) -> None:
    module = QKVMessage(4, 8, dropout=0.5).to(device)
    q, k, v = (torch.randn(2, n, 32, device=device) for n in (5, 7, 7))
    assert not torch.equal(module(q, k, v), module(q, k, v))
    module.eval()
    assert torch.equal(module(q, k, v), module(q, k, v))


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"query": torch.ones(2, 5, 31)}, ValueError, "key must have shape"),
        ({"value": torch.ones(2, 6, 32)}, ValueError, "value must have shape"),
        ({"key_mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, "key_mask must have shape"),
        ({"key_mask": torch.ones(2, 7)}, TypeError, "key_mask must be a bool tensor"),
    ],
)
def test_qkv_names_bad_arguments(change: dict[str, Any], error: type[Exception], told: str) -> None:
    good = {"query": torch.ones(2, 5, 32), "key": torch.ones(2, 7, 32), "value": torch.ones(2, 7, 32)}
    with pytest.raises(error, match=told):
        QKVMessage(4, 8)(**(good | change))
    with pytest.raises(ValueError, match=r"query must have 24 features \(3 heads × 8\), got 32"):
        QKVMessage(3, 8)(**good)
    with pytest.raises(ValueError, match="dropout must be between 0 and 1"):
        QKVMessage(4, 8, dropout=2.0)


# ---- compile ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.traced
def test_message_compiles_to_one_graph_for_all_lengths(device: str, scorer: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    generator = fresh_generator()
    module = message(device, torch.float32, scorer=scorer, value_residual=True)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for b, st, ss in [(2, 5, 7), (3, 9, 4), (4, 6, 11)]:
        target, source = draw(generator, b, st, H).float().to(device), draw(generator, b, ss, H).float().to(device)
        mask = (torch.rand(b, ss, generator=generator) < 0.7).to(device)
        actual, expected = compiled(target, source, key_mask=mask), module(target, source, key_mask=mask)
        torch.testing.assert_close(actual, expected)
        grads = torch.autograd.grad(actual.square().sum(), list(module.parameters()))
        wanted = torch.autograd.grad(expected.square().sum(), list(module.parameters()))
        for grad, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.traced
def test_messages_through_inductor(device: str) -> None:
    torch._dynamo.reset()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hdim, self.qkv = message("cpu", torch.float32), QKVMessage(4, 8).eval()

        def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
            return self.hdim(x, y, key_mask=mask) + self.qkv(x, y, y, key_mask=mask)

    generator, net = fresh_generator(), Net().to(device)
    x, y = draw(generator, 2, 5, H).float().to(device), draw(generator, 2, 7, H).float().to(device)
    mask = draw_layers(generator, H, device)["key_mask"]
    actual, expected = torch.compile(net, fullgraph=True)(x, y, mask), net(x, y, mask)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    actual.square().sum().backward()
    compiled = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    expected.square().sum().backward()
    for parameter, grad in zip(net.parameters(), compiled, strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-4)


def test_examples_in_the_docstrings() -> None:
    for name in ("functional.hdim", "functional.routing", "nn.hdim", "nn.routing"):
        result = doctest.testmod(importlib.import_module(f"xlayer_ext.{name}"))
        assert result.attempted and not result.failed, name
