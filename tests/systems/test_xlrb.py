"""XLRB: the computation against one written out in loops; router, gates and masks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlayer_systems.xlrb import PRESETS, XLRBClassifier, attach
from xlrb_tools import (
    HEADS,
    HIDDEN,
    LAYERS,
    config_without_dropout,
    gradients,
    make_batch,
    make_classifier,
    make_encoder,
    one_thread,
    watch,
)

LAST = LAYERS - 1


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


# ---- The published formulas, one number at a time ------------------------------------------------------------------


def written_out_route(model: XLRBClassifier, states: list[Tensor], b: int, real: list[int]) -> list[tuple[int, float]]:
    """Returns the chosen source layers of example b with their weights, for the last layer."""
    router, config = model.bridge.router, model.config
    summaries = [sum(states[i][b, t] for t in real) / len(real) for i in range(LAST)]
    query = router.query.weight @ summaries[-1] + router.query.bias
    logits = [float(query @ (router.key.weight @ s + router.key.bias)) / config.route_temp for s in summaries]
    chosen = sorted(range(LAST), key=lambda i: -logits[i])[: config.top_k]
    total = sum(math.exp(logits[i]) for i in chosen)
    return [(i, math.exp(logits[i]) / total) for i in chosen]


def written_out_hdim(hdim: nn.Module, hadamard: bool, target: Tensor, source: Tensor, real: list[int]) -> Tensor:
    """Computes the HDIM message to one token: `target` `[H]`, `source` `[S, H]`."""
    z = hdim.target_proj.weight @ target
    logits = []
    for t in real:
        y = hdim.source_proj.weight @ source[t]
        pair = torch.cat([z, y, y * z, (z - y).abs()])
        hidden = (hdim.pair_in.weight @ pair + hdim.pair_in.bias).clamp_min(0)
        logits.append((hdim.pair_out.weight @ hidden + hdim.pair_out.bias)[0])
    shares = torch.stack(logits).softmax(0)
    context = sum(share * source[t] for share, t in zip(shares, real, strict=True))
    fused = torch.cat([context, target, context * target] if hadamard else [context, target])
    hidden = (hdim.value_in.weight @ fused + hdim.value_in.bias).clamp_min(0)
    return hdim.alpha * (hdim.value_out.weight @ hidden + hdim.value_out.bias)


def written_out_qkv(layers: nn.ModuleList, i: int, target: Tensor, source: Tensor, real: list[int]) -> Tensor:
    """Computes the QKV message from layer i to one token of the last layer, head by head."""
    query = layers[LAST].attention.self.query(target)
    keys, values = layers[i].attention.self.key(source), layers[i].attention.self.value(source)
    heads = []
    for part in torch.arange(HIDDEN).chunk(HEADS):
        shares = torch.stack([query[part] @ keys[t][part] for t in real]) / (HIDDEN // HEADS) ** 0.5
        heads.append(sum(share * values[t][part] for share, t in zip(shares.softmax(0), real, strict=True)))
    return torch.cat(heads)


@pytest.mark.parametrize("id", ["H9", "A11", "A12", "A13"])
def test_the_message_is_the_published_formula(id: str) -> None:
    model = make_classifier(PRESETS[id]).double().eval()
    blend = model.bridge.layers[str(LAST)].blend
    nn.init.normal_(blend.norm.weight)
    batch = make_batch(size=3)
    with torch.no_grad():
        seen = watch(model, batch)
        states = seen["layers"]
        for b in range(3):
            real = [t for t in range(batch["attention_mask"].shape[1]) if batch["attention_mask"][b, t]]
            chosen = written_out_route(model, states, b, real)
            assert len(chosen) == PRESETS[id].top_k
            for t in real:
                target = states[LAST - 1][b, t]
                arguments = [(i, weight, target, states[i][b], real) for i, weight in chosen]
                hdim = sum(w * written_out_hdim(model.bridge.hdim[-1], id != "H9", *rest) for _, w, *rest in arguments)
                blended = blend.gates["hdim"].raw * hdim
                if id != "H9":
                    qkv = sum(w * written_out_qkv(model.encoder.encoder.layer, i, *r) for i, w, *r in arguments)
                    blended = blended + blend.gates["attn"].raw * qkv
                centred = blended - blended.mean()
                normed = centred / (centred.square().mean() + 1e-5).sqrt() * blend.norm.weight + blend.norm.bias
                added = blend.output.weight @ normed + blend.output.bias
                torch.testing.assert_close((seen["after"] - seen["before"])[b, t], added, rtol=1e-9, atol=1e-12)


def test_published_initial_values() -> None:
    model = make_classifier(PRESETS["A11"])
    for target in model.bridge.layers.values():
        assert target.blend.output.weight.std().item() == pytest.approx(1e-3, rel=0.15)
        assert not target.blend.output.bias.any()
        assert {kind: gate().item() for kind, gate in target.blend.gates.items()} == pytest.approx(
            {"attn": 0.15, "hdim": 0.05}
        )
    assert [hdim.alpha.item() for hdim in model.bridge.hdim] == pytest.approx([0.05] * 4)
    soft = make_classifier(PRESETS["H27"]).bridge.layers[str(LAST)].blend.gates["hdim"]
    assert soft().item() == pytest.approx(0.05) and soft.raw.item() != pytest.approx(0.05)
    assert [type(module).__name__ for module in model.head] == ["LayerNorm", "Linear", "ReLU", "Dropout", "Linear"]
    assert model.head[1].out_features == 128


# ---- Router and gates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weighting", "learns"), [("topk_softmax", False), ("full_softmax", True)])
def test_the_published_router_does_not_learn_at_topk_1(weighting: str, learns: bool) -> None:
    _, grads = gradients(make_classifier(config_without_dropout("H9", router_weight=weighting)), make_batch())
    router = [grad for name, grad in grads.items() if name.startswith("bridge.router.")]
    assert len(router) == 4
    # The bias of the key adds the same to every source's logit, so its gradient is zero either way.
    assert all(bool(grads[f"bridge.router.{name}"].any()) is learns for name in ("query.weight", "key.weight"))


@pytest.mark.parametrize(("position", "acts"), [("before_norm", False), ("after_norm", True)])
def test_a_gate_acts_behind_the_norm_only(position: str, acts: bool) -> None:
    model = make_classifier(config_without_dropout("H9", gate_position=position)).eval()
    with torch.no_grad():
        model.bridge.hdim[-1].alpha.fill_(100.0)  # a message whose variance is far above eps
        seen = watch(model, make_batch())
        model.bridge.layers[str(LAST)].blend.gates["hdim"].raw.mul_(2)
        doubled = watch(model, make_batch())
    ratio = (doubled["after"] - doubled["before"]).norm() / (seen["after"] - seen["before"]).norm()
    assert ratio.item() == pytest.approx(2.0 if acts else 1.0, rel=1e-2)


def test_message_norm_is_matched_to_the_attention_output() -> None:
    model = make_classifier(config_without_dropout("H26")).eval()
    blend = model.bridge.layers[str(LAST)].blend
    normed = []
    blend.norm.register_forward_pre_hook(lambda _, args: normed.append(args[0]))
    with torch.no_grad():
        before = watch(model, make_batch())["before"]
    torch.testing.assert_close(normed[0].norm(dim=-1), 0.05 * 0.5 * before.norm(dim=-1))


@pytest.mark.parametrize(("id", "targets"), [("H9", 4), ("H25", 2), ("H15", 3), ("H6", 6), ("A14", 2)])
def test_only_the_last_layers_receive(id: str, targets: int) -> None:
    model = make_classifier(PRESETS[id]).eval()
    assert model.bridge.targets == tuple(range(LAYERS - targets, LAYERS))
    for layer in range(LAYERS):
        with torch.no_grad():
            seen = watch(model, make_batch(), layer)
        assert torch.equal(seen["before"], seen["after"]) is (layer not in model.bridge.targets)


def test_a_layer_with_fewer_sources_than_topk_takes_all() -> None:
    encoder = make_encoder(num_hidden_layers=3)
    model = XLRBClassifier(encoder, config_without_dropout("A13", route_last_n=9), 2)
    gradients(model, make_batch())
    usage = model.usage()["layers"]
    assert list(usage) == ["1", "2"] and usage["1"]["sources"] == [6] and usage["2"]["sources"] == [6, 6]


@pytest.mark.parametrize("id", ["A3", "A12", "A13"])
def test_qkv_projects_the_chosen_sources_only(id: str) -> None:
    model = make_classifier(PRESETS[id]).eval()
    rows = [0] * LAYERS
    for i, layer in enumerate(model.encoder.encoder.layer):

        def count(_: nn.Module, args: tuple, i: int = i) -> None:
            rows[i] += args[0].shape[0]

        layer.attention.self.key.register_forward_pre_hook(count)
    with torch.no_grad():
        model(**make_batch())
    usage = model.usage()["layers"].values()
    chosen = [sum(layer["sources"][i] for layer in usage if i < len(layer["sources"])) for i in range(LAYERS)]
    assert rows == [6 + count for count in chosen] and sum(chosen) == 6 * 4 * PRESETS[id].top_k


# ---- Masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", ["H9", "H5", "H12", "H8", "H23", "H24", "A12", "A2"])
def test_padding_changes_nothing(id: str) -> None:
    model = make_classifier(PRESETS[id]).eval()
    batch = make_batch()
    padded = {name: F.pad(value, (0, 3), value=-1 if name == "segment_ids" else 1 if name == "input_ids" else 0)
              for name, value in batch.items() if name != "labels"}  # fmt: skip
    changed = padded | {"input_ids": padded["input_ids"].masked_fill(padded["attention_mask"] == 0, 1)}
    filled = model.encoder.embeddings.word_embeddings.weight
    with torch.no_grad():
        short, long = watch(model, batch), watch(model, padded)
        filled[1] = 3.0  # RoBERTa numbers positions by the pad id, so what stands at padding is changed by its vector
        other = watch(model, changed)
    torch.testing.assert_close(short["logits"], long["logits"], rtol=1e-5, atol=1e-5)
    real = padded["attention_mask"].bool()
    torch.testing.assert_close(long["layers"][-1][real], other["layers"][-1][real], rtol=1e-5, atol=1e-5)


def test_cross_sentence_masks() -> None:
    segments = torch.tensor([[-1, 0, -1, 1, -1]])
    encoder = make_encoder()
    masks = []
    bridge = attach(encoder, PRESETS["H21"])
    bridge.hdim[0].register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attn_mask"]), with_kwargs=True
    )
    ids, mask = torch.tensor([[0, 7, 2, 8, 2]]), torch.ones(1, 5)
    encoder(ids, mask, segment_ids=segments)
    first, second = [[0, 0, 0, 1, 1]], [[1, 1, 1, 0, 0]]
    assert masks[0].long().tolist() == [first * 3 + second * 2]
    bridge.remove()
    bridge = attach(encoder, PRESETS["H22"])
    bridge.hdim[0].register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attn_mask"]), with_kwargs=True
    )
    encoder(ids, mask, segment_ids=segments)
    nothing = [0] * 5
    assert masks[1].long().tolist() == [[nothing, [0, 0, 0, 1, 0], nothing, [0, 1, 0, 0, 0], nothing]]


def test_without_a_partner_the_context_is_zero() -> None:
    """On single sentences the cross-sentence presets have no source: the message depends on the target token alone."""
    model = make_classifier(config_without_dropout("H21")).eval()
    batch = make_batch()
    batch["segment_ids"].zero_()
    with torch.no_grad():
        seen = watch(model, batch)
        hdim, blend = model.bridge.hdim[-1], model.bridge.layers[str(LAST)].blend
        hidden = seen["layers"][LAST - 1]
        fused = hdim.value_in(torch.cat([torch.zeros_like(hidden), hidden], -1)).relu()
        expected = blend({"hdim": hdim.alpha * hdim.value_out(fused)}, seen["before"])
    torch.testing.assert_close(seen["after"] - seen["before"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("id", ["H21", "H22", "H23", "H24"])
def test_pair_presets_need_segments(id: str) -> None:
    batch = make_batch()
    del batch["segment_ids"]
    with pytest.raises(ValueError, match="needs segment_ids"):
        make_classifier(PRESETS[id])(**batch)


@pytest.mark.parametrize("name", ["attention_mask", "segment_ids", "special_tokens_mask"])
def test_a_mask_of_the_wrong_length_is_named(name: str) -> None:
    batch = make_batch()
    batch[name] = batch[name][:, :-1]
    model = make_classifier(PRESETS["H21"])
    with pytest.raises(ValueError, match=rf"{name} must have the shape of the input, \(6, 10\), got \(6, 9\)"):
        model(**batch)
    batch[name] = make_batch()[name]
    gradients(model, batch)  # and the next pass is not disturbed by the failed one
