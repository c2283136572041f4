"""Named regions of a run, for profilers. Outside of `xlayer profile` none is recorded, and a region costs one `if`.

The shared loop names its phases (``PHASES``); the modules of a model are named by hooks that exist only for the length
of `module_regions`, so a model carries nothing for profilers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

DOMAIN = "xlayer"
PHASES = ("step", "data", "forward", "backward", "optimizer", "eval")
WINDOW = "profiled"  # around everything that a profile counts
MODULE = "module/"  # before the names of modules

Opener = Callable[[str], AbstractContextManager[Any]]

_NOTHING = nullcontext()
_opener: Opener | None = None


def region(name: str) -> AbstractContextManager[Any]:
    """Opens a region ``name`` for ``with``, which a profiler records if one is attached."""
    return _NOTHING if _opener is None else _opener(name)


@contextmanager
def listening(opener: Opener) -> Iterator[None]:
    """Opens regions by ``opener`` until the end of a ``with`` block."""
    global _opener
    before, _opener = _opener, opener
    try:
        yield
    finally:
        _opener = before


def torch_region(name: str) -> AbstractContextManager[Any]:
    """Returns a region in the traces of `torch.profiler`: ``xlayer/<name>``."""
    from torch.profiler import record_function

    return record_function(f"{DOMAIN}/{name}")


def nvtx_region(name: str) -> AbstractContextManager[Any]:
    """Returns a region in the reports of Nsight Systems and Nsight Compute: ``name`` in the NVTX domain ``xlayer``."""
    import nvtx

    made: AbstractContextManager[Any] = nvtx.annotate(name, domain=DOMAIN)
    return made


@contextmanager
def module_regions(model: nn.Module, prefix: str = "") -> Iterator[None]:
    """Makes every call of a named module of ``model`` a region ``module/<prefix><name>`` until its end."""
    opened: list[AbstractContextManager[Any]] = []  # calls nest, so the one that ends is the last one opened

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            opened.append(region(MODULE + name))
            opened[-1].__enter__()

        return hook

    def leave(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(enter(prefix + name), prepend=True))
            # Also after an exception: recomputation for activation checkpoints ends a forward pass with one.
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
