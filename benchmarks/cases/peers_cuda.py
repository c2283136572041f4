"""Packages that run on GPUs alone, called as our operators are: their layouts, element types and orders of parameters.

The calls follow the packages' published sources (Liger-Kernel 0.8, TileKernels of April 2026, cuVS 26). They have not
been run against the packages: tests hold the mapping to stand-ins with the same signatures, in plain PyTorch. So here
whatever goes wrong, results that differ from the plain formula included, only leaves a package out, with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.harness.measure import Unavailable
from xlayer_ext import reference
from xlayer_ext.functional import Connection
from xlayer_ext.testing import relative_error

Outputs = tuple[Tensor, ...]
Call = Callable[[], Outputs]
DEVICE = "cuda"


@contextmanager
def or_unavailable(package: str, tensor: Tensor) -> Iterator[None]:
    """Turns every error inside, and any other device than a GPU, into `Unavailable`."""
    if tensor.device.type != DEVICE:
        raise Unavailable(f"{package} runs on GPUs alone")
    try:
        yield
    except Exception as error:
        said = str(error).strip().partition("\n")[0]
        raise Unavailable(f"{package}: {type(error).__name__}: {said}") from error


# ---- manifold-constrained hyper-connections, `norm="rms_all"`, `form="sinkhorn_rows"` ------------------------------


class ManifoldPeer(Protocol):
    """Interface of a package; `post [..., n, 1]` and `mixing [..., j, i]`, M_ij, are the last and inner columns of our
    coefficients."""

    def parameters(self, connection: Connection, dtype: torch.dtype) -> list[Tensor]:
        """Returns our parameters in its order: the weight of the coefficients, their base, and its scales."""

    def pre(self, streams: Tensor, parameters: list[Tensor], connection: Connection) -> tuple[Tensor, Tensor, Tensor]:
        """Returns branch input, post and mixing."""

    def post(self, streams: Tensor, branch_output: Tensor, post: Tensor, mixing: Tensor) -> Tensor: ...

    def weight_gradient(self, gradient: Tensor) -> Tensor:
        """Returns a gradient of its weight in the layout of `their_order`."""


def their_order(values: Tensor, n: int) -> Tensor:
    """Reorders rows or numbers (j, m) of `[n·(n+2), …]`: first all pre_j, then all post_j, then M, j by j. Both
    packages normalize the second index of M first and the first one last; these are our columns and rows if M is passed
    transposed, as our coefficients have it."""
    each = values.unflatten(0, (n, n + 2))
    return torch.cat([each[:, 0], each[:, -1], each[:, 1:-1].flatten(0, 1)])


def _scales(connection: Connection) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the scales of pre, post and M: both packages have one number for each, where we have one for each
    column."""
    assert connection.scale is not None
    pre, *inner, post = connection.scale.unbind()
    if any(not torch.equal(scale, inner[0]) for scale in inner):
        raise ValueError("one scale for all of M is needed")
    return pre, post, inner[0]


class Liger:
    """Calls `liger_mhc_coeffs`, `liger_mhc_pre` and `liger_mhc_post_res` of Liger-Kernel (Triton).

    phi is `[n·d, n²+2n]`, in 16 bits with streams of 16 bits, for that is what it has tensor cores for. It applies
    M[out, in], so the mixing is transposed once more on its way to `post`: n² numbers per token beside n·d. With
    float32 streams its products may be rounded to TF32. Its eps in Sinkhorn's algorithm, which we do without, is 0.
    """

    def __init__(self) -> None:
        self.api: Any = importlib.import_module("liger_kernel.transformers.functional")

    def parameters(self, connection: Connection, dtype: torch.dtype) -> list[Tensor]:
        assert connection.weight is not None
        n = len(connection.base)
        phi = their_order(connection.weight, n).T.contiguous().to(dtype)
        return [phi, their_order(connection.base.flatten(), n).float(), *(s.float() for s in _scales(connection))]

    def pre(self, streams: Tensor, parameters: list[Tensor], connection: Connection) -> tuple[Tensor, Tensor, Tensor]:
        phi, base, pre, post, mixing = parameters
        h_pre, h_post, h_res = self.api.liger_mhc_coeffs(
            streams, phi, base, pre, post, mixing, allow_fp32=streams.dtype == torch.float32,
            tmax=connection.sinkhorn_iters, rms_eps=connection.eps, pre_eps=0.0, sinkhorn_eps=0.0, post_mult=2.0,
        )  # fmt: skip
        return self.api.liger_mhc_pre(streams, h_pre), h_post.unsqueeze(-1), h_res

    def post(self, streams: Tensor, branch_output: Tensor, post: Tensor, mixing: Tensor) -> Tensor:
        out: Tensor = self.api.liger_mhc_post_res(streams, branch_output, post.squeeze(-1), mixing.transpose(-1, -2))
        return out

    def weight_gradient(self, gradient: Tensor) -> Tensor:
        return gradient.T


class Tile:
    """Calls `mhc_pre` and `mhc_post` of TileKernels (TileLang; bfloat16 streams, n = 4, compute capability 9 or 10).

    fn is `[n²+2n, n·d]` in float32, used as TF32; M is laid out and applied as ours. Without gradients it takes its
    fused kernel. The backward of `mhc_pre` adds to what the backward of `mhc_post` on the same streams left behind, and
    cannot run without one.
    """

    def __init__(self) -> None:
        self.pre_of: Any = importlib.import_module("tile_kernels.modeling.mhc.functional").mhc_pre
        self.post_of: Any = importlib.import_module("tile_kernels.modeling.mhc.ops").mhc_post

    def parameters(self, connection: Connection, dtype: torch.dtype) -> list[Tensor]:
        assert connection.weight is not None
        if dtype != torch.bfloat16:
            raise TypeError(f"it takes bfloat16, not {dtype}")
        n = len(connection.base)
        fn, base = their_order(connection.weight, n), their_order(connection.base.flatten(), n)
        return [fn, base, torch.stack(_scales(connection))]

    def pre(self, streams: Tensor, parameters: list[Tensor], connection: Connection) -> tuple[Tensor, Tensor, Tensor]:
        fn, base, scale = parameters
        x, (post, mixing) = self.pre_of(
            streams, fn, scale, base, norm_eps=connection.eps, mhc_mult=streams.shape[-2], post_mult_value=2.0,
            pre_eps=0.0, sinkhorn_eps=0.0, sinkhorn_repeat=connection.sinkhorn_iters,
        )  # fmt: skip
        return x, post, mixing

    def post(self, streams: Tensor, branch_output: Tensor, post: Tensor, mixing: Tensor) -> Tensor:
        out: Tensor = self.post_of(branch_output, streams, post, mixing)
        return out

    def weight_gradient(self, gradient: Tensor) -> Tensor:
        return gradient


MHC: dict[str, Callable[[], ManifoldPeer]] = {"liger-kernel": Liger, "tile-kernels": Tile}


def mhc_peers(op: str, pass_: str) -> tuple[str, ...]:
    """Names the packages that a case of manifold-constrained connections is timed against; none fuses the boundary of
    sublayers."""
    if op == "boundary":
        return ()
    return ("liger-kernel",) if (op, pass_[-3:]) == ("pre", "bwd") else tuple(MHC)


def mhc(
    package: str, op: str, streams: Tensor, branch_output: Tensor, coefficients: Tensor, connection: Connection
) -> tuple[Call, list[Tensor]]:
    """Returns the call of an operator, and the tensors that its gradients are taken of: ours, but with three scales in
    all."""
    with or_unavailable(package, streams):
        peer = MHC[package]()
        parameters = [_leaf(tensor) for tensor in peer.parameters(connection, streams.dtype)]
        check_mhc(package, peer, streams, branch_output, parameters, connection)
    if op == "pre":
        return partial(peer.pre, streams, parameters, connection), [streams, *parameters]
    if op == "post":
        made = [_leaf(part) for part in (coefficients[..., -1:], coefficients[..., 1:-1])]
        return lambda: (peer.post(streams, branch_output, *made),), [streams, branch_output, *made]
    both = partial(_pre_post, peer, streams, branch_output, parameters, connection)
    return both, [streams, branch_output, *parameters]


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format).requires_grad_()


def _pre_post(
    peer: ManifoldPeer, streams: Tensor, branch_output: Tensor, parameters: list[Tensor], connection: Connection
) -> Outputs:
    x, post, mixing = peer.pre(streams, parameters, connection)
    return x, peer.post(streams, branch_output, post, mixing)


def check_mhc(
    package: str,
    peer: ManifoldPeer,
    streams: Tensor,
    branch_output: Tensor,
    parameters: list[Tensor],
    connection: Connection,
) -> None:
    """Raises `AssertionError` unless outputs and gradients of pre and post are those of the plain formula."""
    streams, branch_output, base = _leaf(streams), _leaf(branch_output), _leaf(connection.base)
    assert connection.weight is not None
    ours = connection._replace(base=base, weight=_leaf(connection.weight))
    x, coefficients = reference.hyper_pre(streams, ours)
    plain = x, reference.hyper_post(streams, branch_output, coefficients)
    expected = _with_gradients(plain, [streams, branch_output, ours.weight, base])
    theirs = _pre_post(peer, streams, branch_output, parameters, connection)
    found = _with_gradients(theirs, [streams, branch_output, *parameters[:2]])
    n = len(base)
    expected[-2:] = their_order(expected[-2], n), their_order(expected[-1].flatten(), n)
    found[-2] = peer.weight_gradient(found[-2])
    tolerance = 1e-4 if streams.element_size() > 2 else 5e-2
    names = ("x", "streams", "grad streams", "grad branch output", "grad weight", "grad base")
    for name, one, other in zip(names, found, expected, strict=True):
        error = relative_error(one, other)
        if not error <= tolerance:
            raise AssertionError(f"{package} {name}: differs by {error:.1e}")


def _with_gradients(outputs: Outputs, leaves: list[Any]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves, given)]


# ---- nearest codes -------------------------------------------------------------------------------------------------

CUVS = "cuvs-cu13"


def cuvs_nearest(how: str, x: Tensor, codebook: Tensor) -> Call:
    """Searches exactly for one neighbour by `cuvs.neighbors.brute_force`: indices in int64 and distances in float32, as
    ours. It takes float32 and float16. The index is made before: what it computes of the codes is not timed, while ours
    does it in each call."""
    with or_unavailable(CUVS, x):
        if x.dtype not in (torch.float32, torch.float16):
            raise TypeError(f"it takes float32 and float16, not {x.dtype}")
        brute_force: Any = importlib.import_module("cuvs.neighbors.brute_force")
        # torch's handle of the null stream is 0, which the package takes for None; CUDA's own handle of it is 1.
        stream = torch.cuda.current_stream(x.device).cuda_stream or 1
        resources = importlib.import_module("cuvs.common").Resources(stream=stream)
        metric = {"euclidean": "sqeuclidean", "cosine": "cosine"}[how]
        index = brute_force.build(codebook, metric=metric, resources=resources)
        call = partial(_search, brute_force, index, x, codebook, resources)
        check_nearest(how, x, codebook, call()[0])
    return call


def _search(brute_force: Any, index: Any, x: Tensor, codebook: Tensor, resources: Any) -> Outputs:
    """Searches the index; takes the codebook as an argument to keep it alive, since the index may point into it."""
    indices = torch.empty(len(x), 1, dtype=torch.int64, device=x.device)
    distances = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    brute_force.search(index, x, 1, neighbors=indices, distances=distances, resources=resources)
    return indices.squeeze(1), distances.squeeze(1)


def check_nearest(how: str, x: Tensor, codebook: Tensor, indices: Tensor, scores: int = 1 << 26) -> None:
    """Raises `AssertionError` unless the codes are as near as those of the plain formula, for the first rows."""
    x, indices = (part[: max(1, scores // len(codebook))] for part in (x, indices))
    _, exact = reference.vq_nearest(x, codebook, how)
    _, chosen = reference.vq_nearest(x.unsqueeze(1), codebook[indices].unsqueeze(1), how)
    if not torch.allclose(chosen.squeeze(1), exact, rtol=1e-4, atol=1e-5):
        raise AssertionError("its codes are not the nearest ones")
