"""A bypass: the hidden states of all layers, compressed to one latent per token, come back as a bias for every layer.

With the hidden states ``h_l`` (outputs of the L layers, standardized by statistics of the layer), encoder ``W_l``
``[d, r]`` and projectors ``P_l`` ``[r, d]``::

    z_t = Σ_l h_{l,t} W_l                          latent of token t, [r]
    h_{l-1,t} ← h_{l-1,t} + s_l · z_{t-1} P_l      before layer l; nothing at the first token

so encoder and projectors have L·d·r parameters each. Both are one GEMM over all layers. ``s_l`` is the measured scale
of what layer l reads: embeddings can be thirty times as small as what the next layer reads, and one rate must fit all.

**Which hidden states.** Biases change hidden states. Were the latent of token t−1 taken from those that biases had
changed, it would depend on the latent of t−2 and so on: an exact recurrence over tokens, which training could only run
token by token. Here latents are taken from the *unmodified* model, which knows no biases: it runs first, all tokens at
once and without gradients (it is frozen), and the modified model runs second. Step by step both run on the new token,
each with its own keys and values (`xlayer_systems.bypass.caches`). Training and generation thus compute the same
function, and token t sees latents of tokens before t only. The price is a second forward pass: twice the work of
inference, about a third more in training, where backward passes go through the modified model alone.

**Encoders** (BERT and its kind) see all tokens anyway; there token t gets the bias of its own latent.

The variant ``offset`` has a latent per layer, and the bias of layer l comes from that of layer l + k alone.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from xlayer_systems.bypass.caches import Companion
from xlayer_systems.bypass.config import BypassConfig
from xlayer_systems.hf.layers import is_causal, layers_of, stack_of
from xlayer_systems.hf.pretrained import (
    Attachment,
    check_model,
    describe_model,
    load_attached,
    read_config,
    read_own,
    resolve_config,
    save_own,
    weights_fingerprint,
)

CONFIG_FILE = "bypass.json"
WEIGHTS_FILE = "bypass.safetensors"
SAMPLE = 64  # elements of every parameter that identify a model
_ENCODER = ("encoder", "mean", "scale", "input_scale")


class Bypass(Attachment):
    """Holds encoder and projectors on a frozen model (made by `attach`): its parameters are the new ones alone.

    Attributes:
        config: what was asked for.
        encoder: ``[L, d, r]``, frozen in the stage ``task``.
        projectors: ``[L, r, d]`` in the stage ``reconstruct``; in the stage ``task`` one per layer with a bias, and 0
            at the start, so that the model begins with the logits that it had.
        mean, scale: ``[L, d]`` and ``[L]``, the statistics of the hidden states, of `calibrate`.
        input_scale: ``[L]``, s, of what the layers read.
        is_causal: whether a token gets the latent of the token before, not its own.
    """

    part = "bypass"
    mean: Tensor
    scale: Tensor
    input_scale: Tensor

    def __init__(self, model: Any, config: BypassConfig) -> None:
        super().__init__()
        stack = stack_of(model)
        layers = layers_of(stack)
        if any(isinstance(getattr(h, "__self__", None), Bypass) for h in stack._forward_pre_hooks.values()):
            raise ValueError("this model has a bypass already; call its remove() first")
        depth, width, rank = len(layers), int(stack.config.hidden_size), config.latent
        self.config, self.is_causal = config, is_causal(stack)
        self.injects = config.stage != "reconstruct"
        self.targets = config.injected(depth) if self.injects else tuple(range(depth))
        if config.variant == "full" or not self.injects:
            self.sources = tuple(range(depth))
        else:
            self.sources = tuple(layer + config.offset for layer in self.targets)
        device = next(stack.parameters()).device
        inputs = depth * width if config.variant == "full" else width
        self.encoder = nn.Parameter(torch.randn(depth, width, rank, device=device) * inputs**-0.5)
        self.projectors = nn.Parameter(torch.zeros(len(self.targets), rank, width, device=device))
        if self.injects:
            self.encoder.requires_grad_(False)
        else:
            nn.init.normal_(self.projectors, std=rank**-0.5)
        self.register_buffer("mean", torch.zeros(depth, width, device=device))
        self.register_buffer("scale", torch.ones(depth, device=device))
        self.register_buffer("input_scale", torch.ones(depth, device=device))
        self._stack = (stack,)  # in a tuple, so that it does not become a submodule
        self._biases: Tensor | None = None  # of the forward pass that runs now
        self._states: list[Tensor] | None = None  # what enters and leaves the layers of the unmodified pass
        self._cache: Any = None
        self._signature = inspect.signature(stack.forward)
        model.requires_grad_(False)
        self._hooks: list[Any] = self._register(stack, layers)
        self._join(model)
        if config.encoder is not None:
            self.load_encoder(Path(config.encoder))

    def _register(self, stack: Any, layers: nn.ModuleList) -> list[Any]:
        hooks = [
            stack.register_forward_pre_hook(self._before_model, with_kwargs=True),
            stack.register_forward_hook(self._after_model, always_call=True),
            layers[0].register_forward_pre_hook(self._before_first_layer, with_kwargs=True),
            *(layer.register_forward_hook(self._after_layer) for layer in layers),
        ]
        for row, layer in enumerate(self.targets if self.injects else ()):
            hooks.append(layers[layer].register_forward_pre_hook(partial(self._add_bias, row), with_kwargs=True))
        return hooks

    # ---- what it computes --------------------------------------------------------------------------------------------

    def forward(
        self, states: Tensor, mask: Tensor | None = None, before: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Computes the latents of tokens, and their projections.

        Args:
            states: hidden states of the unmodified model ``[B, T, L, d]``.
            mask: ``[B, T]``, the tokens that are text; the latents of others are 0.
            before: the latent ``[B, …]`` of the token before the first; None: there is none.

        Returns:
            ``[targets, B, T, d]``: in the stage ``task`` the biases of the layers, in the stage ``reconstruct`` the
            standardized hidden states decoded from each token's own latent; and the latents ``[B, T, …]``.
        """
        latents = self.encode(states)
        if mask is not None:
            latents = latents * mask[..., None].to(latents.dtype)
        if not (self.injects and self.is_causal):
            return self.project(latents), latents
        first = torch.zeros_like(latents[:, 0]) if before is None else before.to(latents)
        return self.project(torch.cat([first[:, None], latents[:, :-1]], dim=1)), latents

    def standardize(self, states: Tensor) -> Tensor:
        """Returns hidden states ``[..., L, d]`` less their mean, by the scale of their layer."""
        return (states.to(self.mean.dtype) - self.mean) / self.scale[:, None]

    def encode(self, states: Tensor) -> Tensor:
        """Maps hidden states ``[B, T, L, d]`` to latents ``[B, T, r]``; ``offset``: ``[B, T, sources·r]``."""
        standardized = self.standardize(states)
        if self.config.variant == "full":
            return standardized.flatten(-2) @ self.encoder.flatten(0, 1)
        sources = list(self.sources)
        return torch.einsum("btld,ldr->btlr", standardized[:, :, sources], self.encoder[sources]).flatten(-2)

    def project(self, latents: Tensor) -> Tensor:
        """Maps latents ``[B, T, …]`` to ``[targets, B, T, d]``."""
        projectors: Tensor = self.projectors
        if self.injects:
            projectors = projectors * self.input_scale[list(self.targets), None, None]
        if self.config.variant == "full":
            return torch.einsum("btr,lrd->lbtd", latents, projectors)
        latents = latents.unflatten(-1, (len(self.sources), self.config.latent))
        return torch.einsum("btlr,lrd->lbtd", latents, projectors)

    def collect(self, **inputs: Any) -> Tensor:
        """Returns hidden states ``[B, T, L, d]`` of the unmodified model, given its keyword arguments."""
        return torch.stack(self._run(inputs)[1:], dim=2)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[dict[str, Tensor]]) -> None:
        """Measures the statistics on batches of keyword arguments of the model; masked tokens do not count."""
        count = 0
        sums = squares = torch.zeros((), dtype=torch.float64, device=self.mean.device)
        for inputs in batches:
            states = torch.stack(self._run(inputs), dim=2)
            mask = inputs.get("attention_mask")
            tokens = states.flatten(0, 1) if mask is None else states[mask.bool()]
            count += len(tokens)
            sums = sums + tokens.sum(0, dtype=torch.float64)
            squares = squares + tokens.double().square().sum(0)
        if not count:
            raise ValueError("statistics of hidden states need at least one token")
        mean: Any = sums / count
        scale = (squares / count - mean.square()).mean(-1).clamp(min=1e-12).sqrt()
        self.mean.copy_(mean[1:])
        self.scale.copy_(scale[1:])
        self.input_scale.copy_(scale[:-1])

    @torch.no_grad()
    def _run(self, inputs: dict[str, Any]) -> list[Tensor]:
        """Runs the unmodified model; returns the first layer's input and every layer's output, ``[B, T, d]`` each."""
        dropped = ("output_hidden_states", "output_attentions", "use_cache")
        kept = {name: value for name, value in inputs.items() if name not in dropped}
        if self.is_causal:
            kept["use_cache"] = kept.get("past_key_values") is not None
        self._states, biases, self._biases = [], self._biases, None
        try:
            self._stack[0].forward(**kept)
            return self._states
        finally:
            self._states, self._biases = None, biases

    # ---- inside the model --------------------------------------------------------------------------------------------

    def _before_model(self, stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the unmodified model, and keeps the biases of its latents for the pass that follows."""
        if not self.injects:
            return None
        if stack.training and any(getattr(m, "gradient_checkpointing", False) for m in stack.modules()):
            raise ValueError("a bypass cannot train through gradient checkpointing; disable it")
        inputs = self._by_name(args, kwargs)
        companion = self._companion(inputs)
        states = self.collect(**(inputs | {"past_key_values": companion.unmodified} if companion else inputs))
        mask = inputs.get("attention_mask")
        mask = mask[:, -states.shape[1] :] if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self._biases, latents = self(states, mask, companion and companion.last)
        if companion is not None:
            companion.add(latents.detach())
        return (), inputs

    def _companion(self, inputs: dict[str, Any]) -> Companion | None:
        """Returns the companion of the cache among the inputs; makes the cache where the model would."""
        settings, wanted = self._stack[0].config, inputs.get("use_cache")
        if wanted is None:
            wanted = getattr(settings, "use_cache", False)
        if self.is_causal and wanted and inputs.get("past_key_values") is None:
            inputs["past_key_values"] = DynamicCache(config=settings)
        cache = inputs.get("past_key_values")
        companion = None if cache is None else Companion.of(cache)
        self._cache = cache
        return companion

    def _after_model(self, stack: Any, args: Any, output: Any) -> None:
        if self._cache is not None:
            Companion.of(self._cache).join(self._cache)
        self._biases = self._cache = None

    def _before_first_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._states is not None:
            self._states.append(args[0] if args else kwargs["hidden_states"])

    def _after_layer(self, layer: nn.Module, args: Any, output: Any) -> None:
        if self._states is not None:
            self._states.append(output[0] if isinstance(output, tuple) else output)

    def _add_bias(self, row: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._states is not None:
            return None
        if self._biases is None:
            raise ValueError(f"the layers ran without the forward pass of {type(self._stack[0]).__name__} around them")
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = hidden + self._biases[row].to(hidden)
        return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        given = self._signature.bind(*args, **kwargs).arguments
        spread = [p.name for p in self._signature.parameters.values() if p.kind is p.VAR_KEYWORD]
        rest = {key: value for name in spread for key, value in given.pop(name, {}).items()}
        return {**given, **rest}

    # ---- files -------------------------------------------------------------------------------------------------------

    def remove(self) -> None:
        """Removes the hooks: the model then computes what it did before (and stays frozen)."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._leave()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the bypass (safetensors), its config and which model it is for (JSON) into ``folder``."""
        config = dataclasses.replace(self.config, encoder=None)  # it is among the weights
        settings = {"config": config.to_dict(), "model": describe(self._stack[0])}
        save_own(Path(folder), self.state_dict(), WEIGHTS_FILE, settings, CONFIG_FILE)

    @classmethod
    def from_pretrained(cls, model: Any, folder: str | Path) -> Bypass:
        """Attaches what `save_pretrained` wrote to ``model``, the one that it was made for.

        Raises:
            ValueError: files are missing or do not fit, or ``model`` is another one; it is then as it was.
        """
        config, state = _read(Path(folder), stack_of(model))
        made = cls(model, config)
        load_attached(made, state, Path(folder))
        return made

    @classmethod
    def load(cls, model: Any, folder: str | Path) -> Bypass:
        """Attaches what `save` wrote: `from_pretrained`."""
        return cls.from_pretrained(model, folder)

    def load_encoder(self, folder: Path) -> None:
        """Takes encoder and statistics of the bypass saved in ``folder``, made for the same model.

        Raises:
            ValueError: as `from_pretrained`, or its encoder has another shape.
        """
        try:
            config, state = _read(folder, self._stack[0])
            for name in ("variant", "latent"):
                found, wanted = getattr(config, name), getattr(self.config, name)
                if found != wanted:
                    raise ValueError(f"{folder} was made with {name} {found!r}, this bypass has {wanted!r}")
        except ValueError:
            self.remove()
            raise
        with torch.no_grad():
            for name in _ENCODER:
                getattr(self, name).copy_(state[name])


def attach(model: Any, config: BypassConfig | str | None = None, **options: Any) -> Bypass:
    """Attaches a bypass to a Hugging Face model in place, by hooks; the model is frozen.

    In the stage ``task`` (and ``both``, the default) every forward pass of the model runs with biases, and so does
    ``generate``, beam search and padding included. In the stage ``reconstruct`` the model computes what it did, and the
    bypass gives back hidden states: ``bypass(bypass.collect(input_ids=ids))``.

    Args:
        model: an encoder or decoder with one list of layers, with or without a head. Attach before DDP, FSDP2 or
            ``torch.compile``. Dropout in a model in training mode makes the two passes differ: keep it in ``eval()``.
        config: of the bypass, or its variant by name.
        options: fields of `BypassConfig` that differ from ``config``.

    Returns:
        The bypass, in float32 on the model's device; ``remove()`` takes it off again, ``save(folder)`` writes it for
        `load`.

    Raises:
        ValueError: the model is of another kind or has a bypass already; an option is wrong.

    Example::

        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval()
        >>> tokens = torch.arange(12).view(2, 6)
        >>> before = model(tokens).logits
        >>> bypass = attach(model, latent=8)
        >>> torch.equal(model(tokens).logits, before)
        True
        >>> sum(p.numel() for p in bypass.parameters() if p.requires_grad)
        512
    """
    return Bypass(
        model, resolve_config(BypassConfig, config, options, lambda name: BypassConfig(variant=cast(Any, name)))
    )


def load(model: Any, folder: str | Path) -> Bypass:
    """Attaches a saved bypass to a Hugging Face model in place, by hooks; the model is frozen.

    Args:
        model: the one that it was made for, with the same weights.
        folder: what ``save`` of the bypass wrote.

    Returns:
        The bypass, as `attach` does.

    Raises:
        ValueError: files are missing or damaged, or were made for another model; ``model`` is then as it was.
    """
    return Bypass.load(model, folder)


def describe(stack: Any) -> dict[str, Any]:
    """Returns kind, size and fingerprint of a model."""
    return {**describe_model(stack), "fingerprint": weights_fingerprint(stack.named_parameters(), SAMPLE)}


def _read(folder: Path, stack: Any) -> tuple[BypassConfig, dict[str, Tensor]]:
    """Reads config and weights of the bypass in ``folder``, if it was made for this model."""
    settings, state = read_own(folder, "bypass", WEIGHTS_FILE, CONFIG_FILE)
    check_model(settings["model"], describe(stack), folder)
    return read_config(BypassConfig, settings["config"], folder), state
