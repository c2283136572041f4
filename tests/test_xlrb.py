"""XLRB: the computation against a written-out one; masks, attaching, training, saving and usage metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaForMaskedLM,
    XLMRobertaConfig,
    XLMRobertaModel,
)

import xlayer_ext
from xlayer_ext._backend import native_available
from xlayer_systems.xlrb import PRESETS, XLRBClassifier, XLRBConfig, attach, plot_usage
from xlrb_tools import HEADS, HIDDEN, LAYERS, SIZES, gradients, make_batch, make_classifier, make_encoder, one_thread

LAST = LAYERS - 1


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def without_dropout(id: str, **changes) -> XLRBConfig:
    return replace(PRESETS[id], dropout=0.0, **changes)


def watch(model: XLRBClassifier, batch: dict[str, Tensor], layer: int = LAST) -> dict[str, Tensor]:
    """Runs `model` and returns the outputs of all layers, and of `layer`'s attention before and after the message."""
    seen: dict[str, Tensor] = {"layers": []}
    encoder = model.encoder
    attention = encoder.encoder.layer[layer].attention
    handles = [
        module.register_forward_hook(lambda _, args, output: seen["layers"].append(output))
        for module in encoder.encoder.layer
    ]
    handles.append(attention.output.register_forward_hook(lambda _, args, output: seen.update(before=output)))
    handles.append(attention.register_forward_hook(lambda _, args, output: seen.update(after=output[0])))
    seen["logits"] = model(**batch).logits
    for handle in handles:
        handle.remove()
    return seen


# ---- The published formulas, one number at a time ------------------------------------------------------------------


def written_out_route(model: XLRBClassifier, states: list[Tensor], b: int, real: list[int]) -> list[tuple[int, float]]:
    """Chosen source layers of example b with their weights, for the last layer."""
    router, config = model.bridge.router, model.config
    summaries = [sum(states[i][b, t] for t in real) / len(real) for i in range(LAST)]
    query = router.query.weight @ summaries[-1] + router.query.bias
    logits = [float(query @ (router.key.weight @ s + router.key.bias)) / config.route_temp for s in summaries]
    chosen = sorted(range(LAST), key=lambda i: -logits[i])[: config.topk]
    total = sum(math.exp(logits[i]) for i in chosen)
    return [(i, math.exp(logits[i]) / total) for i in chosen]


def written_out_hdim(hdim: nn.Module, hadamard: bool, target: Tensor, source: Tensor, real: list[int]) -> Tensor:
    """HDIM message to one token: `target` `[H]`, `source` `[S, H]`."""
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
    """QKV message from layer i to one token of the last layer, head by head."""
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
            assert len(chosen) == PRESETS[id].topk
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
    _, grads = gradients(make_classifier(without_dropout("H9", router_weight=weighting)), make_batch())
    router = [grad for name, grad in grads.items() if name.startswith("bridge.router.")]
    assert len(router) == 4
    # The bias of the key adds the same to every source's logit, so its gradient is zero either way.
    assert all(bool(grads[f"bridge.router.{name}"].any()) is learns for name in ("query.weight", "key.weight"))


@pytest.mark.parametrize(("position", "acts"), [("before_norm", False), ("after_norm", True)])
def test_a_gate_acts_behind_the_norm_only(position: str, acts: bool) -> None:
    model = make_classifier(without_dropout("H9", gate_position=position)).eval()
    with torch.no_grad():
        model.bridge.hdim[-1].alpha.fill_(100.0)  # a message whose variance is far above eps
        seen = watch(model, make_batch())
        model.bridge.layers[str(LAST)].blend.gates["hdim"].raw.mul_(2)
        doubled = watch(model, make_batch())
    ratio = (doubled["after"] - doubled["before"]).norm() / (seen["after"] - seen["before"]).norm()
    assert ratio.item() == pytest.approx(2.0 if acts else 1.0, rel=1e-2)


def test_message_norm_is_matched_to_the_attention_output() -> None:
    model = make_classifier(without_dropout("H26")).eval()
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
    model = XLRBClassifier(encoder, without_dropout("A13", route_last_n=9), 2)
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
    assert rows == [6 + count for count in chosen] and sum(chosen) == 6 * 4 * PRESETS[id].topk


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
        lambda _, args, kwargs: masks.append(kwargs["pair_mask"]), with_kwargs=True
    )
    ids, mask = torch.tensor([[0, 7, 2, 8, 2]]), torch.ones(1, 5)
    encoder(ids, mask, segment_ids=segments)
    first, second = [[0, 0, 0, 1, 1]], [[1, 1, 1, 0, 0]]
    assert masks[0].long().tolist() == [first * 3 + second * 2]
    bridge.remove()
    bridge = attach(encoder, PRESETS["H22"])
    bridge.hdim[0].register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["pair_mask"]), with_kwargs=True
    )
    encoder(ids, mask, segment_ids=segments)
    nothing = [0] * 5
    assert masks[1].long().tolist() == [[nothing, [0, 0, 0, 1, 0], nothing, [0, 1, 0, 0, 0], nothing]]


def test_without_a_partner_the_context_is_zero() -> None:
    """On single sentences the cross-sentence presets see nothing: the message depends on the target token alone."""
    model = make_classifier(without_dropout("H21")).eval()
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


# ---- Attaching -----------------------------------------------------------------------------------------------------


def test_remove_restores_the_encoder_to_the_bit() -> None:
    encoder, batch = make_encoder().eval(), make_batch()
    inputs = (batch["input_ids"], batch["attention_mask"])
    with torch.no_grad():
        before = encoder(*inputs).last_hidden_state
        bridge = attach(encoder, PRESETS["A12"])
        during = encoder(*inputs).last_hidden_state
        bridge.remove()
        after = encoder(*inputs).last_hidden_state
    assert torch.equal(before, after) and not torch.equal(before, during)


@pytest.mark.parametrize("kind", ["bert", "electra", "xlm-roberta"])
def test_relatives_attach_and_train(kind: str) -> None:
    makers = {
        "bert": lambda: make_encoder("bert"),
        "electra": lambda: ElectraModel(ElectraConfig(**SIZES, embedding_size=16)),
        "xlm-roberta": lambda: XLMRobertaModel(XLMRobertaConfig(**SIZES)),
    }
    batch, model = make_batch(), XLRBClassifier(makers[kind](), PRESETS["A12"], 2)
    gradients_of_step = torch.autograd.grad(model(**batch).loss, list(model.bridge.parameters()))
    assert any(grad.any() for grad in gradients_of_step)


def test_bert_gets_token_types() -> None:
    model = XLRBClassifier(make_encoder("bert"), None, 2)
    seen = []
    model.encoder.embeddings.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["token_type_ids"]), with_kwargs=True
    )
    segments = torch.tensor([[-1, 0, -1, 1, -1, -1]])
    model(torch.tensor([[0, 7, 2, 8, 2, 1]]), torch.tensor([[1, 1, 1, 1, 1, 0]]), segments)
    assert seen[0].tolist() == [[0, 0, 0, 1, 1, 0]]


@pytest.mark.parametrize(
    "encoder",
    [
        lambda: GPT2Model(GPT2Config(vocab_size=10, n_embd=8, n_layer=2, n_head=2)),
        lambda: DistilBertModel(DistilBertConfig(vocab_size=10, dim=8, n_layers=2, n_heads=2, hidden_dim=8)),
        lambda: RobertaForMaskedLM(RobertaConfig(**SIZES)),
        lambda: nn.Linear(2, 2),
    ],
    ids=["gpt2", "distilbert", "task head", "linear"],
)
def test_other_structures_are_refused(encoder) -> None:
    with pytest.raises(ValueError, match=r"^XLRB attaches to a RoBERTa/BERT-like encoder: [^\n]*; got \w+$"):
        attach(encoder(), PRESETS["H9"])


def test_a_second_bridge_and_a_single_layer_are_refused() -> None:
    encoder = make_encoder()
    attach(encoder, PRESETS["H9"]).remove()
    attach(encoder, PRESETS["H9"])
    with pytest.raises(ValueError, match="has an XLRB bridge already"):
        attach(encoder, PRESETS["H9"])
    with pytest.raises(ValueError, match="at least 2 layers, got 1"):
        attach(make_encoder(num_hidden_layers=1), PRESETS["H9"])


# ---- Training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", ["H9", "H16", "A12", "A2"])
def test_gradient_checkpointing_changes_nothing(id: str) -> None:
    """With dropout everywhere, and with two passes open at once; the usage counts each pass once."""
    config = replace(PRESETS[id], router_weight="full_softmax")
    batches = make_batch(seed=3), make_batch(seed=4)
    results = []
    for checkpointing in (False, True):
        model = make_classifier(config, dropout=0.1).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        (model(**batches[0]).loss + model(**batches[1]).loss).backward()
        results.append(
            {name: parameter.grad for name, parameter in model.named_parameters()} | {"usage": model.usage()}
        )
    usages = [result.pop("usage") for result in results]
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad, rtol=1e-5, atol=1e-7, msg=name)
    assert usages[0] == usages[1] and sum(usages[0]["layers"]["7"]["sources"]) == 12 * config.topk


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_reentrant_checkpointing_is_refused() -> None:
    model = make_classifier(PRESETS["H9"])
    model.encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(**make_batch())


@pytest.mark.parametrize("id", ["H9", "A12", "H26"])
def test_autocast_trains_and_agrees(id: str) -> None:
    model = make_classifier(without_dropout(id))
    expected, _ = gradients(model, make_batch())
    model.gradient_checkpointing_enable()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**make_batch()).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=0.05)


@pytest.mark.skipif(not native_available(), reason="the native library is not built")
def test_native_and_reference_give_the_same_loss_curve() -> None:
    curves = []
    for name in ("native", "reference"):
        model = make_classifier(without_dropout("A12")).train()
        optimizer = torch.optim.AdamW(model.parameter_groups(1e-4, 1e-3))
        curves.append([])
        with xlayer_ext.backend(name):
            for number in range(20):
                optimizer.zero_grad()
                loss = model(**make_batch(seed=number)).loss
                loss.backward()
                optimizer.step()
                curves[-1].append(loss.item())
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_loss_is_smoothed_cross_entropy_plus_weighted_entropy() -> None:
    batch = make_batch()
    model = make_classifier(without_dropout("H16", entropy_weight=0.5), label_smoothing=0.2)
    entropies = []
    for hdim in model.bridge.hdim:
        hdim.register_forward_hook(lambda _, args, output: entropies.append(output[1]))
    output = model(**batch)
    log_probability = output.logits.log_softmax(-1)
    picked = log_probability[torch.arange(6), batch["labels"]]
    expected = -(0.8 * picked + 0.2 * log_probability.mean(-1)).mean() + 0.5 * sum(entropies) / 4
    assert len(entropies) == 4 and all(0 < entropy < 3 for entropy in entropies)
    torch.testing.assert_close(output.loss, expected)
    assert model(**{name: value for name, value in batch.items() if name != "labels"}).loss is None


def test_parameter_groups_hold_every_parameter_once() -> None:
    model = make_classifier(PRESETS["A11"])
    groups = {group["name"]: group for group in model.parameter_groups(1.5e-5, 3e-4, weight_decay=0.01)}
    listed = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert sorted(listed) == sorted(id(parameter) for parameter in model.parameters())
    assert {name: group["lr"] for name, group in groups.items() if not name.endswith("_no_decay")} == {
        "encoder": 1.5e-5, "bridge": 1.5e-5, "head": 3e-4}  # fmt: skip
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, group in groups.items():
        assert group["weight_decay"] == (0.0 if name.endswith("_no_decay") else 0.01)
        plain = [any(part in names[id(p)] for part in ("bias", "LayerNorm", "norm", "head.0")) for p in group["params"]]
        assert all(plain) if name.endswith("_no_decay") else not any(plain)
    rates = {group["lr"] for group in model.parameter_groups(1e-5, 3e-4, 2e-4) if group["name"].startswith("bridge")}
    assert rates == {2e-4}


# ---- Saving and watching -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("include_encoder", [False, True])
@pytest.mark.parametrize("id", ["A1", "H30", None])
def test_save_and_load(tmp_path: Path, id: str | None, include_encoder: bool) -> None:
    config = None if id is None else PRESETS[id]
    model, batch = make_classifier(config, label_smoothing=0.1).eval(), make_batch()
    model.save_pretrained(tmp_path, include_encoder=include_encoder)
    loaded = XLRBClassifier.from_pretrained(tmp_path, make_encoder(seed=9 if include_encoder else 0), config).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).loss, model(**batch).loss)
    assert loaded.config == config
    saved = load_file(tmp_path / "xlrb.safetensors")
    assert any(name.startswith("encoder.") for name in saved) is include_encoder


def test_loading_something_else_is_refused_in_one_line(tmp_path: Path) -> None:
    make_classifier(PRESETS["H9"]).save_pretrained(tmp_path)

    def load(*args, **kwargs) -> None:
        XLRBClassifier.from_pretrained(tmp_path, *args, **kwargs)

    with pytest.raises(ValueError, match=r"^the checkpoint has another XLRB config: proj_dim=24 \(asked for 32\)"):
        load(make_encoder(), PRESETS["H1"])
    with pytest.raises(ValueError, match=r"^the checkpoint needs a backbone with hidden_size 32, got 16$"):
        load(make_encoder(hidden_size=16))
    with pytest.raises(ValueError, match=r"^the checkpoint needs a backbone with model_type 'roberta', got 'bert'$"):
        load(make_encoder("bert"))
    settings = json.loads((tmp_path / "xlrb_config.json").read_text())
    settings["config"]["proj_dim"] = 16
    (tmp_path / "xlrb_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"do not fit their config: bridge\.hdim"):
        load(make_encoder())
    with pytest.raises(ValueError, match=r"xlrb_config\.json, xlrb\.safetensors missing$"):
        XLRBClassifier.from_pretrained(tmp_path / "nowhere", make_encoder())


def test_usage_is_what_a_hand_computes() -> None:
    model = make_classifier(PRESETS["A12"]).eval()
    router, blend = model.bridge.router, model.bridge.layers[str(LAST)].blend
    messages, logits, choices = [], [], []
    blend.register_forward_pre_hook(lambda _, args: messages.append(args[0]))
    select = router.select
    router.select = lambda scores: (logits.append(scores), choices.append(select(scores)))[0] or choices[-1]
    batches = make_batch(seed=1), make_batch(size=4, seed=2)
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    masks = [batch["attention_mask"].bool() for batch in batches]
    usage = json.loads(json.dumps(model.usage()))["layers"][str(LAST)]
    last_logits = torch.cat([logits[3], logits[7]]).softmax(-1)
    picked = torch.cat([choices[3][0], choices[7][0]]).flatten().tolist()
    assert usage["sources"] == [picked.count(source) for source in range(LAST)]
    assert usage["router_entropy"] == pytest.approx(-(last_logits * last_logits.log()).sum(-1).mean().item(), rel=1e-5)
    for kind, gate in (("attn", 0.15), ("hdim", 0.05)):
        real = torch.cat([message[kind][mask] for message, mask in zip(messages, masks, strict=True)])
        assert usage[f"gate_{kind}"] == pytest.approx(gate)
        assert usage[f"norm_{kind}"] == pytest.approx(real.norm(dim=-1).mean().item(), rel=1e-5)
        variance = real.var(-1, unbiased=False).mean().item()
        assert usage[f"gate_variance_over_eps_{kind}"] == pytest.approx(gate**2 * variance / 1e-5, rel=1e-5)
    empty = model.usage()["layers"][str(LAST)]
    assert sum(empty["sources"]) == 0 and empty["norm_attn"] is None and empty["gate_attn"] == usage["gate_attn"]


@pytest.mark.parametrize("id", ["H9", "A12"])
def test_usage_plot(tmp_path: Path, id: str) -> None:
    model = make_classifier(PRESETS[id])
    history = []
    for seed in range(3):
        model(**make_batch(seed=seed))
        history.append(model.usage())
    plot_usage(history, tmp_path / "usage.png")
    assert (tmp_path / "usage.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="at least one"):
        plot_usage([make_classifier(None).usage()], tmp_path / "none.png")
