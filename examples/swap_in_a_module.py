"""Adds a bridge between two layers of a small encoder, and trains it on a toy task that cannot be solved without.

The first token must name the class of the last one. A token of the late layer sees nothing but itself; the bridge lets
it read every token of the early layer.

    python examples/swap_in_a_module.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xlayer_ext.nn import HDIMMessage

WIDTH, TOKENS, CLASSES = 32, 8, 4


class Encoder(nn.Module):
    """Embeds tokens, squeezes each through a narrow layer of its own, and classifies the first one."""

    def __init__(self, bridged: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, WIDTH)
        self.position = nn.Parameter(0.5 * torch.randn(TOKENS, WIDTH))
        self.narrow = nn.Sequential(nn.Linear(WIDTH, 1), nn.Tanh(), nn.Linear(1, WIDTH))
        self.bridge = HDIMMessage(hidden_size=WIDTH, proj_dim=8, mlp_dim=32, fusion="concat_only") if bridged else None
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        early = self.embed(tokens) + self.position
        late = self.narrow(early)
        if self.bridge is not None:
            late = late + self.bridge(late, early)  # every token of `late` reads every token of `early`
        return self.head(late[:, 0])


def accuracy(bridged: bool, steps: int = 300) -> float:
    """Trains to name the class of the last token at the first one; returns the accuracy on new sequences."""
    torch.manual_seed(0)
    model = Encoder(bridged)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        tokens = torch.randint(CLASSES, (64, TOKENS))
        loss = nn.functional.cross_entropy(model(tokens), tokens[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    tokens = torch.randint(CLASSES, (1000, TOKENS))
    with torch.no_grad():
        return (model(tokens).argmax(-1) == tokens[:, -1]).float().mean().item()


def main() -> None:
    """Compares the encoder with and without the bridge."""
    without, bridged = accuracy(bridged=False), accuracy(bridged=True)
    print(f"accuracy without a bridge {without:.2f}, with one {bridged:.2f}, by chance {1 / CLASSES:.2f}")
    assert bridged > 0.9 > 0.5 > without


if __name__ == "__main__":
    main()
