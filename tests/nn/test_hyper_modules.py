"""HyperConnection, ManifoldHyperConnection, expand_streams and reduce_streams."""

from __future__ import annotations

import doctest
import importlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import xlayer_ext.nn
from hyper_module_tools import KINDS, D, randomize
from oracle import draw, fresh_generator, need_native
from xlayer_ext import backend
from xlayer_ext import functional as XF
from xlayer_ext.nn import (
    HyperConnection,
    ManifoldHyperConnection,
    expand_streams,
    hyper_connections,
    no_weight_decay,
    reduce_streams,
)
from xlayer_ext.testing import relative_error

pytestmark = pytest.mark.operators


@pytest.fixture(params=["native", "reference"])
def choice(request: pytest.FixtureRequest, device: str) -> str:
    if request.param == "native":
        need_native("hyper_post_pre", device)
    return request.param


def make(kind: str, generator: torch.Generator, n: int = 4, device: str = "cpu", **options: Any) -> Any:
    options = {"device": device, "dtype": torch.float64} | options
    return randomize(KINDS[kind](D, expansion_rate=n, layer_index=1, **options), generator)


# ---- The formulas, one number at a time ------------------------------------------------------------------------------


def normed(x: Tensor, eps: float, centred: bool) -> Tensor:
    x = x - x.mean() if centred else x
    return x / (x.square().mean() + eps).sqrt()


def hyper_coefficients(p: dict[str, Tensor], module: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes α_0 [n], α [n, n] and β [n] of one token's streams [n, d]."""
    alpha, beta = p["static_alpha"], p["static_beta"]
    if "dynamic_alpha" in p:
        act = torch.tanh if module.use_tanh else lambda z: z
        rows = [normed(h_j, module.eps, module.norm == "layer") * p["norm_weight"] + p.get("norm_bias", 0) for h_j in h]
        alpha = alpha + torch.stack([p["alpha_scale"] * act(row @ p["dynamic_alpha"]) for row in rows])
        beta = beta + torch.cat([p["beta_scale"] * act(row @ p["dynamic_beta"]) for row in rows])
    return alpha[:, 0], alpha[:, 1:], beta


def sinkhorn(mixing: Tensor, first: int, last: int, rounds: int) -> Tensor:
    mixing = mixing.exp()
    for _ in range(rounds):
        mixing = mixing / mixing.sum(first, keepdim=True)
        mixing = mixing / mixing.sum(last, keepdim=True)
    return mixing


def manifold_coefficients(p: dict[str, Tensor], module: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes pre [n], mixing [n, n] with element (j, i) = M_ij, and post [n] of one token's streams [n, d]."""
    n = len(h)
    if module.coefficients == "paper":
        x = normed(h.flatten(), module.eps, False) * p["norm_weight"]
        z = x @ p["phi"]
        m = torch.stack([p["residual_scale"] * z[2 * n + i * n : 2 * n + i * n + n] for i in range(n)]) + p["b_res"]
        pre, post = p["pre_scale"] * z[:n] + p["b_pre"], p["post_scale"] * z[n : 2 * n] + p["b_post"]
        return pre.sigmoid(), sinkhorn(m, 0, 1, module.sinkhorn_iters).T, 2 * post.sigmoid()
    rows = [normed(h_j, module.eps, False) * p["norm_weight"] for h_j in h]
    alpha = torch.stack([row @ p["dynamic_alpha"] for row in rows])
    beta = torch.stack([row @ p["dynamic_beta"] for row in rows])
    pre = p["pre_scale"] * alpha[:, 0] + p["static_alpha"][:, 0]
    mixing = p["residual_scale"] * alpha[:, 1:] + p["static_alpha"][:, 1:]
    post = p["post_scale"] * beta + p["static_beta"]
    return pre.sigmoid(), sinkhorn(mixing, 0, 1, module.sinkhorn_iters), 2 * post.sigmoid()


def written_out(module: Any, streams: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
    p = dict(module.named_parameters())
    coefficients = manifold_coefficients if isinstance(module, ManifoldHyperConnection) else hyper_coefficients
    tokens = []
    for h in streams.flatten(0, -3):
        first, mixing, beta = coefficients(p, module, h)
        y = branch(sum(first[j] * h[j] for j in range(len(h))))
        tokens.append(
            torch.stack([beta[k] * y + sum(mixing[j, k] * h[j] for j in range(len(h))) for k in range(len(h))])
        )
    return torch.stack(tokens).reshape(streams.shape)


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_streams_are_the_formula(choice: str, device: str, kind: str, n: int) -> None:
    generator = fresh_generator()
    module = make(kind, generator, n, device, branch=torch.sin)
    streams = draw(generator, 2, 3, n, D).to(device).requires_grad_()
    with backend(choice):
        actual = module(streams)
        cotangent = draw(generator, *actual.shape).to(device)
        leaves = {"streams": streams} | dict(module.named_parameters())
        grads = torch.autograd.grad(actual, list(leaves.values()), cotangent)
    expected = written_out(module, streams, torch.sin)
    wanted = torch.autograd.grad(expected, list(leaves.values()), cotangent)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    for name, grad, want in zip(leaves, grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
        assert n == 1 or want.any(), name


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_boundary_is_a_post_and_a_pre(choice: str, device: str, kind: str, packed: bool) -> None:
    generator = fresh_generator()
    first, second = (make(kind, generator, device=device, packed=packed) for _ in range(2))
    streams = draw(generator, *((8, 3, D) if packed else (2, 3, 4, D))).to(device)
    with backend(choice):
        x, coefficients = first.pre(streams)
        actual = second.boundary(streams, x.sin(), coefficients)
        after = first.post(streams, x.sin(), coefficients)
        expected = (after, *second.pre(after))
        _, add_residual = first(streams)
        torch.testing.assert_close(add_residual(x.sin()), after)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


# ---- Layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(2,), (2, 5), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_streams_are_the_same_streams(choice: str, device: str, kind: str, lead: tuple[int, ...]) -> None:
    generator = fresh_generator()
    module = make(kind, generator, device=device, branch=torch.sin)
    packed = make(kind, generator, device=device, branch=torch.sin, packed=True)
    packed.load_state_dict(module.state_dict())
    streams = draw(generator, *lead, 4, D).to(device)
    together = streams.movedim(-2, 1).flatten(0, 1).contiguous()
    with backend(choice):
        expected, actual = module(streams), packed(together)
        assert packed.pre(together)[0].shape == module.pre(streams)[0].shape
    assert actual.shape == together.shape
    torch.testing.assert_close(actual, expected.movedim(-2, 1).flatten(0, 1))


@pytest.mark.parametrize("lead", [(2,), (2, 5), (2, 3, 5)], ids=str)
def test_packed_streams_are_not_copied(native_only: str, lead: tuple[int, ...]) -> None:
    """The operator's input shares memory with the module's input, and the module's output with the operator's."""
    module = HyperConnection(D, expansion_rate=4, packed=True).to(native_only)
    streams = torch.randn(8, *lead[1:], D, device=native_only)
    given = module._unpack(streams)
    assert given.data_ptr() == streams.data_ptr() and given.untyped_storage().nbytes() == streams.nbytes
    x, coefficients = module.pre(streams)
    out = module.post(streams, x, coefficients)
    assert out.is_contiguous()


@pytest.fixture
def native_only(device: str) -> str:
    need_native("hyper_post", device)
    return device


@pytest.mark.parametrize("packed", [False, True])
def test_expand_and_reduce(packed: bool) -> None:
    x = draw(fresh_generator(), 2, 5, D).requires_grad_()
    streams = expand_streams(x, 4, packed=packed)
    assert streams.shape == ((8, 5, D) if packed else (2, 5, 4, D))
    if packed:
        assert torch.equal(streams.unflatten(0, (2, 4))[:, 3], x)
        options: dict[str, Any] = {"packed": True, "expansion_rate": 4}
    else:
        assert streams.data_ptr() == x.data_ptr() and streams.stride(-2) == 0
        options = {}
    assert torch.equal(reduce_streams(streams, **options), 4 * x)
    assert torch.equal(reduce_streams(streams, reduce="mean", **options), x)
    (grad,) = torch.autograd.grad(reduce_streams(streams, **options).sum(), x)
    assert torch.equal(grad, torch.full_like(x, 4))


@pytest.mark.parametrize("order", ["sd n", "n sd"])
@pytest.mark.parametrize("kind", ["dhc", "mhc"])
def test_any_strides(choice: str, device: str, kind: str, order: str) -> None:
    generator = fresh_generator()
    module = make(kind, generator, device=device, branch=torch.sin)
    streams = draw(generator, 2, 6, 4, D).to(device)
    other = streams.transpose(1, 2).contiguous().transpose(1, 2) if order == "n sd" else streams[:, ::2]
    with backend(choice):
        torch.testing.assert_close(module(other), module(other.contiguous()))


# ---- Disabled, and made by the factory -------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_disabled_connections_are_plain_residuals(kind: str, packed: bool) -> None:
    x = draw(fresh_generator(), 2, 5, D).requires_grad_()
    module = KINDS[kind](D, expansion_rate=4, packed=packed, disable=True, branch=torch.sin)
    options: dict[str, Any] = {"packed": packed, "disable": True}
    out = reduce_streams(module(expand_streams(x, 4, **options)), expansion_rate=4, **options)
    assert torch.equal(out, x + x.sin()) and not list(module.parameters()) and not module.state_dict()
    given, coefficients = module.pre(x)
    streams, again, _ = module.boundary(x, given.sin(), coefficients)
    assert torch.equal(streams, x + x.sin()) and torch.equal(again, streams)
    assert "disable=True" in repr(module) and no_weight_decay(module) == set()
    module.reset_parameters()
    with pytest.raises(ValueError, match=r"must have shape \[\.\.\., 12\] \(disable=True: one residual stream\), got"):
        module(x[..., :7])
    with pytest.raises(ValueError, match=r"branch_output must have shape \[2, 5, 12\].*, got \[5, 12\]"):
        module.post(x, x[0], coefficients)
    half = x.to(torch.bfloat16)  # streams keep their dtype, as with coefficients
    assert module.post(half, x, coefficients).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="has no coefficients"):
        module.connection()


@pytest.mark.parametrize("disable", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["static", "dynamic", "manifold"])
def test_the_factory_keeps_number_and_layout_of_the_streams(kind: Any, packed: bool, disable: bool) -> None:
    made = hyper_connections(
        3, hidden_size=D, kind=kind, packed=packed, disable=disable, reduce="mean", dtype=torch.float64
    )
    connect, expand, reduce = made
    assert connect is made.connect and expand is made.expand and reduce is made.reduce
    blocks = [connect(branch=torch.sin), connect(torch.sin), connect(branch=torch.sin, layer_index=7), connect()]
    assert [block.layer_index for block in blocks] == [0, 1, 7, 2]
    assert {block.packed for block in blocks} == {packed} and {block.expansion_rate for block in blocks} == {3}
    x = wanted = draw(fresh_generator(), 2, 5, D)
    streams = expand(x)
    for block in blocks[:3]:
        streams, wanted = block(streams), wanted + wanted.sin()
    branch_input, add_residual = blocks[3](streams)
    streams, wanted = add_residual(branch_input.sin()), wanted + wanted.sin()
    torch.testing.assert_close(reduce(streams), wanted, rtol=1e-7, atol=1e-7)


def test_the_factory_names_what_is_wrong() -> None:
    connect, *_ = hyper_connections(4, norm="rms")
    first, second = connect(hidden_size=D), connect(hidden_size=D)
    assert first.norm == "rms" and (first.layer_index, second.layer_index) == (0, 1)
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: connect(), "connect needs hidden_size="),
        (lambda: hyper_connections(0, hidden_size=D), "expansion_rate must be at least 1, got 0"),
        (
            lambda: hyper_connections(4, hidden_size=D, kind="plain"),
            "kind must be one of static, dynamic, manifold; got 'plain'",
        ),
        (lambda: hyper_connections(4, hidden_size=D, norm="batch"), "norm must be one of"),
        (lambda: hyper_connections(4, hidden_size=D, streams=2), "streams"),
        (lambda: hyper_connections(4, hidden_size=D, disable=1), "disable must be a bool, got int"),
    ]
    for call, told in calls:
        with pytest.raises((TypeError, ValueError), match=told):
            call()


def test_a_sequence_that_was_not_expanded_is_explained() -> None:
    x = torch.ones(2, 5, D)
    told = r"streams must have shape \[\.\.\., 4, 12\], got \[2, 5, 12\]; expand_streams\(x, 4\) makes 4 streams of x"
    with pytest.raises(ValueError, match=told):
        HyperConnection(D)(x)
    with pytest.raises(ValueError, match=r"\[\(b n\).*got \[2, 5, 12\]; expand_streams\(x, 4, packed=True\)"):
        HyperConnection(D, packed=True)(x)
    for kind in (HyperConnection, ManifoldHyperConnection):
        connection = kind(D).connection()
        told = r"shape \[\.\.\., 4, d\] for the base \[4, 6\] of this connection of 4 streams, got \[2, 5, 12\]; expand"
        with pytest.raises(ValueError, match=told):
            XF.hyper_pre(x, connection)


# ---- The start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_a_residual_connection(device: str, kind: str, n: int) -> None:
    x = draw(fresh_generator(), 2, 5, D).to(device)
    streams = expand_streams(x, n)
    for layer in range(3):
        module = KINDS[kind](
            D, expansion_rate=n, layer_index=layer, branch=torch.sin, device=device, dtype=torch.float64
        )
        streams = module(streams)
        x = x + x.sin()
    torch.testing.assert_close(streams, expand_streams(x, n), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("coefficients", ["paper", "per_stream"])
def test_manifold_connections_keep_their_promises(device: str, coefficients: str) -> None:
    generator = fresh_generator()
    options = {"coefficients": coefficients, "device": device, "dtype": torch.float64}
    module = ManifoldHyperConnection(D, expansion_rate=4, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * draw(generator, *parameter.shape))
    _, c = module.pre(draw(generator, 3, 5, 4, D).to(device))
    mixing = c[..., 1:-1]
    for dim in (-1, -2):
        torch.testing.assert_close(mixing.sum(dim), torch.ones_like(mixing[..., 0]), rtol=1e-3, atol=1e-3)
    assert mixing.min() > 0 and c[..., 0].min() > 0 and c[..., 0].max() < 1
    assert c[..., -1].min() > 0 and c[..., -1].max() < 2


@pytest.mark.parametrize("kind", KINDS)
def test_reset_parameters_restores_the_start(kind: str) -> None:
    module = KINDS[kind](D, expansion_rate=4, layer_index=2)
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    randomize(module, fresh_generator())
    module.reset_parameters()
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())
    with torch.device("meta"):
        made = KINDS[kind](D, expansion_rate=4, layer_index=2)
    made.to_empty(device="cpu").reset_parameters()
    assert all(torch.equal(parameter, before[name]) for name, parameter in made.named_parameters())


def test_device_and_dtype_are_those_of_the_parameters_alone() -> None:
    module = HyperConnection(D, expansion_rate=4, branch=nn.Linear(D, D), dtype=torch.bfloat16, device="meta")
    own = {parameter for name, parameter in module.named_parameters() if not name.startswith("branch")}
    assert all(parameter.dtype == torch.bfloat16 and parameter.is_meta for parameter in own)
    assert module.branch.weight.dtype == torch.float32 and not module.branch.weight.is_meta


# ---- Branches --------------------------------------------------------------------------------------------------------


def test_the_first_tensor_of_a_branch_is_its_output(device: str) -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor, gain: float, *, kept: str) -> dict[str, Any]:
            return {"y": gain * x, "rest": (kept, x.sum())}

    generator = fresh_generator()
    module = make("dhc", generator, device=device, branch=Branch())
    streams = draw(generator, 2, 3, 4, D).to(device)
    out = module(streams, 2.0, kept="a")
    x, coefficients = module.pre(streams)
    torch.testing.assert_close(out["y"], module.post(streams, 2 * x, coefficients))
    assert out["rest"][0] == "a" and torch.equal(out["rest"][1], x.sum())


# ---- Precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_with_float32_streams(choice: str, device: str, kind: str, dtype: torch.dtype) -> None:
    generator = fresh_generator()
    module = make(kind, generator, device=device, dtype=torch.float32, branch=nn.Linear(D, D).to(device))
    streams = draw(generator, 2, 5, 4, D, dtype=torch.float32).to(device)
    with backend(choice):
        exact, coefficients = module(streams), module.pre(streams)[1]
        with torch.autocast(torch.device(device).type, dtype):
            mixed, same = module(streams), module.pre(streams)[1]
            mixed.square().mean().backward()  # of the sum, float16 gradients may exceed 65,504
    assert mixed.dtype == torch.float32 and same.dtype == torch.float32
    torch.testing.assert_close(same, coefficients, rtol=1e-5, atol=1e-6)
    assert relative_error(mixed, exact) < 0.05
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(choice: str, device: str, kind: str, dtype: torch.dtype) -> None:
    generator = fresh_generator()
    module = make(kind, generator, device=device, branch=torch.sin)
    streams = draw(generator, 2, 5, 4, D).to(device)
    exact = module(streams)
    with backend(choice):
        half = module.to(dtype)(streams.to(dtype))
    assert half.dtype == dtype and relative_error(half, exact) < 0.05


# ---- Among the rest of PyTorch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "packed"), [("shc", False), ("dhc", False), ("dhc", True), ("mhc", False)])
@pytest.mark.traced
def test_compiles_to_one_graph_for_all_lengths(device: str, kind: str, packed: bool) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    generator = fresh_generator()
    options = {"device": device, "packed": packed, "dtype": torch.float32}
    net = nn.Sequential(*(make(kind, generator, branch=nn.Tanh(), **options) for _ in range(2)))
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    for b, s in [(2, 5), (3, 9), (5, 4)]:
        shape = (4 * b, s, D) if packed else (b, s, 4, D)
        streams = draw(generator, *shape, dtype=torch.float32).to(device)
        actual, expected = compiled(streams), net(streams)
        torch.testing.assert_close(actual, expected)
        grads = torch.autograd.grad(actual.square().sum(), list(net.parameters()))
        wanted = torch.autograd.grad(expected.square().sum(), list(net.parameters()))
        for grad, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad, want, rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("kind", ["shc", "dhc", "mhc"])
@pytest.mark.traced
def test_exports(device: str, kind: str) -> None:
    generator = fresh_generator()
    module = make(kind, generator, device=device, dtype=torch.float32, branch=nn.Tanh())
    streams = draw(generator, 2, 5, 4, D, dtype=torch.float32).to(device)
    dynamic = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")},)
    exported = torch.export.export(module, (streams,), dynamic_shapes=dynamic).module()
    other = draw(generator, 3, 7, 4, D, dtype=torch.float32).to(device)
    torch.testing.assert_close(exported(other), module(other))


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_bit(choice: str, device: str, kind: str) -> None:
    generator = fresh_generator()
    module = make(kind, generator, device=device, branch=torch.sin)
    streams = draw(generator, 2, 5, 4, D).to(device).requires_grad_()
    leaves = [streams, *module.parameters()]
    with backend(choice):
        plain = torch.autograd.grad(module(streams).square().sum(), leaves)
        again = torch.autograd.grad(checkpoint(module, streams, use_reentrant=False).square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip(kind: str) -> None:
    generator = fresh_generator()
    first, second = (make(kind, generator, branch=torch.sin) for _ in range(2))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    streams = draw(generator, 2, 5, 4, D)
    assert torch.equal(first(streams), second(streams))


def test_weight_decay_is_for_dynamic_weights_alone() -> None:
    net = nn.ModuleDict({kind: KINDS[kind](D, expansion_rate=4, branch=nn.Linear(D, D)) for kind in KINDS})
    decayed = {name for name, _ in net.named_parameters()} - no_weight_decay(net)
    assert {name.split(".", 1)[1] for name in decayed} == {
        "dynamic_alpha",
        "dynamic_beta",
        "phi",
        "branch.weight",  # parameters outside of hyper-connections are not listed
        "branch.bias",
    }


def test_repr_tells_the_options() -> None:
    text = repr(HyperConnection(D, expansion_rate=3, layer_index=2, use_tanh=False, norm="rms", packed=True))
    for part in ("12, expansion_rate=3", "packed=True", "layer_index=2", "use_tanh=False", "norm='rms'"):
        assert part in text
    assert "static_weights=True" in repr(HyperConnection(D, static_weights=True))
    assert "coefficients='per_stream', sinkhorn_iters=7" in repr(
        ManifoldHyperConnection(D, coefficients="per_stream", sinkhorn_iters=7)
    )


@pytest.mark.parametrize(
    ("make_it", "told"),
    [
        (lambda: HyperConnection(0), "hidden_size must be at least 1, got 0"),
        (lambda: HyperConnection(D, expansion_rate=0), "expansion_rate must be at least 1, got 0"),
        (lambda: HyperConnection(D, norm="batch"), "norm must be one of layer, rms; got 'batch'"),
        (lambda: ManifoldHyperConnection(D, coefficients="x"), "coefficients must be one of paper, per_stream"),
        (lambda: ManifoldHyperConnection(D, sinkhorn_iters=0), "sinkhorn_iters must be at least 1"),
        (lambda: reduce_streams(torch.ones(2, 4, D), reduce="max"), "reduce must be one of sum, mean"),
        (lambda: reduce_streams(torch.ones(8, D), packed=True), "expansion_rate must be given"),
        (lambda: HyperConnection(D, packed=True)(torch.ones(7, 3, D)), r"streams must have shape \[\(b n\), ..., d\]"),
        (lambda: HyperConnection(D, expansion_rate=4)(torch.ones(2, 3, D)), r"streams must have shape \[..., 4, "),
        (lambda: HyperConnection(D, expansion_rate=4)(torch.ones(2, 4, D + 1)), f"got .2, 4, {D + 1}"),
        (
            lambda: HyperConnection(D, expansion_rate=4, branch=lambda x: x[..., 1:])(torch.ones(2, 4, D)),
            "branch_output must have",
        ),
    ],
)
def test_bad_options_are_named(make_it: Callable[[], Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make_it()


def test_examples_in_the_docstrings() -> None:
    public = {name: getattr(xlayer_ext.nn, name) for name in xlayer_ext.nn.__all__}
    for name in ("functional.hyper", "nn.hyper", "nn.streams"):
        result = doctest.testmod(importlib.import_module(f"xlayer_ext.{name}"), extraglobs=public | {"torch": torch})
        assert result.attempted and not result.failed, name


def test_the_manifold_kind_is_the_pypi_package_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package, which computes in float32 unless patched, gives the same numbers to the last digits in float64."""
    peers = pytest.importorskip("hyper_connections")
    generator = fresh_generator()
    for n in (2, 3, 4):
        theirs = peers.ManifoldConstrainedHyperConnections(n, dim=D, layer_index=1).double()
        for parameter in theirs.parameters():
            parameter.data = draw(generator, *parameter.shape)
        ours = ManifoldHyperConnection.from_hyper_connections(theirs)
        streams = draw(generator, 2 * n, 5, D).requires_grad_()
        cotangent = draw(generator, *streams.shape)
        results = []
        for module in (theirs, ours):
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "float", torch.Tensor.double)
                x, add_residual = module(streams)
                out = add_residual(x.sin())
                results.append([x, out, *torch.autograd.grad(out, [streams, *module.parameters()], cotangent)])
        named = dict(zip((name for name, _ in theirs.named_parameters()), results[0][3:], strict=True))
        mine = dict(zip((name for name, _ in ours.named_parameters()), results[1][3:], strict=True))
        for a, b in zip(results[0][:3], results[1][:3], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        for ours_name, name in {
            "static_alpha": "static_alpha",
            "static_beta": "static_beta",
            "dynamic_alpha": "dynamic_alpha_fn",
            "dynamic_beta": "dynamic_beta_fn",
            "pre_scale": "pre_branch_scale",
            "residual_scale": "residual_scale",
            "post_scale": "h_post_scale",
            "norm_weight": "norm.gamma",
        }.items():
            torch.testing.assert_close(
                mine[ours_name], named[name].reshape(mine[ours_name].shape), rtol=1e-9, atol=1e-9
            )
