"""Runs every operator's CUDA kernels, forward and backward, under a sanitizer or a profiler.

python -m benchmarks.gpu.cases [--device cuda|emulated]   small odd sizes, every dtype, with masks and without
python -m benchmarks.gpu.cases --large                    hdim_attention once, at the main size of its benchmark
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.cases import hdim as hdim_cases
from benchmarks.cases import hyper as hyper_cases
from benchmarks.gpu import emulator
from xlayer_ext import backend, functional
from xlayer_ext.types import Activation, Form, Metric, Norm

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HDIM_SIZES = ((2, 17, 37, 24, 96, 40), (1, 70, 129, 5, 7, 3), (1, 3, 20, 64, 130, 24))  # B, Sq, Sk, D, M, H
HDIM_ACTIVATIONS: tuple[Activation, ...] = ("relu", "gelu", "relu")
HYPER_SIZES = ((2, 19, 4, 72), (1, 33, 2, 33), (3, 5, 8, 40), (1, 7, 3, 130))  # B, S, n, d
HYPER_CONNECTIONS: tuple[tuple[Norm | None, Form, bool], ...] = (  # norm (None: static), form, whether there is a bias
    (None, "identity", False),
    ("layer", "tanh", True),
    ("rms", "sinkhorn_columns", False),
    ("rms_all", "sinkhorn_rows", False),
)
VQ_SIZES = ((1, 300, 140, 72), (3, 37, 260, 33), (2, 5, 1, 264), (1, 1300, 3, 8))  # books, N, K, D
EMA_SIZES = ((5, 37, 72), (3, 9, 33), (30, 5, 24), (2, 3, 2056))  # L, N, d
GRU_SIZES = ((3, 37, 12, 24), (1, 5, 7, 9))  # L, N, i, d
ATTENTION_SIZES = ((6, 19, 16, 2, 24), (3, 5, 9, 3, 5))  # L, N, d, heads, head width
FSQ_LEVELS = ((8, 5, 5, 5), (3,) * 64, (300,) * 9, (7, 9))
MEAN_SIZES = ((3, 37, 65), (1, 5, 1), (2, 1, 264))  # B, S, H


def draw(*shape: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> Tensor:
    """Draws on the CPU and copies to the device: a sanitizer that tracks initialization sees the copy."""
    return (scale * torch.randn(shape)).to(dtype).to(device)


def draw_mask(*shape: int, device: str) -> Tensor:
    """Draws a mask; of several rows the first allows nothing."""
    mask = torch.rand(shape) < 0.7
    rows = mask.flatten(0, -2)
    rows[: min(1, len(rows) - 1)] = False
    return mask.to(device)


def finish(name: str, out: Tensor, inputs: Sequence[Tensor]) -> None:
    """Runs the backward, and checks that all results are finite."""
    cotangent = draw(*out.shape, dtype=out.dtype, device=str(out.device))
    for result in (out.detach(), *torch.autograd.grad(out, inputs, cotangent)):
        if not result.cpu().isfinite().all():
            raise AssertionError(f"{name}: a result is not finite")


def hdim_attention(dtype: torch.dtype, masked: bool, device: str) -> Iterator[str]:
    for (b, sq, sk, d, m, h), activation in zip(HDIM_SIZES, HDIM_ACTIVATIONS, strict=True):
        name = f"hdim_attention {activation} B={b} Sq={sq} Sk={sk} D={d} M={m} H={h}"
        shapes = [(b, sq, d), (b, sk, d), (b, sk, h), (m, 4 * d), (m,), (m,), (1,)]
        scales = [1.0, 1.0, 1.0, (4 * d) ** -0.5, 0.1, m**-0.5, 0.1]
        inputs = [
            draw(*shape, dtype=dtype, device=device, scale=scale).requires_grad_()
            for shape, scale in zip(shapes, scales, strict=True)
        ]
        key_mask = draw_mask(b, sk, device=device) if masked else None
        attn_mask = draw_mask(b, sq, sk, device=device) if masked else None
        out = functional.hdim_attention(
            *inputs, key_mask=key_mask, attn_mask=attn_mask, activation=activation, return_entropy=True
        )
        assert isinstance(out, tuple)
        finish(name, out[0] * (1 + out[1]), inputs)  # the entropy's gradient goes through the kernel too
        yield name


def masked_mean(dtype: torch.dtype, masked: bool, device: str) -> Iterator[str]:
    for b, s, h in MEAN_SIZES:
        name = f"masked_mean B={b} S={s} H={h}"
        x = draw(b, s, h, dtype=dtype, device=device).requires_grad_()
        finish(name, functional.masked_mean(x, draw_mask(b, s, device=device) if masked else None), [x])
        yield name


def hyper_inputs(
    dtype: torch.dtype, size: tuple[int, ...], how: tuple[Norm | None, Form, bool], device: str
) -> tuple[Tensor, functional.Connection]:
    b, s, n, d = size
    norm, form, affine = how
    wide = torch.promote_types(dtype, torch.float32)

    def parameter(*shape: int, scale: float = 1.0) -> Tensor:
        return draw(*shape, dtype=wide, device=device, scale=scale).requires_grad_()

    streams = draw(b, s, n, d, dtype=dtype, device=device).requires_grad_()
    base = parameter(n, n + 2)
    if norm is None:
        return streams, functional.Connection(base)
    rows, columns = (n * (n + 2), n * d) if norm == "rms_all" else (n + 2, d)
    weight, scale = parameter(rows, columns, scale=columns**-0.5), parameter(n + 2)
    bias = parameter(n + 2) if affine else None
    return streams, functional.Connection(base, weight, bias, scale, norm, form)


def hyper(part: str) -> Callable[[torch.dtype, bool, str], Iterator[str]]:
    """Returns the cases of hyper_pre, hyper_post or hyper_post_pre; "masked" is whether all tokens share post's
    coefficients."""

    def cases(dtype: torch.dtype, masked: bool, device: str) -> Iterator[str]:
        wide = torch.promote_types(dtype, torch.float32)
        for size, how in zip(HYPER_SIZES, HYPER_CONNECTIONS, strict=True):
            b, s, n, d = size
            streams, connection = hyper_inputs(dtype, size, how, device)
            branch = draw(b, s, d, dtype=dtype, device=device).requires_grad_()
            shape = (n, n + 2) if masked else (b, s, n, n + 2)
            coefficients = draw(*shape, dtype=wide, device=device).requires_grad_()
            tensors, parameters = [streams], [t for t in connection[:4] if t is not None]
            if part == "hyper_pre":
                out = functional.hyper_pre(streams, connection)[0]
                tensors += parameters
            elif part == "hyper_post":
                out = functional.hyper_post(streams, branch, coefficients)
                tensors += [branch, coefficients]
            else:
                mixed, x, _ = functional.hyper_post_pre(streams, branch, coefficients, connection)
                out = mixed + x.unsqueeze(-2)
                tensors += [branch, coefficients, *parameters]
            name = f"{part} B={b} S={s} n={n} d={d} {how[0]} {how[1]}"
            finish(name, out, tensors)
            yield name

    return cases


def check_finite(name: str, *results: Tensor) -> None:
    """Checks that all results are finite, of operators without a gradient."""
    if not all(result.cpu().isfinite().all() for result in results):
        raise AssertionError(f"{name}: a result is not finite")


def vq_nearest(dtype: torch.dtype, masked: bool, device: str) -> Iterator[str]:
    """Runs the nearest-code search; "masked" selects the cosine metric."""
    for books, n, k, d in VQ_SIZES:
        name = f"vq_nearest h={books} N={n} K={k} D={d}"
        x, codebook = (draw(books, rows, d, dtype=dtype, device=device) for rows in (n, k))
        metric: Metric = "cosine" if masked else "euclidean"
        check_finite(name, *functional.vq_nearest(x, codebook, metric=metric))
        yield name


def vq_statistics(dtype: torch.dtype, masked: bool, device: str) -> Iterator[str]:
    """Runs the codebook statistics; "masked" excludes some rows from them."""
    for books, n, k, d in VQ_SIZES:
        name = f"vq_statistics h={books} N={n} K={k} D={d}"
        x = draw(books, n, d, dtype=dtype, device=device)
        indices = torch.randint(-1 if masked else 0, k + (1 if masked else 0), (books, n)).to(device)
        check_finite(name, *functional.vq_statistics(x, indices, k))
        yield name


def fsq(dtype: torch.dtype, masked: bool, device: str) -> Iterator[str]:
    """Runs finite scalar quantization; "masked" selects the offset bound."""
    for levels in FSQ_LEVELS:
        name = f"fsq {len(levels)} dimensions"
        z = draw(517, len(levels), dtype=dtype, device=device).requires_grad_()
        finish(name, functional.fsq(z, levels, bound="offset" if masked else "tanh")[0], [z])
        yield name


def ema_scan(dtype: torch.dtype, masked: bool, device: str) -> Iterator[str]:
    """Runs the EMA over depth; "masked" normalizes the taps."""
    for last_only, (layers, n, d) in itertools.product((False, True), EMA_SIZES):
        name = f"ema_scan L={layers} N={n} d={d}{' last' * last_only}"
        shapes = [(layers, n, d), (layers,), (n, d), *([(d,), (d,)] if masked else [])]
        given = [draw(*shape, dtype=dtype, device=device).requires_grad_() for shape in shapes]
        weight, bias = given[3:] or (None, None)
        out = functional.ema_scan(*given[:3], norm_weight=weight, norm_bias=bias, last_only=last_only)
        finish(name, out, given)
        yield name


def depth_gru(dtype: torch.dtype, masked: bool, device: str) -> Iterator[str]:
    """Runs the recurrent unit over depth; "masked" passes an initial state."""
    for layers, n, i, d in GRU_SIZES:
        name = f"depth_gru L={layers} N={n} i={i} d={d}"
        shapes = [(layers, n, i), (3 * d, i), (3 * d, d), (3 * d,), (3 * d,), *([(n, d)] if masked else [])]
        given = [draw(*shape, dtype=dtype, device=device, scale=0.5).requires_grad_() for shape in shapes]
        finish(name, functional.depth_gru(*given), given)
        yield name


def depth_attention(dtype: torch.dtype, masked: bool, device: str) -> Iterator[str]:
    """Runs attention over depth; "masked" passes an initial state."""
    for layers, n, d, heads, width in ATTENTION_SIZES:
        name = f"depth_attention L={layers} N={n} d={d} heads={heads} of {width}"
        e = heads * width
        shapes = [(layers, n, 8), (e, d), (e, 8), (e, 8), (d, e), *([(n, d)] if masked else [])]
        given = [draw(*shape, dtype=dtype, device=device, scale=0.3).requires_grad_() for shape in shapes]
        finish(name, functional.depth_attention(*given, num_heads=heads), given)
        yield name


CASES: dict[str, Callable[[torch.dtype, bool, str], Iterator[str]]] = {
    "depth_attention": depth_attention,
    "depth_gru": depth_gru,
    "ema_scan": ema_scan,
    "fsq": fsq,
    "hdim_attention": hdim_attention,
    "hyper_pre": hyper("hyper_pre"),
    "hyper_post": hyper("hyper_post"),
    "hyper_post_pre": hyper("hyper_post_pre"),
    "masked_mean": masked_mean,
    "vq_nearest": vq_nearest,
    "vq_statistics": vq_statistics,
}


def operators() -> set[str]:
    """Returns the operators of the native library; a backward is run by its forward's case."""
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("xlayer::"))
    return {name.removeprefix("xlayer::").removesuffix("_backward") for name in names}


def run_small(device: str) -> None:
    if missing := operators() - CASES.keys():
        raise AssertionError(f"no case for {', '.join(sorted(missing))}")
    count = 0
    for operator, dtype, masked in itertools.product(CASES, DTYPES, (False, True)):
        for name in CASES[operator](dtype, masked, device):
            count += 1
            print(f"{name} {dtype} {'masked' if masked else 'no mask'}", flush=True)
    print(f"{count} cases ran, every result is finite")


def run_large(device: str) -> None:
    _, b, s, d, m, h, options = hdim_cases.CUDA_SIZES["B32-S512"]
    hdim_cases.build("native", "fwd+bwd", [b, s, d, m, h], "bfloat16", device, **options)()
    size = hyper_cases.settings(cuda=True)["dhc"].size
    hyper_cases.build("native", "boundary", "fwd+bwd", "dhc", list(size), False, "bfloat16", device)()
    torch.cuda.synchronize()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "emulated"), default="cuda")
    parser.add_argument("--large", action="store_true", help="only for cuda")
    options = parser.parse_args(argv)
    device = "cuda"
    if options.device == "emulated":
        emulator.emulation().take_over()
        device = "cpu"
    torch.manual_seed(0)
    with backend("native"):  # an error instead of a silent fallback to plain PyTorch
        (run_large if options.large else run_small)(device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
