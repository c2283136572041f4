"""The operators as functions: documented, checked, differentiable, and the same under compile, export and autocast."""

from xlayer_ext.functional.hdim import bilinear_attention, cosine_attention, hdim_attention, value_fusion
from xlayer_ext.functional.hyper import Connection, hyper_post, hyper_post_pre, hyper_pre
from xlayer_ext.functional.quantize import (
    fsq,
    fsq_codes_to_indices,
    fsq_indices_to_codes,
    vq_nearest,
    vq_statistics,
)
from xlayer_ext.functional.routing import masked_mean

__all__ = [
    "Connection",
    "bilinear_attention",
    "cosine_attention",
    "fsq",
    "fsq_codes_to_indices",
    "fsq_indices_to_codes",
    "hdim_attention",
    "hyper_post",
    "hyper_post_pre",
    "hyper_pre",
    "masked_mean",
    "value_fusion",
    "vq_nearest",
    "vq_statistics",
]
