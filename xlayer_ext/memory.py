"""Keeps freed memory in this process, instead of returning it to the system."""

from __future__ import annotations

import ctypes
import platform
import sys

__all__ = ["keep_freed_memory"]

# glibc's numbers of its options, and their values here: no block is a mapping of its own, which would end when it is
# freed; the heap is never cut at its end (-1), and grows by 64 MiB more than is needed; threads share the main heap, as
# the heaps of their own hold 64 MiB at most.
_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD, _ARENA_MAX = -4, -1, -2, -8
_KEPT = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20), (_ARENA_MAX, 1))


def keep_freed_memory() -> bool:
    """Makes this process keep the memory that it frees, and use it again; returns whether that is possible.

    Otherwise glibc gives large blocks back, and the system hands them out anew as pages of zeros, one page fault after
    the other, which can take longer than the kernel that fills the block. The price is memory: the process never
    shrinks, and free blocks of the wrong size make it a few times larger than what is in use. Where the C library is
    not glibc, nothing happens. Allocators of GPUs keep memory anyway.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    taken = [mallopt(option, value) for option, value in _KEPT]
    return all(taken)
