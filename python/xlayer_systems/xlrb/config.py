"""The options of a cross-layer routing bridge, one field per option of the published ablations."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from xlayer_ext.types import Activation, Fusion, RouterPooling, RouterWeighting, Scorer

_CHOICES: dict[str, tuple[str, ...]] = {
    "route_pool": ("mean", "cls"),
    "router_weight": ("topk_softmax", "full_softmax"),
    "router_query": ("linear", "pair_mlp"),
    "scorer": ("4term", "bilinear", "cosine"),
    "activation": ("relu", "gelu"),
    "value_activation": ("relu", "gelu"),
    "fusion": ("concat_hadam", "concat_only", "concat_diff_hadam"),
    "pair_mask": ("none", "cross", "cross_no_special"),
    "qkv_weights": ("source", "target"),
    "gate_activation": ("identity", "softplus"),
    "gate_position": ("before_norm", "after_norm"),
}
_FLAGS = (
    "use_qkv",
    "use_hdim",
    "share_projections",
    "norm_projections",
    "value_residual",
    "share_hdim",
    "qkv_extra_value",
)
_COUNTS = ("topk", "route_dim", "route_last_n", "inject_last", "proj_dim", "mlp_dim")
_POSITIVE = ("route_temp", "token_temp", "message_norm_match")
_NON_NEGATIVE = ("entropy_weight",)
_NUMBERS = (*_POSITIVE, *_NON_NEGATIVE, "value_beta", "gate_attn", "gate_hdim", "dropout")
_OPTIONAL = ("inject_last", "message_norm_match")


@dataclass(frozen=True)
class XLRBConfig:
    """Everything that defines an XLRB bridge. The defaults are the published HDIM-only base.

    A wrong value raises ``ValueError`` naming the field. Lengths count layers, dimensions are in features.

    Router (one for all target layers)
        topk: sources chosen per example and target layer (fewer where a layer has fewer sources).
        route_dim, route_temp: width of the two router projections and divisor of their product.
        route_pool: layer summary, the masked mean over tokens or the first token (``cls``).
        router_weight: ``topk_softmax`` (published: softmax over the chosen logits, constant 1 at ``topk=1``, so
            that router never learns) or ``full_softmax`` (the chosen source's probability over all sources).
        router_query: ``linear``, or ``pair_mlp`` over the means of the two sentences.
        route_last_n: only the last n layers are targets (layer 0 never is: it has no source).
        inject_last: only the last n targets exist (None: all). Equal to a smaller ``route_last_n``.

    HDIM message (``xlayer_ext.nn.HDIMMessage``)
        use_hdim, proj_dim, mlp_dim, scorer, activation, fusion, value_activation, token_temp, share_projections,
        norm_projections, value_residual, value_beta; share_hdim: one module for all targets.
        entropy_weight: loss weight of the mean attention entropy (nats).
        pair_mask: ``cross`` lets a token see only tokens of the other sentence (a special token counts to the
            sentence it opens or closes), ``cross_no_special`` also shuts out special tokens on both sides. A token
            without an allowed partner has zero context (the published code gave it a uniform softmax).

    QKV message (the encoder's own projections)
        use_qkv; qkv_weights: key and value projections of the ``source`` or the ``target`` layer;
        qkv_extra_value: one more Linear(head_dim, head_dim) on the values.

    Blend
        gate_attn, gate_hdim: initial gates; gate_hdim also starts HDIM's own scalar, so at 0 the HDIM path is off
            and stays off (both factors have gradient 0).
        gate_activation: ``softplus`` keeps gates positive; its parameter starts where the gate has the value above.
        gate_position: ``before_norm`` (published: a LayerNorm after the gates removes their common scale except
            through its eps) or ``after_norm`` (each message is normalized by itself, then gated).
        message_norm_match: each message is rescaled, token by token, to this multiple of the norm of the layer's
            attention output (after its own LayerNorm with ``after_norm``, which would undo it otherwise).
        dropout: of the attention inside the QKV message, of the HDIM message, and of the blended output.
    """

    use_qkv: bool = False
    use_hdim: bool = True
    topk: int = 1
    route_dim: int = 128
    route_temp: float = 0.7
    route_pool: RouterPooling = "mean"
    router_weight: RouterWeighting = "topk_softmax"
    router_query: str = "linear"
    route_last_n: int = 4
    inject_last: int | None = None
    proj_dim: int = 24
    mlp_dim: int = 96
    scorer: Scorer = "4term"
    activation: Activation = "relu"
    fusion: Fusion = "concat_hadam"
    value_activation: Activation = "relu"
    token_temp: float = 1.0
    share_projections: bool = False
    norm_projections: bool = False
    value_residual: bool = False
    value_beta: float = 0.1
    share_hdim: bool = False
    entropy_weight: float = 0.0
    pair_mask: str = "none"
    qkv_weights: str = "source"
    qkv_extra_value: bool = False
    gate_attn: float = 0.15
    gate_hdim: float = 0.05
    gate_activation: str = "identity"
    gate_position: str = "before_norm"
    message_norm_match: float | None = None
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            _require(getattr(self, name) in choices, self, name, f"one of {', '.join(choices)}")
        for name in _FLAGS:
            _require(isinstance(getattr(self, name), bool), self, name, "true or false")
        for name in _COUNTS:
            value = getattr(self, name)
            _require(_absent(self, name) or (_is_int(value) and value >= 1), self, name, "an integer of at least 1")
        for name in _NUMBERS:
            _require(_absent(self, name) or _is_number(getattr(self, name)), self, name, "a finite number")
        for name in _POSITIVE:
            _require(_absent(self, name) or getattr(self, name) > 0, self, name, "a number above 0")
        for name in _NON_NEGATIVE:
            _require(getattr(self, name) >= 0, self, name, "a number of at least 0")
        _require(0 <= self.dropout < 1, self, "dropout", "a number in [0, 1)")
        self._check_combinations()

    def _check_combinations(self) -> None:
        _require(self.use_qkv or self.use_hdim, self, "use_hdim", "true when use_qkv is false (no message is left)")
        if self.inject_last is not None:
            _require(self.inject_last <= self.route_last_n, self, "inject_last", "at most route_last_n")
        if self.gate_activation == "softplus":
            for name, used in (("gate_attn", self.use_qkv), ("gate_hdim", self.use_hdim)):
                _require(not used or getattr(self, name) > 0, self, name, "above 0 with gate_activation softplus")
        if not self.use_hdim:
            _require(self.pair_mask == "none", self, "pair_mask", "none without use_hdim (it masks HDIM pairs)")
            _require(self.entropy_weight == 0, self, "entropy_weight", "0 without use_hdim (it acts on HDIM)")

    @property
    def needs_pairs(self) -> bool:
        """Whether this configuration means something only on sentence pairs (it reads ``segment_ids``)."""
        return self.pair_mask != "none" or self.router_query == "pair_mlp"

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-able dict, the inverse of ``from_dict``."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> XLRBConfig:
        """Builds a configuration from a dict; fields left out keep their default, unknown ones raise ``ValueError``."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"XLRBConfig has no field {', '.join(unknown)}; its fields are {', '.join(sorted(known))}")
        return cls(**values)

    def differences(self, other: XLRBConfig) -> dict[str, tuple[Any, Any]]:
        """Fields that differ, each with this and the other configuration's value."""
        mine, theirs = self.to_dict(), other.to_dict()
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}


def _absent(config: XLRBConfig, name: str) -> bool:
    return name in _OPTIONAL and getattr(config, name) is None


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def _require(condition: bool, config: XLRBConfig, name: str, expected: str) -> None:
    if not condition:
        raise ValueError(f"XLRBConfig.{name} must be {expected}, got {getattr(config, name)!r}")
