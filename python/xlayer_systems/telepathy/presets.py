"""The report's phases by name, each as its difference from one of a few bases.

They share every part; what a phase tried is in its line. Depths are shares of the sender's layers (the report's sender
had 32). Where the report changed a phase in the middle, the preset is the state that it ended in, and the states before
have a letter or a word behind the name.
"""

from __future__ import annotations

from dataclasses import replace

from xlayer_systems.telepathy.config import TelepathyConfig

CLASSIFICATION = TelepathyConfig()
# The first bridges: no output scale, and no diversity loss yet.
PLAIN = replace(CLASSIFICATION, source_depth=20 / 32, soft_tokens=64, num_layers=4, scaling="none", batch_diversity=0.0)
ANCHORED = replace(PLAIN, soft_tokens=128, normalizer="learnable", scaling="tanh", info_nce=0.1, anchor=1.0)
SHARP = replace(ANCHORED, source_depth=16 / 32, soft_tokens=256, anchor=2.0)
READ_BACK = replace(PLAIN, source_depth=16 / 32, soft_tokens=128, scaling="tanh", target="question_answer")
DIFFUSION = replace(PLAIN, source_depth=16 / 32, soft_tokens=128, bridge="dit", num_layers=6, lm=0.0)
DISCRETE = replace(PLAIN, source_depth=16 / 32, soft_tokens=128, scaling="rms", first_k=None)

PRESETS: dict[str, TelepathyConfig] = {
    "classification": CLASSIFICATION,
    "v1": replace(PLAIN, reconstruction=1.0),
    "v2": replace(PLAIN, soft_tokens=128, reconstruction=1.0, info_nce=0.5),
    "v3": ANCHORED,
    "v4": ANCHORED,  # the same bridge; the phase only made the receiver's inputs of training and evaluation agree
    "v5": SHARP,
    "v6": replace(SHARP, anchor_target="question"),
    "v7": replace(SHARP, normalizer="calibrated"),
    "v8": replace(SHARP, normalizer="calibrated", reconstruction=1.0),
    "v9": replace(SHARP, normalizer="calibrated", bag_of_words=5.0),
    "v10": READ_BACK,
    "v11": replace(READ_BACK, first_k=10, first_weight=100.0),
    "v12": replace(DIFFUSION, conditioning="pooled"),
    "v13": replace(DIFFUSION, conditioning="cross", anchor_target="question"),
    "v14": replace(DIFFUSION, conditioning="hybrid", anchor_target="question", hidden_size=1024, num_heads=16),
    "v15": replace(DISCRETE, batch_diversity=0.1),
    "v15-vq": replace(DISCRETE, bridge="vq", codebook_size=4096, ema=False, entropy=0.1),
    "v15-fsq": replace(DISCRETE, bridge="fsq", levels=(8,) * 8),
    "v15-fsq-variance": replace(DISCRETE, bridge="fsq", levels=(5,) * 32, variance_diversity=0.1),
}


def preset(name: str) -> TelepathyConfig:
    """Returns the config of a preset; an unknown name raises `ValueError` with the known ones."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
