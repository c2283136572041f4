"""Cross-layer routing bridges (XLRB): routed QKV and HDIM messages between the layers of an encoder.

``attach(encoder, config)`` adds them to a RoBERTa/BERT-like Hugging Face encoder, ``XLRBClassifier`` trains the result,
``PRESETS`` holds the 50 published ablations by id.
"""

from .bridge import XLRBBridge, attach, load
from .classifier import XLRBClassifier, XLRBOutput
from .config import XLRBConfig
from .presets import ABLATIONS, PRESETS, PUBLISHED_ACCURACY, preset
from .usage import plot_usage

__all__ = [
    "ABLATIONS",
    "PRESETS",
    "PUBLISHED_ACCURACY",
    "XLRBBridge",
    "XLRBClassifier",
    "XLRBConfig",
    "XLRBOutput",
    "attach",
    "load",
    "plot_usage",
    "preset",
]
