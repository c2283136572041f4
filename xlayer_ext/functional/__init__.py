"""Functional API: the operators with checks, gradients, autocast and a choice of backend."""

from xlayer_ext.functional.aggregate import depth_attention, depth_gru, ema_scan
from xlayer_ext.functional.hdim import bilinear_attention, cosine_attention, hdim_attention, value_fusion
from xlayer_ext.functional.hyper import Connection, hyper_post, hyper_post_pre, hyper_pre
from xlayer_ext.functional.losses import (
    bag_of_words_loss,
    batch_diversity_loss,
    cosine_anchor_loss,
    first_k_weights,
    info_nce_loss,
    language_modeling_loss,
    reconstruction_loss,
    variance_diversity_loss,
)
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
    "bag_of_words_loss",
    "batch_diversity_loss",
    "bilinear_attention",
    "cosine_anchor_loss",
    "cosine_attention",
    "depth_attention",
    "depth_gru",
    "ema_scan",
    "first_k_weights",
    "fsq",
    "fsq_codes_to_indices",
    "fsq_indices_to_codes",
    "hdim_attention",
    "hyper_post",
    "hyper_post_pre",
    "hyper_pre",
    "info_nce_loss",
    "language_modeling_loss",
    "masked_mean",
    "reconstruction_loss",
    "value_fusion",
    "variance_diversity_loss",
    "vq_nearest",
    "vq_statistics",
]
