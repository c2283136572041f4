"""The operators as functions: documented, checked, differentiable, and the same under compile, export and autocast."""

from xlayer_ext.functional.hdim import bilinear_attention, cosine_attention, hdim_attention, value_fusion
from xlayer_ext.functional.routing import masked_mean

__all__ = ["bilinear_attention", "cosine_attention", "hdim_attention", "masked_mean", "value_fusion"]
