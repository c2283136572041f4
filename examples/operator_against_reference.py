"""Holds a native operator to the plain PyTorch formula by the oracle rule, as the project's own tests do.

python examples/operator_against_reference.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from xlayer_ext import functional, reference


def relative_error(x: Tensor, exact: Tensor) -> float:
    """Computes rms(x − exact) / rms(exact)."""
    return ((x.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


def main() -> None:
    """Compares the errors of both implementations against float64, at every dtype, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    taps = torch.randn(12, 256, 64, generator=generator, dtype=torch.float64)  # layers, tokens, width
    gates = torch.randn(12, generator=generator, dtype=torch.float64)
    grad = torch.randn(12, 256, 64, generator=generator, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        results = []
        rounded = taps.to(dtype)
        for scan, x in (
            (reference.ema_scan, rounded.double()),
            (reference.ema_scan, rounded),
            (functional.ema_scan, rounded),
        ):
            x = x.detach().requires_grad_()
            states = scan(x, gates.to(x.dtype))
            states.backward(grad.to(dtype).to(x.dtype))
            results.append((states.detach(), x.grad))
        exact, plain, native = results
        for name, e, p, n in zip(("states", "gradient"), exact, plain, native, strict=True):
            error, allowed = relative_error(n, e.double()), relative_error(p, e.double())
            bound = 1e-12 if dtype == torch.float64 else 1.1 * allowed + 2 * torch.finfo(dtype).eps
            print(f"{str(dtype).removeprefix('torch.'):9} {name:9} error {error:.1e}, plain PyTorch {allowed:.1e}")
            assert error <= bound


if __name__ == "__main__":
    main()
