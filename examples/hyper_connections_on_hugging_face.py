"""Attaches dynamic hyper-connections to a Hugging Face decoder, trains them for a few steps, saves and loads them.

The model is made from a configuration, so nothing is downloaded; `from_pretrained` works the same way.

    python examples/hyper_connections_on_hugging_face.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from xlayer_systems.hyper_lm import attach, load

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, pad_token_id=0
)


def main() -> None:
    """Shows that logits stay the same at first, that the connections learn, and that both are saved and loaded."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    tokens = (torch.arange(32).repeat(4, 1) * torch.tensor([[1], [3], [5], [7]])) % 64
    before = model(tokens).logits
    connections = attach(model, "dhc", expansion_rate=4)
    difference = (model(tokens).logits - before).abs().max().item()
    print(f"largest change of a logit by attaching: {difference:.1e}")
    assert difference < 1e-4

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.2f} → {losses[-1]:.2f}")
    assert losses[-1] < 0.5 * losses[0]

    with tempfile.TemporaryDirectory() as folder:
        connections.save(folder, include_model=True)  # the model has learned too
        print("saved:", ", ".join(sorted(path.name for path in Path(folder).iterdir())))
        again = LlamaForCausalLM.from_pretrained(folder)
        load(again, folder)
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    text = model.generate(tokens[:1, :8], max_new_tokens=8, do_sample=False)
    print("generated:", text[0, 8:].tolist())


if __name__ == "__main__":
    main()
