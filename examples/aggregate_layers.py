"""Reads every layer of a frozen Hugging Face encoder through an EMA over depth, and trains a small head on its state.

python examples/aggregate_layers.py
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import BertConfig, BertModel

from xlayer_ext.nn import EMAAggregator, TapProjector

LAYERS, WIDTH, SIDE, CLASSES = 4, 64, 32, 3


def main() -> None:
    """Trains taps, gates and head; the encoder stays as it is."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=128
    )
    encoder = BertModel(config).eval().requires_grad_(False)
    taps = TapProjector(num_layers=LAYERS, hidden_size=WIDTH, side_size=SIDE, pooling="mean")
    aggregate = EMAAggregator(num_layers=LAYERS, hidden_size=SIDE)
    head = nn.Linear(SIDE, CLASSES)
    side_path = nn.ModuleList([taps, aggregate, head])
    optimizer = torch.optim.AdamW(side_path.parameters(), lr=1e-2)

    labels = torch.randint(CLASSES, (64,))
    tokens = torch.randint(10, (64, 12)) + 10 * labels.unsqueeze(1)  # each class has tokens of its own
    with torch.no_grad():
        layers = encoder(tokens, output_hidden_states=True).hidden_states[1:]
    losses = []
    for _ in range(60):
        states = aggregate(taps(layers))  # [layers, batch, side]: the state after each layer
        loss = nn.functional.cross_entropy(head(states[-1]), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.2f} → {losses[-1]:.2f}, parameters of the side path "
          f"{sum(parameter.numel() for parameter in side_path.parameters()):,}")  # fmt: skip
    assert losses[-1] < 0.2 < losses[0]


if __name__ == "__main__":
    main()
