"""Reference of every operator in plain PyTorch: slow and memory-hungry, the oracle of the kernels' tests."""

from xlayer_ext.reference.aggregate import depth_attention, depth_gru, ema_scan
from xlayer_ext.reference.hdim import bilinear_attention, cosine_attention, hdim_attention, value_fusion
from xlayer_ext.reference.hyper import hyper_coefficients, hyper_post, hyper_post_pre, hyper_pre, manifold
from xlayer_ext.reference.quantize import (
    fsq,
    fsq_codes_to_indices,
    fsq_indices_to_codes,
    vq_nearest,
    vq_statistics,
)
from xlayer_ext.reference.routing import masked_mean

__all__ = [
    "bilinear_attention",
    "cosine_attention",
    "depth_attention",
    "depth_gru",
    "ema_scan",
    "fsq",
    "fsq_codes_to_indices",
    "fsq_indices_to_codes",
    "hdim_attention",
    "hyper_coefficients",
    "hyper_post",
    "hyper_post_pre",
    "hyper_pre",
    "manifold",
    "masked_mean",
    "value_fusion",
    "vq_nearest",
    "vq_statistics",
]
