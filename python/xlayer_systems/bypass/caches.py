"""The key-value cache of a model with a bypass: it holds the second pass and the latents as well.

A model with a bypass runs every token twice, once unmodified and once with biases, so it needs two caches, and the
latents of the tokens before. Callers hand around one (``generate``, beam search, prefix sharing). The unmodified pass
and the latents therefore live in further layers of that one, behind the model's own: what reorders, crops, repeats or
copies it then does the same to all of it.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

_NAME = "_bypass_companion"


class Companion:
    """Holds what belongs to one cache: ``unmodified``, the cache of the other pass, and the latents so far."""

    def __init__(self, cache: Cache) -> None:
        if cache.get_seq_length():
            raise ValueError("this cache was filled without the bypass; begin with an empty one")
        self.unmodified = copy.deepcopy(cache)
        self.latents: Any = DynamicLayer()
        self._is_joined = False

    @classmethod
    def of(cls, cache: Cache) -> Companion:
        """Returns the companion of ``cache``, a new one where it has none."""
        found = getattr(cache, _NAME, None)
        if found is None:
            found = cls(cache)
            setattr(cache, _NAME, found)
        return found

    @property
    def last(self) -> Tensor | None:
        """Returns the latent ``[B, ..., latent]`` of the token before, None at the beginning."""
        return self.latents.keys[:, 0, -1] if self.latents.get_seq_length() else None

    def add(self, latents: Tensor) -> None:
        """Appends the latents ``[B, T, latent]`` of new tokens."""
        self.latents.update(latents[:, None], latents[:, None, :, :0])

    def join(self, cache: Cache) -> None:
        """Makes it part of ``cache``, once that has its own layers."""
        if not self._is_joined:
            cache.layers.extend([*self.unmodified.layers, self.latents])
            self._is_joined = True
