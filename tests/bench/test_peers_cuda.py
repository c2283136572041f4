"""Calls of packages for GPUs, on stand-ins with their signatures, layouts and element types.

The packages themselves have not been run here: what these tests show is that, if they compute what their sources say,
our calls give them our inputs in the right order, and get our numbers.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cases import hyper as hyper_cases
from benchmarks.cases import peers_cuda
from benchmarks.cases import quantize as quantize_cases
from benchmarks.harness import measure
from xlayer_ext import reference
from xlayer_ext.testing import relative_error

SIZE = [2, 6, 32, 4]


def install(monkeypatch: pytest.MonkeyPatch, **modules: dict[str, Any]) -> None:
    """Installs stand-in modules under their dotted names, given with `_` for the dots inside of names."""
    for dotted, members in modules.items():
        parts = dotted.split("__")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
        for name, member in members.items():
            monkeypatch.setattr(sys.modules[".".join(parts)], name, member, raising=False)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_cuda, "DEVICE", "cpu")


def balanced(logits: Tensor, rounds: int, eps: float) -> Tensor:
    """Runs Sinkhorn as both packages do it: the last axis first, eps added everywhere."""
    found = logits.softmax(-1) + eps
    for at in range(rounds):
        if at:
            found = found / (found.sum(-1, keepdim=True) + eps)
        found = found / (found.sum(-2, keepdim=True) + eps)
    return found


def root(x: Tensor, eps: float) -> Tensor:
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()


# ---- stand-ins -------------------------------------------------------------------------------------------------------


def liger_mhc_coeffs(
    x, phi, b, alpha_pre, alpha_post, alpha_res, *,
    allow_fp32=False, tmax=20, rms_eps=1e-6, pre_eps=0.0, sinkhorn_eps=1e-6, post_mult=2.0,
):  # fmt: skip
    """Computes coefficients from phi [HC·C, HC²+2·HC], columns pre, post, res; h_res[out, in]."""
    assert x.dtype in (torch.bfloat16, torch.float16) or (allow_fp32 and x.dtype == torch.float32)
    n = x.shape[-2]
    flat = x.flatten(-2).float()
    mix = flat @ phi.float() * root(flat, rms_eps)
    pre, post, res = mix.split([n, n, n * n], -1)
    h_pre = torch.sigmoid(pre * alpha_pre + b[:n]) + pre_eps
    h_post = torch.sigmoid(post * alpha_post + b[n : 2 * n]) * post_mult
    return h_pre, h_post, balanced((res * alpha_res + b[2 * n :]).unflatten(-1, (n, n)), tmax, sinkhorn_eps)


def liger_mhc_pre(x, h_pre):
    assert h_pre.shape == x.shape[:-1]
    return (h_pre.unsqueeze(-1) * x.float()).sum(-2).to(x.dtype)


def liger_mhc_post_res(x, f_out, h_post, h_res):
    assert h_post.shape == x.shape[:-1] and f_out.shape == (*x.shape[:-2], x.shape[-1])
    return (h_res @ x.float() + h_post.unsqueeze(-1) * f_out.float().unsqueeze(-2)).to(x.dtype)


LIGER = {
    "liger_mhc_coeffs": liger_mhc_coeffs,
    "liger_mhc_pre": liger_mhc_pre,
    "liger_mhc_post_res": liger_mhc_post_res,
}


def mhc_pre(
    residual, fn, scale, base, *, norm_weight=None, norm_eps=1e-6, mhc_mult=4, post_mult_value=1.0, pre_eps=1e-6,
    sinkhorn_eps=1e-6, sinkhorn_repeat=10, n_splits=16,
):  # fmt: skip
    """Computes pre from fn [n²+2n, n·d], rows pre, post, comb[in, out]; scale [3] in the same order."""
    assert residual.dtype == torch.bfloat16 and residual.dim() == 4 and residual.is_contiguous()
    assert fn.dtype == scale.dtype == base.dtype == torch.float32 and scale.shape == (3,) and norm_weight is None
    n = mhc_mult
    flat = residual.flatten(-2).float()
    mixes = flat @ fn.T * root(flat, norm_eps) * scale.repeat_interleave(torch.tensor([n, n, n * n])) + base
    pre, post, comb = mixes.split([n, n, n * n], -1)
    x = ((pre.sigmoid() + pre_eps).unsqueeze(-1) * residual.float()).sum(-2).bfloat16()
    comb = balanced(comb.unflatten(-1, (n, n)), sinkhorn_repeat, sinkhorn_eps)
    return x, ((post.sigmoid() * post_mult_value).unsqueeze(-1), comb)


def mhc_post(x, residual, post_layer_mix, comb_res_mix, out=None):
    assert x.dtype == residual.dtype == torch.bfloat16
    assert post_layer_mix.dtype == comb_res_mix.dtype == torch.float32
    assert post_layer_mix.shape == (*residual.shape[:-1], 1)
    assert x.is_contiguous() and post_layer_mix.is_contiguous() and comb_res_mix.is_contiguous()
    kept = torch.einsum("abmn,abmc->abnc", comb_res_mix, residual.float())
    return (kept + post_layer_mix * x.float().unsqueeze(-2)).bfloat16()


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch, on_cpu: None) -> None:
    install(
        monkeypatch,
        liger_kernel__transformers__functional=LIGER,
        tile_kernels__modeling__mhc__functional={"mhc_pre": mhc_pre},
        tile_kernels__modeling__mhc__ops={"mhc_post": mhc_post},
    )


# ---- manifold-constrained hyper-connections --------------------------------------------------------------------------

MEASURED = [("liger-kernel", "float32"), ("liger-kernel", "bfloat16"), ("tile-kernels", "bfloat16")]
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("pass_", measure.PASSES)
@pytest.mark.parametrize(("op", "outputs"), [("post", 1), ("pre+post", 2)])
@pytest.mark.parametrize(("package", "dtype"), MEASURED)
def test_a_package_for_mhc_gives_our_numbers(package: str, dtype: str, op: str, outputs: int, pass_: str) -> None:
    build = partial(hyper_cases.build, op=op, kind="mhc", size=SIZE, packed=False, dtype=dtype, device="cpu")
    found, expected = (build(impl, pass_=pass_)() for impl in (package, "eager"))
    # Then come gradients of parameters, which are laid out otherwise; `check_mhc` has compared them.
    same = {"fwd": outputs, "bwd": 2, "fwd+bwd": outputs + 2}[pass_]
    for one, other in zip(found[:same], expected[:same], strict=True):
        assert relative_error(one, other) < TOLERANCE[dtype]


@pytest.mark.usefixtures("packages")
def test_the_backward_of_pre_gives_a_gradient_for_each_input() -> None:
    gradients = hyper_cases.build("liger-kernel", "pre", "bwd", "mhc", SIZE, False, "bfloat16", "cpu")()
    b, s, d, n = SIZE
    shapes = [(b, s, n, d), (n * d, n * (n + 2)), (n * (n + 2),), (), (), ()]
    assert [tuple(gradient.shape) for gradient in gradients] == shapes
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(("package", "dtype"), MEASURED)
def test_coefficients_are_ours(package: str, dtype: str) -> None:
    given = hyper_cases.make_inputs("mhc", SIZE, False, dtype, "cpu")
    x, post, mixing = peers_cuda.mhc(package, "pre", *given)[0]()
    expected, coefficients = reference.hyper_pre(given.streams, given.connection)
    assert relative_error(x, expected) < TOLERANCE[dtype]
    assert relative_error(post, coefficients[..., -1:]) < TOLERANCE[dtype]
    assert relative_error(mixing, coefficients[..., 1:-1]) < TOLERANCE[dtype]


def transposed(x: Tensor, f_out: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    return liger_mhc_post_res(x, f_out, h_post, h_res.transpose(-1, -2))


def without_gradient(x: Tensor, h_pre: Tensor) -> Tensor:
    return liger_mhc_pre(x, h_pre.detach())


def fails(x: Tensor, h_pre: Tensor) -> Tensor:
    raise RuntimeError("no compiler\nlong story")


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(
    ("member", "wrong", "says"),
    [
        ("liger_mhc_post_res", transposed, "AssertionError: liger-kernel streams: differs"),
        ("liger_mhc_pre", without_gradient, "AssertionError: liger-kernel grad"),
        ("liger_mhc_pre", fails, "RuntimeError: no compiler$"),
    ],
)
def test_what_differs_or_fails_is_left_out(member: str, wrong: Callable[..., Any], says: str, monkeypatch):
    monkeypatch.setattr(sys.modules["liger_kernel.transformers.functional"], member, wrong)
    given = hyper_cases.make_inputs("mhc", SIZE, False, "float32", "cpu")
    with pytest.raises(measure.Unavailable, match=says):
        peers_cuda.mhc("liger-kernel", "pre+post", *given)


@pytest.mark.usefixtures("packages")
def test_what_a_package_cannot_take_is_said() -> None:
    given = hyper_cases.make_inputs("mhc", SIZE, False, "float32", "cpu")
    with pytest.raises(measure.Unavailable, match="takes bfloat16"):
        peers_cuda.mhc("tile-kernels", "pre", *given)
    scale = torch.arange(6.0)
    uneven = given._replace(connection=given.connection._replace(scale=scale))
    with pytest.raises(measure.Unavailable, match="one scale"):
        peers_cuda.mhc("liger-kernel", "pre", *uneven)


def test_cases_of_a_gpu_name_them_and_those_of_a_cpu_do_not() -> None:
    for device, there in (("cpu", False), ("cuda", True)):
        options = argparse.Namespace(device=device, dtype=["bfloat16"])
        hyper = {(case.op, case.name, case.pass_): case.peers for case in hyper_cases.make_cases(options)}
        assert ("liger-kernel" in hyper["pre+post", "mhc", "bwd"]) is there
        assert ("tile-kernels" in hyper["pre", "mhc", "fwd"]) is there
        assert "tile-kernels" not in hyper["pre", "mhc", "fwd+bwd"] + hyper["boundary", "mhc", "fwd"]
        assert not set(peers_cuda.MHC) & {*hyper["pre+post", "dhc", "fwd"], *hyper["pre+post", "mhc-stream", "fwd"]}
        nearest = [case.peers for case in quantize_cases.make_cases(options) if case.op == "nearest"]
        assert all((peers_cuda.CUVS in peers) is there for peers in nearest)


@pytest.mark.parametrize("family", ["hyper", "quantize"])
def test_the_command_finds_them_without_their_packages(family: str) -> None:
    command = [sys.executable, "-m", "benchmarks", family, "--help"]
    root = Path(__file__).parents[2]
    assert "--suite" in subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout


# ---- nearest codes ---------------------------------------------------------------------------------------------------


class Resources:
    def __init__(self, stream: int | None = None) -> None:
        self.stream = stream


def build(dataset, metric="sqeuclidean", metric_arg=2.0, resources=None):
    assert dataset.dtype in (torch.float32, torch.float16) and resources.stream == 1
    return SimpleNamespace(dataset=dataset, metric=metric, trained=True)


def search(index, queries, k, neighbors=None, distances=None, resources=None, prefilter=None):
    assert neighbors.dtype == torch.int64 and distances.dtype == torch.float32
    assert neighbors.shape == distances.shape == (len(queries), k) and resources.stream == 1
    x, codes = queries.float(), index.dataset.float()
    if index.metric == "cosine":
        every = 1 - torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(codes).T
    else:
        assert index.metric == "sqeuclidean"
        every = torch.cdist(x, codes).square()
    found = every.topk(k, largest=False)
    neighbors.copy_(found.indices)
    distances.copy_(found.values)
    return distances, neighbors


def worst(index, queries, k, neighbors=None, distances=None, resources=None, prefilter=None):
    neighbors.zero_()


@pytest.fixture
def cuvs(monkeypatch: pytest.MonkeyPatch, on_cpu: None) -> None:
    install(
        monkeypatch,
        cuvs__common={"Resources": Resources},
        cuvs__neighbors__brute_force={"build": build, "search": search},
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))


@pytest.mark.usefixtures("cuvs")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("how", ["euclidean", "cosine"])
def test_cuvs_finds_our_codes(how: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"op": "nearest", "pass_": "fwd", "how": how, "size": [200, 37, 16], "dtype": dtype, "device": "cpu"}
    indices, distance = quantize_cases.build(peers_cuda.CUVS, **arguments)()
    expected = quantize_cases.build("eager", **arguments)()
    assert torch.equal(indices, expected[0])
    torch.testing.assert_close(distance, expected[1], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(sys.modules["cuvs.neighbors.brute_force"], "search", worst)
    with pytest.raises(measure.Unavailable, match="not the nearest"):
        quantize_cases.build(peers_cuda.CUVS, **arguments)


@pytest.mark.usefixtures("cuvs")
def test_cuvs_does_not_take_bfloat16() -> None:
    x = torch.randn(5, 4).bfloat16()
    with pytest.raises(measure.Unavailable, match=r"not torch\.bfloat16"):
        peers_cuda.cuvs_nearest("euclidean", x, x)


# ---- where they are not ----------------------------------------------------------------------------------------------


def test_on_a_cpu_they_are_unavailable() -> None:
    given = hyper_cases.make_inputs("mhc", SIZE, False, "bfloat16", "cpu")
    for package in peers_cuda.MHC:
        with pytest.raises(measure.Unavailable, match="on GPUs alone"):
            peers_cuda.mhc(package, "pre", *given)
    with pytest.raises(measure.Unavailable, match="on GPUs alone"):
        peers_cuda.cuvs_nearest("euclidean", torch.ones(2, 2), torch.ones(2, 2))


@pytest.mark.usefixtures("on_cpu")
def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    given = hyper_cases.make_inputs("mhc", SIZE, False, "bfloat16", "cpu")
    with pytest.raises(measure.Unavailable, match="No module named 'liger_kernel"):
        peers_cuda.mhc("liger-kernel", "pre", *given)
