"""Attaches cross-layer routing bridges to a Hugging Face encoder with forward hooks; no model code is replaced."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from xlayer_ext.nn import HDIMMessage, LayerRouter
from xlayer_systems.hf.layers import layers_of
from xlayer_systems.hf.pretrained import (
    Attachment,
    check_model,
    describe_model,
    load_attached,
    read_own,
    resolve_config,
    save_own,
)

from .config import XLRBConfig
from .presets import preset
from .target import Routing, TargetLayer, make_hdim
from .usage import LayerUsage

CONFIG_FILE = "xlrb_bridge.json"
WEIGHTS_FILE = "xlrb_bridge.safetensors"
_KEY = "xlrb_routed"
_EXPECTED = (
    "a RoBERTa/BERT-like encoder: encoder.layer[i].attention.self.{query,key,value}, attention.output, and a "
    "config with hidden_size and num_attention_heads"
)


@dataclass(frozen=True)
class _Masks:
    """Holds masks that are True where a token may be used: `[B, S]`, but pair `[B, S, S]`."""

    tokens: Tensor
    pair: Tensor | None = None
    first: Tensor | None = None
    second: Tensor | None = None


@dataclass
class _Pass:
    """Holds one forward pass of the encoder while it runs: the outputs of its layers so far."""

    masks: _Masks
    outputs: list[Tensor] = field(default_factory=list)
    summaries: list[Tensor] = field(default_factory=list)
    entropies: list[Tensor] = field(default_factory=list)


@dataclass
class _Routed:
    """Holds what a target layer needs from the layers below it, passed in as a keyword argument of that layer.

    Activation checkpointing keeps the arguments of a layer and calls it again in backward, so it sees this very
    object again, whatever other passes ran in between. It holds earlier outputs only and never the `_Pass`: a
    reference to anything later would tie the graph into a cycle and keep its memory.
    """

    masks: _Masks
    sources: tuple[Tensor, ...]
    routing: Routing
    counted: bool = False


class XLRBBridge(Attachment):
    """Routes messages from earlier layers into the last layers of an encoder (made by ``attach``).

    Its parameters are the bridge's own; the encoder's are used, not owned. While attached, the encoder's forward
    accepts two more keyword arguments: ``segment_ids`` `[B, S]` (0 first sentence, 1 second, -1 special or padding)
    and ``special_tokens_mask`` `[B, S]` (1 = special token).

    Attributes:
        config: the options.
        targets: numbers of the target layers, ascending.
    """

    part = "XLRB bridge"

    def __init__(self, model: Any, config: XLRBConfig) -> None:
        super().__init__()
        encoder = _encoder_of(model)
        layers = _check_encoder(encoder)
        hidden_size, heads = encoder.config.hidden_size, encoder.config.num_attention_heads
        self.config = config
        self.targets = _target_layers(len(layers), config)
        self.router = LayerRouter(
            hidden_size,
            route_dim=config.route_dim,
            top_k=config.top_k,
            temperature=config.route_temp,
            weighting=config.router_weight,
            pooling=config.route_pooling,
            query_mlp=config.router_query == "pair_mlp",
        )
        self.layers = nn.ModuleDict({str(j): TargetLayer(config, hidden_size, heads) for j in self.targets})
        copies = 0 if not config.use_hdim else 1 if config.share_hdim else len(self.targets)
        self.hdim = nn.ModuleList(make_hdim(config, hidden_size) for _ in range(copies))
        weight = layers[0].attention.self.query.weight
        self.to(device=weight.device, dtype=weight.dtype)
        self._usage = {j: LayerUsage(num_sources=j) for j in self.targets}
        self._encoder_layers: tuple[Any] = (layers,)  # in a tuple, so that they do not become submodules
        self._pass: _Pass | None = None
        self._entropy: Tensor | None = None
        self._handles = self._register(encoder, layers)
        self._join(model)

    def _register(self, encoder: nn.Module, layers: Any) -> list[Any]:
        handles = [
            encoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            encoder.register_forward_hook(self._end, always_call=True),
        ]
        handles += [layer.register_forward_hook(self._record) for layer in layers[: self.targets[-1]]]
        for j in self.targets:
            attention = layers[j].attention
            handles += [
                layers[j].register_forward_pre_hook(partial(self._route, j), with_kwargs=True),
                attention.self.register_forward_pre_hook(_strip, with_kwargs=True),
                attention.register_forward_hook(partial(self._inject, j), with_kwargs=True),
            ]
        return handles

    def remove(self) -> None:
        """Detaches the bridge: the encoder then computes exactly what it did before."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._leave()

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the bridge (safetensors), its config and the encoder's kind and sizes (JSON) into ``directory``."""
        settings = {"config": self.config.to_dict(), "model": describe_model(_encoder_of(self._model[0]))}
        save_own(Path(directory), self.state_dict(), WEIGHTS_FILE, settings, CONFIG_FILE)

    @classmethod
    def from_pretrained(cls, model: Any, directory: str | Path) -> XLRBBridge:
        """Attaches what `save_pretrained` wrote to ``model``, an encoder of the same kind and size.

        Raises:
            ValueError: files are missing, or were made for another encoder; ``model`` is then as it was.
        """
        directory = Path(directory)
        saved, state = read_own(directory, "XLRB bridge", WEIGHTS_FILE, CONFIG_FILE)
        encoder = _encoder_of(model)
        _check_encoder(encoder)
        check_model(saved["model"], describe_model(encoder), directory)
        made = cls(model, XLRBConfig.from_dict(saved["config"]))
        load_attached(made, state, directory)
        return made

    @classmethod
    def load(cls, model: Any, folder: str | Path) -> XLRBBridge:
        """Attaches what `save` wrote: `from_pretrained`."""
        return cls.from_pretrained(model, folder)

    def take_entropy(self) -> Tensor | None:
        """Returns, once, the differentiable mean attention entropy (nats) of the last forward pass over its targets.

        None with ``entropy_weight`` 0, where it is not computed.
        """
        entropy, self._entropy = self._entropy, None
        return entropy

    def usage(self, reset: bool = True) -> dict[str, Any]:
        """Returns the usage metrics of this process's forward passes since the last reset, as a JSON-able dict.

        ``{"layers": {"20": {...}, ...}}`` with, per target layer: ``sources`` (how often each source layer was
        chosen), ``router_entropy`` (nats, mean over examples) and, for kind ``attn`` (the QKV message) and ``hdim``:
        ``gate_*`` (of the last pass), ``norm_*`` (mean over real tokens), ``gate_variance_over_eps_*`` (α²·var/eps:
        far above 1 the LayerNorm behind the gate removes its effect). Means over no pass at all are None.
        """
        report = {str(j): self._usage[j].report(self._target(j).blend.eps) for j in self.targets}
        if reset:
            for usage in self._usage.values():
                usage.reset()
        return {"layers": report}

    def _target(self, j: int) -> TargetLayer:
        return cast(TargetLayer, self.layers[str(j)])

    # The hooks, in the order in which they run.

    def _begin(self, encoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = dict(kwargs)
        segments, special = kwargs.pop("segment_ids", None), kwargs.pop("special_tokens_mask", None)
        _check_checkpointing(self._encoder_layers[0])
        _keep_sources_unsharded(self._encoder_layers[0], self.config)
        tokens = args[0] if args else kwargs["input_ids" if kwargs.get("input_ids") is not None else "inputs_embeds"]
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        self._pass = _Pass(_make_masks(self.config, tokens, mask, segments, special))
        self._entropy = None
        return args, kwargs

    def _record(self, layer: nn.Module, args: tuple, output: Any) -> None:
        if self._pass is None:
            return
        hidden = output[0] if isinstance(output, tuple) else output
        self._pass.outputs.append(hidden)
        self._pass.summaries.append(self.router.summarize(hidden, self._pass.masks.tokens))

    def _route(self, j: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        current = self._pass
        if current is None or len(current.outputs) != j:
            raise RuntimeError("XLRB: a target layer ran outside its encoder's forward; call the encoder itself")
        target = current.summaries[-1]
        if self.config.router_query == "pair_mlp":
            assert current.masks.first is not None and current.masks.second is not None
            target = self.router.pair_summary(current.outputs[-1], current.masks.first, current.masks.second)
        logits = self.router.logits(target, torch.stack(current.summaries))
        routing = Routing.from_choice(*self.router.select(logits), logits)
        return args, {**kwargs, _KEY: _Routed(current.masks, tuple(current.outputs), routing)}

    def _inject(self, j: int, attention: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        routed: _Routed | None = kwargs.get(_KEY)
        if routed is None:
            raise RuntimeError(f"XLRB: {type(attention).__name__} is not given its layer's keyword arguments")
        hidden = args[0] if args else kwargs["hidden_states"]
        attended = output[0] if isinstance(output, tuple) else output
        messages, entropy = self._messages(j, hidden, routed)
        if not routed.counted:
            routed.counted = True
            self._usage[j].add(routed.routing, messages, routed.masks.tokens, self._target(j).blend)
            if entropy is not None and self._pass is not None:
                self._pass.entropies.append(entropy)
        blended = attended + self._target(j).blend(messages, attended).to(attended.dtype)
        return (blended, *output[1:]) if isinstance(output, tuple) else blended

    def _messages(self, j: int, hidden: Tensor, routed: _Routed) -> tuple[dict[str, Tensor], Tensor | None]:
        target, routing, masks = self._target(j), routed.routing, routed.masks
        chosen = [routed.sources[source][rows] for source, rows in routing.groups]
        messages: dict[str, Tensor] = {}
        entropy = None
        if self.config.use_qkv:
            layers = self._encoder_layers[0]
            messages["attn"] = target.qkv_message(layers, j, hidden, chosen, routing, masks.tokens)
        if self.config.use_hdim:
            hdim = cast(HDIMMessage, self.hdim[0 if self.config.share_hdim else self.targets.index(j)])
            sources = routing.slots(chosen)
            messages["hdim"], entropy = target.hdim_message(hdim, hidden, sources, routing, masks.tokens, masks.pair)
        return messages, entropy

    def _end(self, encoder: nn.Module, args: tuple, output: Any) -> None:
        if self._pass is not None and self._pass.entropies:
            self._entropy = torch.stack(self._pass.entropies).mean()
        self._pass = None


def attach(model: nn.Module, config: XLRBConfig | str | None = None, **options: Any) -> XLRBBridge:
    """Attaches routed cross-layer messages to a RoBERTa/BERT-like Hugging Face encoder, in place, with hooks.

    Only the last ``route_last_n`` layers receive messages. The bridge is made on the encoder's device, in its dtype.
    Gradient checkpointing (not reentrant), AMP, DDP and FSDP2 work; with FSDP2 and a QKV message, encoder layers that
    are sharded one by one stay unsharded between forward and backward, since a later layer uses their projections.
    One host synchronization per target layer groups the examples by source.

    Args:
        model: an encoder, for example ``RobertaModel``, or a model with a head on one.
        config: of the bridge, or the id of a published ablation, such as ``"H9"``.
        options: fields of `XLRBConfig` that differ from it.

    Returns:
        The bridge, to be trained beside the encoder. ``remove()`` detaches it, ``save(folder)`` writes it for `load`.

    Raises:
        ValueError: if the encoder has another structure, fewer than two layers or a bridge already; an option is wrong.
    """
    return XLRBBridge(model, resolve_config(XLRBConfig, config, options, preset))


def load(model: nn.Module, folder: str | Path) -> XLRBBridge:
    """Attaches a saved bridge to a RoBERTa/BERT-like Hugging Face encoder, in place.

    Args:
        model: an encoder of the kind and size that the bridge was made for. Its own weights stay as they are; those
            that were trained with the bridge are in the folder only after ``save(folder, include_model=True)``, for
            its ``from_pretrained``.
        folder: what ``save`` of the bridge wrote.

    Returns:
        The bridge, as `attach` does.

    Raises:
        ValueError: files are missing or damaged, or were made for another encoder; ``model`` is then as it was.
    """
    return XLRBBridge.load(model, folder)


def check_masks(tokens: Tensor, **masks: Tensor | None) -> None:
    """Raises ``ValueError`` naming the mask without the shape `[B, S]` of `tokens` `[B, S]` or `[B, S, H]`."""
    shape = tuple(tokens.shape[:2])
    for name, mask in masks.items():
        if mask is not None and tuple(mask.shape) != shape:
            raise ValueError(f"{name} must have the shape of the input, {shape}, got {tuple(mask.shape)}")


def _encoder_of(model: Any) -> Any:
    return getattr(model, "base_model", model)


def _check_encoder(encoder: Any) -> Any:
    """Returns the encoder's layers, or raises ValueError."""
    try:
        layers: Any = layers_of(encoder)
    except ValueError:
        layers = []
    settings = getattr(encoder, "config", None)
    has_sizes = hasattr(settings, "hidden_size") and hasattr(settings, "num_attention_heads")
    is_whole = layers is getattr(getattr(encoder, "encoder", None), "layer", None)  # not a part of another model
    if not has_sizes or not is_whole or not all(_is_bert_layer(layer) for layer in layers):
        raise ValueError(f"XLRB attaches to {_EXPECTED}; got {type(encoder).__name__}")
    if len(layers) < 2:
        raise ValueError(f"XLRB needs an encoder of at least 2 layers, got {len(layers)}")
    if any(isinstance(getattr(h, "__self__", None), XLRBBridge) for h in encoder._forward_pre_hooks.values()):
        raise ValueError("this encoder has an XLRB bridge already; call its remove() first")
    return layers


def _is_bert_layer(layer: Any) -> bool:
    attention = getattr(layer, "attention", None)
    own = getattr(attention, "self", None)
    parts = [getattr(own, name, None) for name in ("query", "key", "value")]
    takes_keywords = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(layer.forward).parameters.values())
    has_parts = hasattr(attention, "output") and all(isinstance(part, nn.Module) for part in parts)
    return has_parts and takes_keywords


def _target_layers(num_layers: int, config: XLRBConfig) -> tuple[int, ...]:
    count = config.route_last_n if config.inject_last is None else config.inject_last
    return tuple(range(max(1, num_layers - count), num_layers))


def _strip(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Removes the bridge's keyword argument, which the attention function does not take."""
    return args, {name: value for name, value in kwargs.items() if name != _KEY}


def _check_checkpointing(layers: Any) -> None:
    function: Callable | None = getattr(layers[0], "_gradient_checkpointing_func", None)
    options = getattr(function, "keywords", {})
    if getattr(layers[0], "gradient_checkpointing", False) and options.get("use_reentrant"):
        raise ValueError("XLRB needs gradient checkpointing with use_reentrant=False: reentrant would lose gradients")


def _keep_sources_unsharded(layers: Any, config: XLRBConfig) -> None:
    """Keeps FSDP2 from freeing the source layers' K/V weights, which a later layer uses in forward and backward."""
    if not config.use_qkv or config.qkv_weights != "source":
        return
    for layer in layers:
        if hasattr(layer, "set_reshard_after_forward"):
            layer.set_reshard_after_forward(False, recurse=False)


def _make_masks(
    config: XLRBConfig, tokens: Tensor, mask: Tensor | None, segments: Tensor | None, special: Tensor | None
) -> _Masks:
    check_masks(tokens, attention_mask=mask, segment_ids=segments, special_tokens_mask=special)
    allowed = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask.bool()
    if not config.needs_pairs:
        return _Masks(allowed)
    if segments is None:
        raise ValueError("XLRB: this configuration compares two sentences and needs segment_ids [B, S]")
    pair = None if config.attn_mask == "none" else _cross_sentence(segments, special, config)
    return _Masks(allowed, pair, allowed & (segments == 0), allowed & (segments == 1))


def _cross_sentence(segments: Tensor, special: Tensor | None, config: XLRBConfig) -> Tensor:
    """Returns `[B, S, S]`, True between tokens of different sentences; all from the second one on counts to it."""
    side = (segments == 1).cumsum(1) > 0
    pair = side[:, :, None] != side[:, None, :]
    if config.attn_mask == "cross":
        return pair
    ordinary = segments >= 0
    if special is not None:
        ordinary = ordinary & ~special.bool()
    return pair & ordinary[:, :, None] & ordinary[:, None, :]
