"""Latent telepathy: a frozen language model sends soft tokens to another frozen one through a trained bridge."""

from __future__ import annotations

from xlayer_systems.telepathy.bridge import TelepathyBridge
from xlayer_systems.telepathy.config import TelepathyConfig
from xlayer_systems.telepathy.model import Pair, TelepathyModel
from xlayer_systems.telepathy.presets import PRESETS, preset
from xlayer_systems.telepathy.receiver import ReceiverInput, generate_answers, receiver_input, receiver_logits

__all__ = [
    "PRESETS",
    "Pair",
    "ReceiverInput",
    "TelepathyBridge",
    "TelepathyConfig",
    "TelepathyModel",
    "generate_answers",
    "preset",
    "receiver_input",
    "receiver_logits",
]
