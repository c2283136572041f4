"""Other packages that do a part of the same work: which of them this machine has, and why not the others.

The cases of a script name the peers that they are timed against (`Case.peers`); a report lists them all, so that nobody
takes an absent bar for a comparison that was won. Those that run on GPUs alone are called by `peers_cuda.py`.

What is not compared, as it would not be fair: the boundary of two sublayers, which neither Liger-Kernel nor TileKernels
fuses; the backward of TileKernels' pre alone, which adds to what the backward of a post on the same streams has left;
static and dynamic hyper-connections, and mHC with a norm of each stream, which neither has.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Peer:
    """A package by its names on PyPI and in Python, and the operator that it computes; `gpu`: its kernels need a
    GPU."""

    package: str
    module: str
    what: str
    gpu: bool = False


PEERS = (
    Peer("hyper-connections", "hyper_connections", "hyper: pre+post (dhc-rms, mhc-stream)"),
    Peer("vector-quantize-pytorch", "vector_quantize_pytorch", "quantize: nearest, train, fsq"),
    Peer("liger-kernel", "liger_kernel.transformers.functional", "hyper: pre, post, pre+post (mhc)", gpu=True),
    Peer("tile-kernels", "tile_kernels.modeling.mhc", "hyper: pre, post, pre+post (mhc; bfloat16)", gpu=True),
    Peer("cuvs-cu13", "cuvs.neighbors.brute_force", "quantize: nearest (float32, float16)", gpu=True),
)


def state(peer: Peer, device: str) -> str:
    """Returns `timed, VERSION`, or the reason why the package is missing."""
    if peer.gpu and torch.device(device).type != "cuda":
        return "missing: its kernels run on GPUs alone"
    try:
        importlib.import_module(peer.module)
        version = importlib.metadata.version(peer.package)
    except Exception as error:  # a package may fail in any way where its compiler or its driver is missing
        return f"missing: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return f"timed, {version}"


def states(device: str) -> list[dict[str, str]]:
    return [{"package": peer.package, "what": peer.what, "state": state(peer, device)} for peer in PEERS]
