"""The 50 published ablations, each as its difference from one of three bases.

The accuracy beside each is the published best on RTE dev (roberta-large, seed 42); None where the run was stopped
early or its figure is not given singly. The majority class of RTE dev is 0.5271, plain roberta-large about 0.866.

Ablations that cannot differ from another one, by construction: A4 is the HDIM base and A11 the hybrid base; A8 = A18,
A9 = A17, and A10 = A14 (a target that injects nothing computes nothing here). H7, A9 and A17 change the router's
temperature, which cannot act at ``top_k=1``; H19 and A16 only redraw the router's random projection.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any, NamedTuple

from .config import XLRBConfig

HDIM_BASE = XLRBConfig()
"""Base of H1 to H20: HDIM message only."""
LEAN_BASE = replace(HDIM_BASE, fusion="concat_only")
"""Base of H21 to H30: HDIM message only, values from [context, hidden] alone."""
HYBRID_BASE = replace(HDIM_BASE, use_qkv=True)
"""Base of A1 to A20: QKV and HDIM messages."""


class Ablation(NamedTuple):
    """Holds one published run: its id, the base it starts from, the published accuracy and the fields it changes."""

    id: str
    base: XLRBConfig
    accuracy: float | None
    changes: dict[str, Any]

    @property
    def config(self) -> XLRBConfig:
        return replace(self.base, **self.changes)


# fmt: off
ABLATIONS: tuple[Ablation, ...] = (
    Ablation("H1", HDIM_BASE, 0.8159, {"proj_dim": 32, "mlp_dim": 128}),
    Ablation("H2", HDIM_BASE, 0.5271, {"proj_dim": 16, "mlp_dim": 64}),
    Ablation("H3", HDIM_BASE, 0.8484, {"gate_hdim": 0.10}),
    Ablation("H4", HDIM_BASE, 0.5271, {"dropout": 0.0}),
    Ablation("H5", HDIM_BASE, 0.5271, {"route_pooling": "cls"}),
    Ablation("H6", HDIM_BASE, 0.7834, {"route_last_n": 6}),
    Ablation("H7", HDIM_BASE, 0.7040, {"route_temp": 0.5}),
    Ablation("H8", HDIM_BASE, 0.8375, {"scorer": "bilinear"}),
    Ablation("H9", HDIM_BASE, 0.8736, {"fusion": "concat_only"}),
    Ablation("H10", HDIM_BASE, 0.8303, {"share_projections": True}),
    Ablation("H11", HDIM_BASE, None, {"token_temp": 0.8}),
    Ablation("H12", HDIM_BASE, None, {"scorer": "cosine"}),
    Ablation("H13", HDIM_BASE, 0.8412, {"scorer": "cosine", "fusion": "concat_only"}),
    Ablation("H14", HDIM_BASE, 0.8267, {"gate_hdim": 0.10, "dropout": 0.05}),
    Ablation("H15", HDIM_BASE, 0.7112, {"route_last_n": 3}),
    Ablation("H16", HDIM_BASE, 0.7545, {"entropy_weight": 1e-3}),
    Ablation("H17", HDIM_BASE, None, {"norm_projections": True}),
    Ablation("H18", HDIM_BASE, 0.8267, {"value_residual": True}),
    Ablation("H19", HDIM_BASE, None, {"route_dim": 64}),
    Ablation("H20", HDIM_BASE, None, {"proj_dim": 32, "fusion": "concat_only"}),
    Ablation("H21", LEAN_BASE, 0.7690, {"attn_mask": "cross"}),
    Ablation("H22", LEAN_BASE, None, {"attn_mask": "cross_no_special"}),
    Ablation("H23", LEAN_BASE, 0.8303, {"attn_mask": "cross", "fusion": "concat_diff_hadam"}),
    Ablation("H24", LEAN_BASE, None, {"router_query": "pair_mlp"}),
    Ablation("H25", LEAN_BASE, None, {"inject_last": 2}),
    Ablation("H26", LEAN_BASE, None, {"message_norm_match": 0.5}),
    Ablation("H27", LEAN_BASE, 0.8412, {"gate_activation": "softplus"}),
    Ablation("H28", LEAN_BASE, 0.7437, {"value_activation": "gelu"}),
    Ablation("H29", LEAN_BASE, None, {"token_temp": 1.05}),
    Ablation("H30", LEAN_BASE, None, {"share_hdim": True}),
    Ablation("A1", HYBRID_BASE, None, {"qkv_extra_value": True}),
    Ablation("A2", HYBRID_BASE, None, {"qkv_weights": "target"}),
    Ablation("A3", HYBRID_BASE, 0.8592, {"use_hdim": False}),
    Ablation("A4", HYBRID_BASE, None, {"use_qkv": False}),
    Ablation("A5", HYBRID_BASE, None, {"scorer": "bilinear"}),
    Ablation("A6", HYBRID_BASE, None, {"proj_dim": 32, "mlp_dim": 128}),
    Ablation("A7", HYBRID_BASE, None, {"activation": "gelu", "value_activation": "gelu"}),
    Ablation("A8", HYBRID_BASE, 0.8628, {"route_pooling": "cls"}),
    Ablation("A9", HYBRID_BASE, None, {"route_temp": 0.5}),
    Ablation("A10", HYBRID_BASE, None, {"inject_last": 2}),
    Ablation("A11", HYBRID_BASE, 0.8592, {}),
    Ablation("A12", HYBRID_BASE, 0.8412, {"top_k": 2}),
    Ablation("A13", HYBRID_BASE, 0.8375, {"top_k": 3}),
    Ablation("A14", HYBRID_BASE, None, {"route_last_n": 2}),
    Ablation("A15", HYBRID_BASE, None, {"route_last_n": 6}),
    Ablation("A16", HYBRID_BASE, 0.8303, {"route_dim": 256}),
    Ablation("A17", HYBRID_BASE, None, {"route_temp": 0.5}),
    Ablation("A18", HYBRID_BASE, None, {"route_pooling": "cls"}),
    Ablation("A19", HYBRID_BASE, None, {"gate_attn": 0.0}),
    Ablation("A20", HYBRID_BASE, None, {"gate_hdim": 0.0}),
)
# fmt: on

PRESETS: dict[str, XLRBConfig] = {ablation.id: ablation.config for ablation in ABLATIONS}
PUBLISHED_ACCURACY: dict[str, float | None] = {ablation.id: ablation.accuracy for ablation in ABLATIONS}


def preset(id: str) -> XLRBConfig:
    """Returns the configuration of a published ablation, ``H1`` to ``H30`` or ``A1`` to ``A20``.

    Raises:
        ValueError: for an unknown id, naming the known ones and the nearest.
    """
    if id in PRESETS:
        return PRESETS[id]
    near = difflib.get_close_matches(str(id).upper(), PRESETS, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(f"unknown XLRB preset {id!r}{hint}; expected H1 to H30 or A1 to A20")
