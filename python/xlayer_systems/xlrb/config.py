"""Configuration of a cross-layer routing bridge, one field per option of the published ablations."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from xlayer_ext.types import Activation, Fusion, RouterPooling, RouterWeighting, Scorer
from xlayer_systems.training.options import check_fields, option, with_current_names


@dataclass(frozen=True)
class XLRBConfig:
    """Defines an XLRB bridge. The defaults are the published HDIM-only base.

    Lengths count layers, dimensions are in features. The HDIM message is `xlayer_ext.nn.HDIMMessage`.

    Raises:
        ValueError: a value is out of range, or fields do not fit each other.
    """

    use_qkv: bool = option(False, "add the QKV message, by the encoder's own projections")
    use_hdim: bool = option(True, "add the HDIM message")
    top_k: int = option(
        1,
        "sources chosen per example and target layer (fewer where a layer has fewer sources)",
        minimum=1,
        earlier="topk",
    )
    route_dim: int = option(128, "width of the two router projections", minimum=1)
    route_temp: float = option(0.7, "divisor of the router's logits", above=0)
    route_pooling: RouterPooling = option(
        "mean", "layer summary: the masked mean over tokens or the first token", earlier="route_pool"
    )
    router_weight: RouterWeighting = option(
        "topk_softmax",
        "topk_softmax (published): softmax over the chosen logits, constant 1 at top_k 1, so that router never learns; "
        "full_softmax: the chosen source's probability over all sources",
    )
    router_query: str = option(
        "linear", "linear, or pair_mlp over the means of the two sentences", choices=("linear", "pair_mlp")
    )
    route_last_n: int = option(4, "only the last n layers are targets (layer 0 never is: it has no source)", minimum=1)
    inject_last: int | None = option(
        None, "only the last n targets exist (none: all); equal to a smaller route_last_n", minimum=1
    )
    proj_dim: int = option(24, "features of the HDIM projections", minimum=1)
    mlp_dim: int = option(96, "hidden features of the HDIM pair MLP", minimum=1)
    scorer: Scorer = option("4term", "score of a pair of tokens")
    activation: Activation = option("relu", "activation of the pair MLP")
    fusion: Fusion = option(
        "concat_hadam",
        "what the HDIM values are made of",
    )
    value_activation: Activation = option("relu", "activation of the HDIM values")
    token_temp: float = option(1.0, "divisor of the HDIM logits", above=0)
    share_projections: bool = option(False, "use one HDIM projection for queries and keys")
    norm_projections: bool = option(False, "normalize the HDIM projections")
    value_residual: bool = option(False, "add the hidden state to the HDIM values")
    value_beta: float = option(0.1, "scale of that residual")
    share_hdim: bool = option(False, "use one HDIM module for all targets")
    entropy_weight: float = option(0.0, "loss weight of the mean attention entropy (nats)", minimum=0)
    attn_mask: str = option(
        "none",
        "cross: a token sees only tokens of the other sentence (a special token counts to the sentence it opens or "
        "closes); cross_no_special also shuts out special tokens; a token without an allowed partner has zero context",
        choices=("none", "cross", "cross_no_special"),
        earlier="pair_mask",
    )
    qkv_weights: str = option(
        "source", "key and value projections of the source or the target layer", choices=("source", "target")
    )
    qkv_extra_value: bool = option(False, "one more Linear(head_dim, head_dim) on the QKV values")
    gate_attn: float = option(0.15, "initial gate of the QKV message")
    gate_hdim: float = option(
        0.05, "initial gate of the HDIM message, and of its own scalar, so at 0 the HDIM path is off and stays off"
    )
    gate_activation: str = option(
        "identity",
        "softplus keeps gates positive; its parameter starts where the gate has the value above",
        choices=("identity", "softplus"),
    )
    gate_position: str = option(
        "before_norm",
        "before_norm (published): a LayerNorm after the gates removes their common scale except through its eps; "
        "after_norm: each message is normalized by itself, then gated",
        choices=("before_norm", "after_norm"),
    )
    message_norm_match: float | None = option(
        None,
        "rescale each message, token by token, to this multiple of the norm of the layer's attention output (after its "
        "own LayerNorm with after_norm)",
        above=0,
    )
    dropout: float = option(
        0.1,
        "of the attention inside the QKV message, of the HDIM message, and of the blended output",
        minimum=0,
        below=1,
    )

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_combinations()

    def _check_combinations(self) -> None:
        self._require(self.use_qkv or self.use_hdim, "use_hdim", "true when use_qkv is false (no message is left)")
        if self.inject_last is not None:
            self._require(self.inject_last <= self.route_last_n, "inject_last", "at most route_last_n")
        if self.gate_activation == "softplus":
            for name, used in (("gate_attn", self.use_qkv), ("gate_hdim", self.use_hdim)):
                self._require(not used or getattr(self, name) > 0, name, "above 0 with gate_activation softplus")
        if not self.use_hdim:
            self._require(self.attn_mask == "none", "attn_mask", "none without use_hdim (it masks HDIM pairs)")
            self._require(self.entropy_weight == 0, "entropy_weight", "0 without use_hdim (it acts on HDIM)")

    def _require(self, condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    @property
    def needs_pairs(self) -> bool:
        """Tells whether this configuration applies to sentence pairs only (it reads ``segment_ids``)."""
        return self.attn_mask != "none" or self.router_query == "pair_mlp"

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as a JSON-able dict, the inverse of ``from_dict``."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> XLRBConfig:
        """Builds a configuration from a dict, earlier names included; fields left out keep their default.

        Raises:
            ValueError: a field is unknown or given by two names, or a value is out of range.
        """
        values = with_current_names(cls, values)
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"XLRBConfig has no field {', '.join(unknown)}; its fields are {', '.join(sorted(known))}")
        return cls(**values)

    def differences(self, other: XLRBConfig) -> dict[str, tuple[Any, Any]]:
        """Returns the fields that differ, each with this and the other configuration's value."""
        mine, theirs = self.to_dict(), other.to_dict()
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}
