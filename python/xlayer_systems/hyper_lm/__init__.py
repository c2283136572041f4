"""Hyper-connections (Zhu et al., ICLR 2025, arXiv 2409.19606) in language models.

``HyperTransformer`` is a decoder-only transformer with plain, static, dynamic or manifold-constrained connections;
``LanguageModel`` is what the training loop trains of it.
"""

from .attach import AttachConfig, HyperAttachment, attach, load
from .config import RESIDUALS, SIZES, HyperLMConfig, sized
from .generation import generate
from .model import HyperTransformer
from .plots import plot_layers
from .training_model import LanguageModel, LanguageModelOutput

__all__ = [
    "RESIDUALS",
    "SIZES",
    "AttachConfig",
    "HyperAttachment",
    "HyperLMConfig",
    "HyperTransformer",
    "LanguageModel",
    "LanguageModelOutput",
    "attach",
    "generate",
    "load",
    "plot_layers",
    "sized",
]
