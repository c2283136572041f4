"""Registers the native operators with torch, a module per family: fake tensors, autograd, transforms of torch.func."""
