"""Quantization: native kernels against plain PyTorch, `torch.compile`, the PyPI package and the machine's limit.

Four operators: `nearest`, the nearest code of each row; `statistics`, what falls to each code; `train`, one forward of
`nn.VectorQuantizer` in training, with the update of its codebook; and `fsq`. In rows of `nearest`, `gemm` is the matrix
product x·cᵀ alone, which writes what the search never does: the N × K scores.

The package `vector-quantize-pytorch` gets our codebook, and its results are compared with ours before anything is
timed: its codes may differ where two are equally near, or where a number stands on the edge of a bin. On GPUs cuVS
searches as well (`peers_cuda.py`).
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from benchmarks.cases import peers_cuda
from benchmarks.harness import cases as harness_cases
from benchmarks.harness.cases import Case, compiled, settled
from benchmarks.harness.measure import PASSES, Unavailable, Work
from xlayer_ext import backend, functional, reference
from xlayer_ext._backend import use_native
from xlayer_ext.testing import check_oracle
from xlayer_ext.types import Metric

Outputs = tuple[Tensor, ...]
Call = Callable[[], Outputs]
PACKAGE = "vector-quantize-pytorch"
PLAIN_BYTES = 4 << 30  # of scores that plain PyTorch may write


class Setting(NamedTuple):
    """Suite, operator and size (N, K, D) of a case; for fsq the size is (rows, levels, columns)."""

    suite: str
    op: str
    size: tuple[int, int, int]
    how: str = "euclidean"  # the metric, or the bound


def settings(cuda: bool) -> dict[str, Setting]:
    rows = 65536 if cuda else 1024
    numbers = 1 << 22 if cuda else 65536
    return {
        "K4096-D256": Setting("main", "nearest", (rows, 4096, 256)),
        "K4096-D256-cos": Setting("full", "nearest", (rows, 4096, 256), "cosine"),
        "K1024-D64": Setting("full", "nearest", (8 * rows, 1024, 64)),
        "K65536-D64": Setting("large", "nearest", (65536, 65536, 64)),
        "train": Setting("main", "train", (rows, 4096, 256)),
        "train-cos": Setting("full", "train", (rows, 4096, 256), "cosine"),
        "sums": Setting("main", "statistics", (8 * rows, 1024, 256)),
        "sums-one": Setting("full", "statistics", (8 * rows, 1, 256)),
        "fsq-8": Setting("main", "fsq", (numbers, 8, 8), "tanh"),
        "fsq-8-offset": Setting("main", "fsq", (numbers, 8, 8), "offset"),
    }


TOYS = (  # the case `toy` of each operator
    Setting("toy", "nearest", (40, 30, 16)),
    Setting("toy", "statistics", (40, 30, 16)),
    Setting("toy", "train", (40, 30, 16)),
    Setting("toy", "fsq", (40, 5, 4), "offset"),
)


# ---- the least work ------------------------------------------------------------------------------------------------


def least_bytes(op: str, pass_: str, size: Sequence[int], element: int) -> int:
    """Counts each input read once and each output written once; indices have 8 bytes. Training reads x, the codebook
    and its running sums, and writes both and the quantized x."""
    n, k, d = size
    wide = max(element, 4)
    x, codes = n * d * element, k * d * element
    if op == "fsq":
        forward, backward = 2 * x + 8 * n, 3 * x
        return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[pass_]
    return {
        "nearest": x + codes + n * (8 + wide),
        "statistics": x + 8 * n + k * (d + 1) * wide,
        "train": 2 * x + 4 * codes + 8 * n,
    }[op]


def least_flops(op: str, size: Sequence[int]) -> int:
    """Counts two for each multiply-add of x·cᵀ, and one for each number that is added up."""
    n, k, d = size
    return {"nearest": 2 * n * k * d, "statistics": n * d, "train": 2 * n * k * d + n * d, "fsq": 0}[op]


# ---- inputs --------------------------------------------------------------------------------------------------------


def make_inputs(op: str, size: Sequence[int], dtype: str, device: str) -> Outputs:
    """Draws x and codebook, x and indices, or z, the same for every implementation."""
    n, k, d = size
    generator = torch.Generator().manual_seed(0)
    element = getattr(torch, dtype)
    x = torch.randn(n, d, generator=generator).to(device=device, dtype=element)
    if op == "fsq":
        return (x,)
    if op == "statistics":
        return x, torch.randint(k, (n,), generator=generator).to(device)
    return x, torch.randn(k, d, generator=generator).to(device=device, dtype=element)


def nearest(api: Any, how: str, x: Tensor, codebook: Tensor) -> Outputs:
    found: Outputs = api.vq_nearest(x, codebook, metric=how)
    return found


def statistics(api: Any, codes: int, x: Tensor, indices: Tensor) -> Outputs:
    found: Outputs = api.vq_statistics(x, indices, codes)
    return found


def fsq(api: Any, how: str, levels: int, z: Tensor) -> Outputs:
    found: Outputs = api.fsq(z, [levels] * z.shape[-1], bound=how)
    return found


def train(module: nn.Module, choice: str, x: Tensor) -> Outputs:
    with backend(choice):
        out = module(x)
    return out.quantized, out.indices, out.loss


def make_quantizer(how: str, x: Tensor, codebook: Tensor) -> nn.Module:
    """Makes our module in training, with this codebook and the package's defaults of its updates."""
    from xlayer_ext.nn import VectorQuantizer

    torch.manual_seed(0)
    module = VectorQuantizer(x.shape[-1], len(codebook), metric=cast(Metric, how), decay=0.8)
    module.set_codebook(codebook)
    return module.to(x.device).train()


# ---- the PyPI package ----------------------------------------------------------------------------------------------


def _package() -> ModuleType:
    try:
        return importlib.import_module("vector_quantize_pytorch")
    except ImportError as error:
        raise Unavailable(f"{error}; pip install {PACKAGE}") from error


def peer_quantizer(how: str, x: Tensor, codebook: Tensor) -> nn.Module:
    module: nn.Module = _package().VectorQuantize(
        x.shape[-1], codebook_size=len(codebook), use_cosine_sim=how == "cosine"
    )
    module = module.to(x.device)
    codes = torch.nn.functional.normalize(codebook, dim=-1) if how == "cosine" else codebook
    with torch.no_grad():
        module._codebook.embed.copy_(codes.unsqueeze(0))  # type: ignore[union-attr, operator]
        module._codebook.embed_avg.copy_(codes.unsqueeze(0))  # type: ignore[union-attr, operator]
        module._codebook.cluster_size.fill_(1)  # type: ignore[union-attr, operator]
    return module


def peer_call(module: nn.Module, x: Tensor) -> Outputs:
    """Calls the package on x as a batch of one; returns quantized, indices, loss."""
    quantized, indices, loss = module(x.unsqueeze(0))
    return quantized.squeeze(0), indices.squeeze(0), loss


def peer_fsq_call(module: nn.Module, z: Tensor) -> Outputs:
    codes, indices = module(z.unsqueeze(0))
    return codes.squeeze(0), indices.squeeze(0)


def peer_fsq(how: str, levels: int, z: Tensor) -> nn.Module:
    module: nn.Module = _package().FSQ([levels] * z.shape[-1], preserve_symmetry=how == "tanh")
    return module.to(z.device)


def check_peer(op: str, how: str, theirs: Outputs, ours: Outputs, x: Tensor, codebook: Tensor | None) -> None:
    """Raises `AssertionError` where its results are not ours. `theirs` and `ours` begin with (codes, indices)."""
    different = theirs[1].long() != ours[1]
    if op == "fsq":
        wrong = ((theirs[0] - ours[0]).abs() > 1e-5).float().mean()
        if wrong > 1e-4:
            raise AssertionError(f"{PACKAGE} fsq {how}: {wrong:.1e} of the codes differ")
        return
    assert codebook is not None
    rows = x[different]
    each = [_distance(how, rows, codebook[indices[different]]) for indices in (theirs[1].long(), ours[1])]
    if not torch.allclose(each[0], each[1], rtol=1e-4, atol=1e-5):
        raise AssertionError(f"{PACKAGE} {op} {how}: its codes are not the nearest ones")


def _distance(how: str, x: Tensor, codes: Tensor) -> Tensor:
    if how == "euclidean":
        return (x.double() - codes.double()).square().sum(-1)
    return 1 - torch.cosine_similarity(x.double(), codes.double(), dim=-1)


# ---- one implementation --------------------------------------------------------------------------------------------

KERNELS = {
    "nearest": ("vq_nearest",),
    "statistics": ("vq_statistics",),
    "train": ("vq_nearest", "vq_statistics"),
    "fsq": ("fsq",),
}


def implementation(impl: str, op: str, how: str, levels: int, given: Outputs) -> Call:
    """Returns the function to call; raises `Unavailable` where it cannot run."""
    if impl == "native" and not all(use_native(kernel, given[0]) for kernel in KERNELS[op]):
        raise Unavailable("no native kernel is in use; `python -m xlayer_ext.info` says why")
    if impl == peers_cuda.CUVS:
        return peers_cuda.cuvs_nearest(how, *given)
    if op in ("nearest", "train") and impl != "native":
        scores = given[0].shape[0] * given[1].shape[0] * 4
        if scores > PLAIN_BYTES:
            raise Unavailable(f"the scores alone would take {scores / 2**30:.0f} GiB")
    if impl.startswith(PACKAGE):
        return _peer(impl, op, how, levels, given)
    if impl == "gemm":
        return partial(_gemm, *given)
    if op == "train":
        choice = "native" if impl == "native" else "reference"
        function = compiled(train) if impl == "compile" else train
        return partial(function, make_quantizer(how, *given), choice, given[0])
    api = functional if impl == "native" else reference
    operators: dict[str, Callable[..., Outputs]] = {"nearest": nearest, "statistics": statistics, "fsq": fsq}
    operator = operators[op]
    if impl == "compile":
        operator = compiled(operator)
    constants: tuple[Any, ...] = {"nearest": (how,), "statistics": (levels,), "fsq": (how, levels)}[op]
    return partial(operator, api, *constants, *given)


def _gemm(x: Tensor, codebook: Tensor) -> Outputs:
    return (x @ codebook.T,)


def _peer(impl: str, op: str, how: str, levels: int, given: Outputs) -> Call:
    x = given[0]
    function: Callable[..., Outputs] = peer_fsq_call if op == "fsq" else peer_call
    if op == "fsq":
        module = peer_fsq(how, levels, x)
        ours: Outputs = reference.fsq(x, [levels] * x.shape[-1], bound=how)
    else:
        module = peer_quantizer(how, *given)
        indices, _ = reference.vq_nearest(given[0], given[1], how)
        ours = given[1][indices], indices
    module.eval()
    check_peer(op, how, function(module, x), ours, x, given[1] if op != "fsq" else None)
    module.train(op == "train")
    return partial(compiled(function) if impl.endswith("compile") else function, module, x)


def build(impl: str, op: str, pass_: str, how: str, size: list[int], dtype: str, device: str) -> Work:
    """Builds the work of one row, which returns all outputs, or the gradient of z."""
    given = make_inputs(op, size, dtype, device)
    if pass_ != "fwd":
        given[0].requires_grad_()
    call = implementation(impl, op, how, size[1], given)
    work = {"fwd": _forward, "bwd": _backward, "fwd+bwd": _forward_backward}[pass_](call, given[0])
    return settled(work) if impl.endswith("compile") else work


def _forward(call: Call, z: Tensor) -> Work:
    return torch.no_grad()(call)


def _backward(call: Call, z: Tensor) -> Work:
    """Builds a work that runs the backward alone, on one graph that the first call makes and keeps."""

    @functools.cache
    def graph() -> tuple[Tensor, Tensor]:
        with torch._functorch.config.patch(donated_buffer=False):
            codes = call()[0]
        return codes, torch.ones_like(codes)

    return lambda: torch.autograd.grad(graph()[0], z, graph()[1], retain_graph=True)


def _forward_backward(call: Call, z: Tensor) -> Work:
    given = torch.ones_like(z)

    def forward_backward() -> Outputs:
        codes, indices, *_ = call()
        return codes.detach(), indices, *torch.autograd.grad(codes, z, given)

    return forward_backward


# ---- the check before the clock ------------------------------------------------------------------------------------


def check(case: Case) -> None:
    """Compares the native kernels with float64 on the case's own inputs, of large cases on the first rows."""
    a = case.arguments
    _check(case.op, a["how"], tuple(a["size"]), a["dtype"], a["device"])


@functools.cache  # the passes of a case share their results
def _check(op: str, how: str, size: tuple[int, ...], dtype: str, device: str) -> None:
    given = make_inputs(op, size, dtype, device)
    if op in ("nearest", "train"):
        x, codebook = given[0][: max(1, (1 << 26) // size[1])], given[1]
        indices, distance = functional.vq_nearest(x, codebook, metric=cast(Metric, how))
        exact = reference.vq_nearest(x.double(), codebook.double(), how)[1]
        chosen = _distance(how, x, codebook[indices])
        if not torch.allclose(chosen, exact, rtol=1e-5, atol=1e-5):
            raise AssertionError(f"vq_nearest {how}: a code that is not the nearest")
        plain = reference.vq_nearest(x, codebook, how)[1]
        check_oracle(f"vq_nearest {how} distance", distance, chosen, plain)
    elif op == "statistics":
        sides = ((functional, given[0]), (reference, given[0].double()), (reference, given[0]))
        sums = [statistics(api, size[1], x, given[1])[1] for api, x in sides]
        check_oracle("vq_statistics sums", *sums)
    else:
        _check_fsq(how, size[1], given[0])


def _check_fsq(how: str, levels: int, z: Tensor) -> None:
    sides = []
    for api, given in ((functional, z), (reference, z.double()), (reference, z)):
        leaf = given.detach().requires_grad_()
        codes, indices = fsq(api, how, levels, leaf)
        sides.append((codes.detach(), indices, *torch.autograd.grad(codes, leaf, torch.ones_like(codes))))
    check_oracle(f"fsq {how} gradient", *(side[2] for side in sides))
    wrong = (sides[0][0].double() - sides[1][0]).abs() > 1e-5
    if wrong.float().mean() > 1e-4:  # numbers on the edge of a bin
        raise AssertionError(f"fsq {how}: {wrong.float().mean():.1e} of the codes differ")


# ---- the cases -----------------------------------------------------------------------------------------------------


def make_cases(options: argparse.Namespace) -> list[Case]:
    named = settings(cuda=torch.device(options.device).type == "cuda")
    return [
        make_case(name, setting, pass_, dtype, options.device)
        for name, setting in [*named.items(), *(("toy", setting) for setting in TOYS)]
        for dtype in options.dtype
        for pass_ in (PASSES if setting.op == "fsq" else ("fwd",))
    ]


def make_case(name: str, setting: Setting, pass_: str, dtype: str, device: str) -> Case:
    suite, op, size, how = setting
    work = (least_bytes(op, pass_, size, getattr(torch, dtype).itemsize), least_flops(op, size))
    arguments = {"op": op, "pass_": pass_, "how": how, "size": list(size), "dtype": dtype, "device": device}
    peers: tuple[str, ...] = () if op == "statistics" else (PACKAGE, f"{PACKAGE} compile")
    if op == "nearest":
        peers = ("gemm", *peers, *((peers_cuda.CUVS,) if torch.device(device).type == "cuda" else ()))
    return Case("quantize", op, name, pass_, dtype, *work, build, arguments, suite, peers=peers)


def main(argv: Sequence[str] | None = None) -> int:
    return harness_cases.main("Benchmark of quantization.", make_cases, argv, check)


if __name__ == "__main__":
    sys.exit(main())
