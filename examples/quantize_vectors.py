"""Learns a codebook for clustered vectors, and compares it with a fixed grid of codes.

python examples/quantize_vectors.py
"""

from __future__ import annotations

import torch

from xlayer_ext.nn import FSQ, VectorQuantizer

CLUSTERS, WIDTH = 16, 8


def main() -> None:
    """Trains the codebook by moving averages: no optimizer is needed for it."""
    torch.manual_seed(0)
    centres = 3 * torch.randn(CLUSTERS, WIDTH)

    def batch(size: int) -> torch.Tensor:
        return centres[torch.randint(CLUSTERS, (size,))] + 0.1 * torch.randn(size, WIDTH)

    quantizer = VectorQuantizer(WIDTH, codebook_size=32, decay=0.8, threshold_ema_dead_code=0.5, kmeans_init=True)
    for _ in range(50):
        out = quantizer(batch(512))
    quantizer.eval()
    x = batch(1000)
    out = quantizer(x)
    error = ((x - out.quantized).square().mean() / x.square().mean()).sqrt().item()
    print(f"codebook: relative error {error:.3f}, codes in use {out.indices.unique().numel()}")
    assert error < 0.2

    grid = FSQ([8, 5, 5, 5], hidden_size=WIDTH)  # nothing to learn but the linear maps in and out
    z = x.requires_grad_()
    found = grid(z)
    found.quantized.square().mean().backward()  # the gradient goes straight through the rounding
    print(f"grid: {found.indices.unique().numel()} of {8 * 5 * 5 * 5} codes in use, gradient of the input arrives: "
          f"{bool(z.grad.abs().sum() > 0)}")  # fmt: skip


if __name__ == "__main__":
    main()
