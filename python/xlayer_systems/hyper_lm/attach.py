"""Turns the residual connections of a Hugging Face decoder into hyper-connections; no model code is replaced.

A decoder layer keeps its modules, its name and its place, and gets a subclass of its own class with another forward:
norm, attention, norm and MLP run as before, between the pre and post of two hyper-connections. Layers hand on
(streams, y, coefficients), so that the post of a sublayer runs fused with the next sublayer's pre, in the forward of
the layer that owns that pre: FSDP2 and recomputation layer by layer see a layer's own parameters only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from xlayer_ext import functional as XF
from xlayer_ext.nn import HyperConnection, ManifoldHyperConnection, expand_streams, no_weight_decay, reduce_streams
from xlayer_systems.hf.layers import layers_of
from xlayer_systems.hf.pretrained import (
    Attachment,
    check_model,
    describe_model,
    load_attached,
    read_config,
    read_own,
    resolve_config,
    save_own,
)
from xlayer_systems.training.options import check_fields, option

RESIDUALS = ("shc", "dhc", "mhc")
State = tuple[Tensor, Tensor, Tensor]  # streams [b, s, n, d], output of the sublayer before [b, s, d], its coefficients

_CONFIG_FILE = "hyper_attachment.json"
_WEIGHTS_FILE = "hyper_attachment.safetensors"
_NAMES = ("hyper_attention", "hyper_mlp")  # of the new modules, inside a layer


@dataclass(frozen=True)
class AttachConfig:
    """Defines what `attach` makes.

    Raises:
        ValueError: a value is out of range.
    """

    residual: str = option(
        "dhc", "shc static, dhc dynamic, mhc manifold-constrained (as in the paper)", choices=RESIDUALS
    )
    expansion_rate: int = option(4, "number of residual streams", minimum=1)
    use_tanh: bool = option(True, "bound the dynamic coefficients of dhc by tanh")
    norm: str = option("layer", "norm of the streams in dhc", choices=("layer", "rms"))
    sinkhorn_iters: int = option(20, "iterations of Sinkhorn-Knopp in mhc", minimum=1, earlier="iterations")

    def __post_init__(self) -> None:
        check_fields(self)

    def connection(self, hidden_size: int, sublayer: int, like: Tensor) -> HyperConnection | ManifoldHyperConnection:
        """Returns a new hyper-connection for sublayer number ``sublayer``, which starts as a residual connection."""
        place: dict[str, Any] = {"expansion_rate": self.expansion_rate, "layer_index": sublayer}
        place |= {"device": like.device, "dtype": like.dtype}
        if self.residual == "mhc":
            return ManifoldHyperConnection(hidden_size, sinkhorn_iters=self.sinkhorn_iters, **place)
        kind: dict[str, Any] = {"static_weights": self.residual == "shc", "use_tanh": self.use_tanh, "norm": self.norm}
        return HyperConnection(hidden_size, **kind, **place)


class _HyperBlock(nn.Module):
    """Holds what decoder layers between two hyper-connections share."""

    hyper_attention: HyperConnection | ManifoldHyperConnection
    hyper_mlp: HyperConnection | ManifoldHyperConnection
    mlp: Callable[[Tensor], Tensor]

    def _pre_attention(self, state: Tensor | State) -> State:
        """Computes the streams, the input of attention, and its coefficients."""
        _check_checkpointing(self)
        if isinstance(state, Tensor):  # embeddings: this is the first layer
            streams = expand_streams(state, self.hyper_attention.expansion_rate)
            return streams, *self.hyper_attention.pre(streams)
        return self.hyper_attention.boundary(*state)


class _LlamaBlock(_HyperBlock):
    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: nn.Module

    def forward(self, hidden_states: Any, **kwargs: Any) -> State:
        streams, x, coefficients = self._pre_attention(hidden_states)
        y, _ = self.self_attn(hidden_states=self.input_layernorm(x), **kwargs)
        streams, x, coefficients = self.hyper_mlp.boundary(streams, y, coefficients)
        return streams, self.mlp(self.post_attention_layernorm(x)), coefficients


class _GPT2Block(_HyperBlock):
    ln_1: nn.Module
    attn: nn.Module
    ln_2: nn.Module

    def forward(
        self,
        hidden_states: Any,
        past_key_values: Any = None,
        attention_mask: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        **kwargs: Any,
    ) -> State:
        if encoder_hidden_states is not None:
            raise ValueError("hyper-connections: GPT-2 with cross-attention is not supported")
        streams, x, coefficients = self._pre_attention(hidden_states)
        y, _ = self.attn(self.ln_1(x), past_key_values=past_key_values, attention_mask=attention_mask, **kwargs)
        streams, x, coefficients = self.hyper_mlp.boundary(streams, y, coefficients)
        return streams, self.mlp(self.ln_2(x)), coefficients


@dataclass(frozen=True)
class _Kind:
    """Names the parts of a kind of decoder."""

    block: type[_HyperBlock]
    final_norm: str
    parts: frozenset[str]  # of a layer: one with other parts has another forward


_LLAMA = _Kind(_LlamaBlock, "norm", frozenset({"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}))
_GPT2 = _Kind(_GPT2Block, "ln_f", frozenset({"ln_1", "attn", "ln_2", "mlp"}))
# By name: layers with the same parts may do other things with them (Granite scales its residuals).
KINDS = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "gpt2": _GPT2}


class HyperAttachment(Attachment):
    """Holds the hyper-connections of a decoder (made by :func:`attach`): its parameters are the new ones alone.

    They are the decoder's parameters as well, under ``…layers.i.hyper_attention`` and ``…layers.i.hyper_mlp``.

    Attributes:
        config: what was asked for.
        layers: per decoder layer, the two hyper-connections ``attention`` and ``mlp``.
    """

    part = "hyper-connections"

    def __init__(self, model: Any, config: AttachConfig) -> None:
        super().__init__()
        decoder = _decoder_of(model)
        kind, layers = _check_decoder(decoder)
        like = next(layers[0].parameters())
        width = decoder.config.hidden_size
        self.config = config
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attention": config.connection(width, 2 * i, like),
                    "mlp": config.connection(width, 2 * i + 1, like),
                }
            )
            for i in range(len(layers))
        )
        self._decoder = (decoder,)  # in a tuple, so that it does not become a submodule
        for layer, own in zip(layers, cast(Any, self.layers), strict=True):
            layer.hyper_attention, layer.hyper_mlp = own["attention"], own["mlp"]
            layer.__class__ = _block_class(kind.block, type(layer))
        self._hook: Any = getattr(decoder, kind.final_norm).register_forward_pre_hook(_merge_streams)
        self._join(model)

    def remove(self) -> None:
        """Restores the decoder's residual connections: it then computes exactly what it did before.

        Raises:
            RuntimeError: something else, such as FSDP2, has changed the layers since.
        """
        if self._hook is None:
            return
        _, layers = _parts(self._decoder[0])
        if not all(type(layer).__dict__.get("_hyper_block") for layer in layers):
            raise RuntimeError("hyper-connections can be removed only before FSDP2 or others change the layers")
        for layer in layers:
            for name in _NAMES:
                delattr(layer, name)
            layer.__class__ = type(layer).__bases__[1]
        self._hook.remove()
        self._hook = None
        self._leave()

    def _names_inside(self, model: Any) -> set[str]:
        own = {id(parameter) for parameter in self.parameters()}
        return {name for name, parameter in model.named_parameters() if id(parameter) in own}

    def no_weight_decay(self) -> set[str]:
        """Returns the names among :meth:`named_parameters` without weight decay: all but the dynamic weights."""
        return no_weight_decay(self)

    def save_pretrained(self, directory: str | Path, *, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes the hyper-connections (safetensors) and their configuration (JSON) into ``directory``.

        Args:
            directory: made if missing.
            state_dict: the whole weights, for a sharded model that had them gathered.
        """
        state = self.state_dict() if state_dict is None else state_dict
        settings = {"config": asdict(self.config), "model": describe_model(self._decoder[0])}
        save_own(Path(directory), state, _WEIGHTS_FILE, settings, _CONFIG_FILE)

    @classmethod
    def from_pretrained(cls, model: nn.Module, directory: str | Path) -> HyperAttachment:
        """Attaches what :meth:`save_pretrained` wrote to ``model``, a decoder of the same kind and size.

        Raises:
            ValueError: files are missing, or were made for another model; ``model`` is then as it was.
        """
        directory = Path(directory)
        saved, state = read_own(directory, "hyper-connections", _WEIGHTS_FILE, _CONFIG_FILE)
        decoder = _decoder_of(model)
        check_model(saved["model"], describe_model(decoder), directory)
        made = cls(model, read_config(AttachConfig, saved["config"], directory))
        load_attached(made, state, directory)
        return made

    @classmethod
    def load(cls, model: Any, folder: str | Path) -> HyperAttachment:
        """Attaches what `save` wrote: `from_pretrained`."""
        return cls.from_pretrained(model, folder)


def attach(model: nn.Module, config: AttachConfig | str | None = None, **options: Any) -> HyperAttachment:
    """Turns the residual connections of a Hugging Face decoder into hyper-connections, in place.

    They start as the identity: all streams are copies, and the model computes what it did. At the end the streams are
    averaged. Cached generation, padding, AMP, DDP, FSDP2 and gradient checkpointing (not reentrant) work. With
    ``output_hidden_states`` the states between layers are the streams ``[b, s, n, d]`` before the last MLP's output is
    added.

    Args:
        model: a Llama, Mistral, Qwen2, Qwen3 or GPT-2 model, with or without a head. Attach before DDP, FSDP2,
            ``device_map`` or ``torch.compile``.
        config: of the connections, or the kind of them: ``"shc"`` static, ``"dhc"`` dynamic (the default), ``"mhc"``
            manifold-constrained hyper-connections.
        options: fields of :class:`AttachConfig` that differ from it, such as ``expansion_rate``.

    Returns:
        The hyper-connections, on the model's device and in its dtype; ``remove()`` takes them off again,
        ``save(folder)`` writes them for :func:`load`.

    Raises:
        ValueError: the model is of another kind or has hyper-connections already; an option is wrong.

    Papers: Hyper-Connections, ICLR 2025, arXiv 2409.19606; mHC, arXiv 2512.24880.

    Example::

        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval()
        >>> tokens = torch.arange(12).view(2, 6)
        >>> before = model(tokens).logits
        >>> handle = attach(model, "mhc", expansion_rate=4)
        >>> torch.allclose(model(tokens).logits, before, atol=1e-5)
        True
    """
    return HyperAttachment(model, resolve_config(AttachConfig, config, options, AttachConfig))


def load(model: nn.Module, folder: str | Path) -> HyperAttachment:
    """Attaches saved hyper-connections to a Hugging Face decoder, in place.

    Args:
        model: a decoder of the kind and size that they were made for. Its own weights stay as they are; those that it
            had are in the folder only after ``save(folder, include_model=True)``, for its ``from_pretrained``.
        folder: what ``save`` of the hyper-connections wrote.

    Returns:
        The hyper-connections, as :func:`attach` does.

    Raises:
        ValueError: files are missing or damaged, or were made for another model; ``model`` is then as it was.

    Example::

        >>> import tempfile, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval()
        >>> folder = tempfile.mkdtemp()
        >>> attach(model, "dhc").save(folder, include_model=True)
        >>> again = LlamaForCausalLM.from_pretrained(folder).eval()
        >>> handle = load(again, folder)
        >>> tokens = torch.arange(12).view(2, 6)
        >>> torch.equal(again(tokens).logits, model(tokens).logits)
        True
    """
    return HyperAttachment.load(model, folder)


def _merge_streams(norm: nn.Module, args: tuple[Any, ...]) -> Any:
    """Computes the last post and the mean over streams, before the decoder's final norm."""
    if isinstance(args[0], Tensor):  # no layer ran before it
        return None
    return (reduce_streams(XF.hyper_post(*args[0]), reduce="mean"), *args[1:])


_BLOCK_CLASSES: dict[tuple[type, type], type[nn.Module]] = {}


def _block_class(block: type[_HyperBlock], original: type[nn.Module]) -> type[nn.Module]:
    """Makes the layer's class with the forward of ``block``.

    It has the same name and is one for all layers, as FSDP policies look a layer's class up by name.
    """
    if (block, original) not in _BLOCK_CLASSES:
        body = {"_hyper_block": True, "__module__": original.__module__, "__qualname__": original.__qualname__}
        _BLOCK_CLASSES[block, original] = type(original.__name__, (block, original), body)
    return _BLOCK_CLASSES[block, original]


def _decoder_of(model: Any) -> Any:
    return getattr(model, "base_model", model)


def _parts(decoder: Any) -> tuple[_Kind, Any]:
    kind = KINDS[decoder.config.model_type]
    return kind, layers_of(decoder)


def _check_decoder(decoder: Any) -> tuple[_Kind, Any]:
    model_type = getattr(getattr(decoder, "config", None), "model_type", None)
    if model_type not in KINDS:
        got = type(decoder).__name__
        raise ValueError(f"hyper-connections attach to decoders of type {', '.join(KINDS)}; got {got}")
    kind, layers = _parts(decoder)
    for layer in layers:
        if hasattr(layer, _NAMES[0]):
            raise ValueError("this decoder has hyper-connections already; call their remove() first")
        if {name for name, _ in layer.named_children()} != kind.parts or not isinstance(
            layer, GradientCheckpointingLayer
        ):
            raise ValueError(f"hyper-connections need layers of {', '.join(sorted(kind.parts))} and nothing else")
        if "forward" in vars(layer):
            raise ValueError("something (device_map?) has replaced the layers' forward: attach hyper-connections first")
    if not len(layers):
        raise ValueError("hyper-connections need a decoder with at least one layer")
    return kind, layers


def _check_checkpointing(layer: Any) -> None:
    function = getattr(layer, "_gradient_checkpointing_func", None)
    if layer.gradient_checkpointing and getattr(function, "keywords", {}).get("use_reentrant"):
        raise ValueError("hyper-connections need gradient checkpointing with use_reentrant=False")
