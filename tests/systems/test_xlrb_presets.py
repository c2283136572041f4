"""The 50 ablations: the table, and that each of them changes what its base computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from xlayer_systems.xlrb import ABLATIONS, PRESETS, PUBLISHED_ACCURACY, XLRBConfig, preset
from xlayer_systems.xlrb.presets import HDIM_BASE, HYBRID_BASE, LEAN_BASE, Ablation
from xlrb_tools import gradients, make_batch, make_classifier, one_thread

# At top_k 1 the weight of the chosen source is softmax of one number, 1 at any temperature, and dividing all logits by
# the same number does not change which is the largest: loss and all gradients are those of the base, to the bit.
COLD = "the router's temperature cannot act at top_k 1"
INERT = {"H7": COLD, "A9": COLD, "A17": COLD, "A11": "is the hybrid base itself"}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def step(config: XLRBConfig, base: XLRBConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Runs one float64 training step of `config`, its weights those of `base` wherever name and shape agree.

    Only the initial scalars (gates, HDIM's α and β) stay its own. So nothing can differ by the luck of the draw.
    """
    model, source = make_classifier(config), make_classifier(base)
    wanted = {name: tensor for name, tensor in source.state_dict().items() if tensor.numel() > 1}
    own = model.state_dict()
    model.load_state_dict({n: t for n, t in wanted.items() if n in own and own[n].shape == t.shape}, strict=False)
    return gradients(model.double(), make_batch())


def without_dropout(ablation: Ablation) -> tuple[XLRBConfig, XLRBConfig]:
    """Returns preset and base without dropout, unless that is what the preset changes."""
    if "dropout" in ablation.changes:
        return ablation.config, ablation.base
    return replace(ablation.config, dropout=0.0), replace(ablation.base, dropout=0.0)


@pytest.mark.parametrize("ablation", ABLATIONS, ids=lambda ablation: ablation.id)
def test_every_preset_trains_and_differs_from_its_base(ablation: Ablation) -> None:
    config, base = without_dropout(ablation)
    loss, grads = step(config, base)
    base_loss, base_grads = step(base, base)
    assert torch.isfinite(loss) and all(torch.isfinite(grad).all() for grad in grads.values())
    shapes, base_shapes = ({name: grad.shape for name, grad in side.items()} for side in (grads, base_grads))
    if ablation.id in INERT:
        assert shapes == base_shapes and torch.equal(loss, base_loss)
        assert all(torch.equal(grad, base_grads[name]) for name, grad in grads.items())
    elif shapes == base_shapes:
        same = all(torch.allclose(grad, base_grads[name], rtol=1e-7, atol=1e-12) for name, grad in grads.items())
        assert not (same and torch.isclose(loss, base_loss, rtol=1e-7)), INERT


def test_temperature_acts_where_the_router_learns() -> None:
    base = replace(HYBRID_BASE, dropout=0.0, router_weight="full_softmax")
    loss, _ = step(replace(base, route_temp=0.5), base)
    base_loss, _ = step(base, base)
    assert not torch.isclose(loss, base_loss, rtol=1e-7)


def test_the_table_is_complete() -> None:
    expected = [f"H{n}" for n in range(1, 31)] + [f"A{n}" for n in range(1, 21)]
    assert list(PRESETS) == expected == list(PUBLISHED_ACCURACY)
    assert sum(accuracy is None for accuracy in PUBLISHED_ACCURACY.values()) == 25
    assert max((a for a in ABLATIONS if a.accuracy), key=lambda a: a.accuracy).id == "H9"
    assert all(
        a.base is (HYBRID_BASE if a.id[0] == "A" else LEAN_BASE if int(a.id[1:]) > 20 else HDIM_BASE) for a in ABLATIONS
    )


def test_bases_are_the_published_ones() -> None:
    published = {"top_k": 1, "route_dim": 128, "route_temp": 0.7, "route_pooling": "mean", "route_last_n": 4}
    published |= {"dropout": 0.1, "gate_hdim": 0.05, "proj_dim": 24, "mlp_dim": 96, "scorer": "4term"}
    published |= {"activation": "relu", "fusion": "concat_hadam", "token_temp": 1.0}
    assert published.items() <= HDIM_BASE.to_dict().items()
    assert HDIM_BASE.differences(HYBRID_BASE) == {"use_qkv": (False, True)} and HYBRID_BASE.gate_attn == 0.15
    assert HDIM_BASE.differences(LEAN_BASE) == {"fusion": ("concat_hadam", "concat_only")}


def test_presets_that_are_the_same() -> None:
    assert PRESETS["A4"] == HDIM_BASE and PRESETS["A11"] == HYBRID_BASE and PRESETS["H9"] == LEAN_BASE
    assert PRESETS["A8"] == PRESETS["A18"] and PRESETS["A9"] == PRESETS["A17"]


@pytest.mark.parametrize(("wrong", "hint"), [("H31", "H1 to H30"), ("h9", "did you mean H9"), ("plain", "A1 to A20")])
def test_an_unknown_preset_is_refused(wrong: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        preset(wrong)
    assert preset("H9") is PRESETS["H9"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_k": 1.5}, "top_k must be an integer"),
        ({"route_temp": 0.0}, "route_temp must be finite and more than 0"),
        ({"token_temp": float("nan")}, "token_temp must be finite and more than 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and less than 1"),
        ({"scorer": "dot"}, "scorer must be one of 4term, bilinear, cosine, got 'dot'"),
        ({"share_hdim": 1}, "share_hdim must be true or false"),
        ({"use_hdim": False}, "use_hdim must be true"),
        ({"inject_last": 5}, "inject_last must be at most route_last_n"),
        ({"gate_activation": "softplus", "gate_hdim": 0.0}, "gate_hdim must be above 0"),
        ({"use_qkv": True, "use_hdim": False, "attn_mask": "cross"}, "attn_mask must be none"),
        ({"use_qkv": True, "use_hdim": False, "entropy_weight": 0.1}, "entropy_weight must be 0"),
    ],
)
def test_a_wrong_field_is_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        XLRBConfig(**changes)


def test_config_dict_round_trip_and_unknown_keys() -> None:
    config = PRESETS["H26"]
    assert XLRBConfig.from_dict(config.to_dict()) == config
    assert XLRBConfig.from_dict({"top_k": 2}) == replace(HDIM_BASE, top_k=2)
    with pytest.raises(ValueError, match="no field gate_hidm;"):
        XLRBConfig.from_dict({"gate_hidm": 0.1})


def test_which_presets_need_sentence_pairs() -> None:
    assert [id for id, config in PRESETS.items() if config.needs_pairs] == ["H21", "H22", "H23", "H24"]
