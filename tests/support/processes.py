"""Processes that train together."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

PATIENCE = timedelta(minutes=3)  # a process that fails alone would keep the other, and the suite, for half an hour


def join_processes(rank: int, folder: str, count: int = 2) -> None:
    """Makes this one of ``count`` processes that meet in ``folder``."""
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=count, timeout=PATIENCE)
