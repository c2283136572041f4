"""XLRB as a model: attaching, training, saving and usage metrics."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    GPT2Config,
    GPT2Model,
    XLMRobertaConfig,
    XLMRobertaModel,
)

import xlayer_ext
from xlayer_ext._backend import native_available
from xlayer_systems.xlrb import PRESETS, XLRBClassifier, attach, plot_usage
from xlrb_tools import (
    LAYERS,
    SIZES,
    config_without_dropout,
    gradients,
    make_batch,
    make_classifier,
    make_encoder,
    one_thread,
)

LAST = LAYERS - 1


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


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
        lambda: nn.Linear(2, 2),
    ],
    ids=["gpt2", "distilbert", "linear"],
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
    """Checkpointing changes no result with dropout everywhere and two passes open at once; the usage counts each pass
    once."""
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
    assert usages[0] == usages[1] and sum(usages[0]["layers"]["7"]["sources"]) == 12 * config.top_k


@pytest.mark.parametrize("id", ["H16", "A12"])
def test_a_dropped_pass_is_freed_at_once(id: str) -> None:
    """A dropped pass is freed at once: a recomputation's inputs must not refer to later layers, or its graph would
    never go."""
    model = make_classifier(PRESETS[id]).train()
    model.gradient_checkpointing_enable()
    outputs: list[weakref.ref] = []
    for layer in model.encoder.encoder.layer:
        layer.register_forward_hook(lambda _, args, output: outputs.append(weakref.ref(output)))
    gc.disable()
    try:
        model(**make_batch())
        assert len(outputs) == LAYERS and all(output() is None for output in outputs)
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_reentrant_checkpointing_is_refused() -> None:
    model = make_classifier(PRESETS["H9"])
    model.encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(**make_batch())


@pytest.mark.parametrize("id", ["H9", "A12", "H26"])
def test_autocast_trains_and_agrees(id: str) -> None:
    model = make_classifier(config_without_dropout(id))
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
        model = make_classifier(config_without_dropout("A12")).train()
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
    model = make_classifier(config_without_dropout("H16", entropy_weight=0.5), label_smoothing=0.2)
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
    with pytest.raises(ValueError, match=r"was made for a model with hidden_size 32, got 16$"):
        load(make_encoder(hidden_size=16))
    with pytest.raises(ValueError, match=r"was made for a model with model_type 'roberta', got 'bert'$"):
        load(make_encoder("bert"))
    settings = json.loads((tmp_path / "xlrb_config.json").read_text())
    settings["config"]["proj_dim"] = 16
    (tmp_path / "xlrb_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"do not fit their configuration: bridge\.hdim"):
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
