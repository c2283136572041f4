"""Other packages that do a part of the same work: which of them this machine has, and why not the others.

The cases of a script name the peers that they are timed against (`Case.peers`); the packages below without such a case
run on GPUs alone, and a report lists them so that nobody takes an absent bar for a comparison that was won.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Peer:
    """A package, as PyPI and as Python name it, and what it computes; `gpu`: its kernels exist for GPUs alone."""

    package: str
    module: str
    what: str
    gpu: bool = False
    timed: bool = True  # by the cases of a script


PEERS = (
    Peer("hyper-connections", "hyper_connections", "hyper: pre+post (dhc-rms, mhc-stream)"),
    Peer("vector-quantize-pytorch", "vector_quantize_pytorch", "quantize: nearest, train, fsq"),
    Peer("liger-kernel", "liger_kernel.transformers.mhc", "hyper: mHC in Triton", gpu=True, timed=False),
    Peer("tile-kernels", "tile_kernels", "hyper: mHC in TileLang", gpu=True, timed=False),
    Peer("cuvs-cu13", "cuvs", "quantize: exact nearest neighbours", gpu=True, timed=False),
)


def state(peer: Peer, device: str) -> str:
    """`timed VERSION`, or why it is missing."""
    if peer.gpu and torch.device(device).type != "cuda":
        return "missing: its kernels run on GPUs alone"
    try:
        importlib.import_module(peer.module)
        version = importlib.metadata.version(peer.package)
    except Exception as error:  # a package may fail in any way where its compiler or its driver is missing
        return f"missing: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return f"timed, {version}" if peer.timed else f"installed, {version}, but no case is timed against it"


def states(device: str) -> list[dict[str, str]]:
    return [{"package": peer.package, "what": peer.what, "state": state(peer, device)} for peer in PEERS]
