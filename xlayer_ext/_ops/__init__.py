"""Registers the native operators with torch, a module per family: fake tensors, autograd, transforms of torch.func."""

from xlayer_ext._ops import aggregate, hdim, hyper, quantize, routing

__all__ = ["aggregate", "hdim", "hyper", "quantize", "routing"]
