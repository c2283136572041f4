"""Fused kernels and drop-in modules for cross-layer communication in transformers.

`xlayer_ext.nn` holds the modules, `xlayer_ext.functional` what they compute, `xlayer_ext.backend` the choice between
the native kernels and the plain PyTorch reference. `python -m xlayer_ext.info` says what is in use here and why.
"""

from xlayer_ext import functional, nn
from xlayer_ext._backend import backend

__version__ = "0.1.0"

__all__ = ["__version__", "backend", "functional", "nn"]
