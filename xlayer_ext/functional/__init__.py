"""The operators as functions: documented, checked, differentiable, and the same under compile, export and autocast."""

from xlayer_ext.functional.hdim import bilinear_attention, cosine_attention, hdim_attention, value_fusion
from xlayer_ext.functional.hyper import Connection, hyper_post, hyper_post_pre, hyper_pre
from xlayer_ext.functional.routing import masked_mean

__all__ = [
    "Connection",
    "bilinear_attention",
    "cosine_attention",
    "hdim_attention",
    "hyper_post",
    "hyper_post_pre",
    "hyper_pre",
    "masked_mean",
    "value_fusion",
]
