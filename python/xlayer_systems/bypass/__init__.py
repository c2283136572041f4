"""Full-stack bypass: hidden states of all layers, compressed to one latent per token, come back as a bias per layer."""

from __future__ import annotations

from xlayer_systems.bypass.config import AdapterConfig, BypassConfig
from xlayer_systems.bypass.model import Bypass, attach, load

__all__ = ["AdapterConfig", "Bypass", "BypassConfig", "attach", "load"]
