"""L-Former: a side path taps the layers of a causal language model and carries a reasoning state across them.

``LFormer`` makes a model or wraps one; ``attach`` gives any Hugging Face causal language model a side path.
"""

from .config import AGGREGATORS, PRESETS, ModelConfig
from .model import LFormer, LFormerOutput, attach, load

__all__ = ["AGGREGATORS", "PRESETS", "LFormer", "LFormerOutput", "ModelConfig", "attach", "load"]
