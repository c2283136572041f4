"""Hyper-connected language models: the written-out formulas, no look ahead, generation, files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import xlayer_ext
from hyper_lm_tools import KINDS, LAYERS, STREAMS, VOCABULARY, gradients, make_batch, make_ids, make_model
from xlayer_ext import reference
from xlayer_systems.hyper_lm import RESIDUALS, HyperLMConfig, HyperTransformer, LanguageModel, sized
from xlrb_tools import one_thread


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


# ---- the formulas ----------------------------------------------------------------------------------------------------


def written_out_rotation(x: Tensor, base: float) -> Tensor:
    """Rotates ``x [B, S, heads, size]``, each pair of features (i, i + size/2) as one complex number."""
    size = x.shape[-1]
    turned = torch.empty_like(x)
    for s in range(x.shape[1]):
        for i in range(size // 2):
            angle = torch.tensor(s * base ** (-2 * i / size), dtype=x.dtype)
            a, b = x[:, s, :, i], x[:, s, :, i + size // 2]
            turned[:, s, :, i] = a * angle.cos() - b * angle.sin()
            turned[:, s, :, i + size // 2] = a * angle.sin() + b * angle.cos()
    return turned


def written_out_attention(attention: Any, x: Tensor, base: float) -> Tensor:
    heads, size = attention.num_heads, attention.head_size
    q, k, v = (part.unflatten(-1, (heads, size)) for part in (x @ attention.input.weight.T).chunk(3, -1))
    q, k = written_out_rotation(q, base), written_out_rotation(k, base)
    scores = torch.einsum("bshd,bthd->bhst", q, k) / size**0.5
    allowed = torch.ones(x.shape[1], x.shape[1]).tril().bool()
    shares = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return torch.einsum("bhst,bthd->bshd", shares, v).flatten(2) @ attention.output.weight.T


def written_out_mlp(mlp: Any, x: Tensor) -> Tensor:
    return F.gelu(x @ mlp.input.weight.T) @ mlp.output.weight.T


def written_out(model: HyperTransformer, ids: Tensor) -> Tensor:
    """Computes the model's logits, one sublayer after the other, with the unfused reference functions."""

    def norm(x: Tensor, module: Any) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], module.weight)

    config = model.config
    x = model.embedding.weight[ids]
    is_plain = config.residual == "plain"
    streams = x if is_plain else torch.stack([x] * config.expansion_rate, -2)
    for block in model.blocks:
        for part in ("attention", "mlp"):
            connection, module = getattr(block, f"{part}_connection"), getattr(block, part)
            read, coefficients = (streams, None) if is_plain else reference.hyper_pre(streams, connection.connection())
            normed = norm(read, getattr(block, f"{part}_norm"))
            y = (
                written_out_attention(module, normed, config.rope_base)
                if part == "attention"
                else written_out_mlp(module, normed)
            )
            streams = streams + y if is_plain else reference.hyper_post(streams, y, coefficients)
    if not is_plain:
        streams = streams.sum(-2) if config.reduce == "sum" else streams.mean(-2)
    return norm(streams, model.norm) @ model.embedding.weight.T


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_the_one_written_out(kind):
    model, ids = make_model(kind).double(), make_ids()
    actual, expected = model(ids), written_out(model, ids)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10 * expected.abs().max().item())
    (actual.square().mean()).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    (written_out(model, ids).square().mean()).backward()
    for name, parameter in model.named_parameters():
        scale = max(1e-3, parameter.grad.abs().max().item())
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-9 * scale, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("kind", ["shc", "dhc", "mhc"])
def test_every_kind_begins_as_the_plain_model(kind, reduce):
    """With the same seed all kinds have the same weights, and streams that are equal, so that their sum is n times the
    plain stream."""
    plain = make_model("plain", random=False).double()
    model = make_model(kind, random=False, reduce=reduce).double()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    seen = []
    for each in (plain, model):
        each.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        each(make_ids())
    factor = STREAMS if reduce == "sum" else 1
    torch.testing.assert_close(seen[1], factor * seen[0], rtol=1e-6, atol=1e-8)


def test_the_papers_rescaling_multiplies_the_output_projections():
    small, large = (
        make_model("dhc", random=False, rescale_outputs=choice, expansion_rate=4) for choice in (False, True)
    )
    for name, parameter in small.named_parameters():
        factor = 2 if name.endswith("output.weight") else 1
        torch.testing.assert_close(large.get_parameter(name), factor * parameter)
    plain = (make_model("plain", random=False, rescale_outputs=choice) for choice in (False, True))
    assert len({float(model.blocks[0].mlp.output.weight.detach().sum()) for model in plain}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_native_kernels_and_plain_pytorch_agree(kind):
    model, ids = make_model(kind).double(), make_ids()
    actual = model(ids)
    with xlayer_ext.backend("reference"):
        torch.testing.assert_close(actual, model(ids), rtol=1e-9, atol=1e-10)


# ---- what a causal model promises ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_no_look_ahead(kind):
    model, ids = make_model(kind).eval(), make_ids(2, 12)
    with torch.no_grad():
        before = model(ids)
        for t in (0, 4, 10):
            other = ids.clone()
            other[:, t + 1 :] = (ids[:, t + 1 :] + 7) % VOCABULARY
            after = model(other)
            assert torch.equal(before[:, : t + 1], after[:, : t + 1])
            assert not torch.equal(before[:, t + 1 :], after[:, t + 1 :])


@pytest.mark.parametrize("steps", [(1,) * 10, (4, 1, 1, 4), (3, 7)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_step_by_step_is_teacher_forced(kind, steps):
    model, ids = make_model(kind).eval(), make_ids(2, 10)
    past, logits = model.empty_past(), []
    with torch.no_grad():
        for part in ids.split(list(steps), 1):
            logits.append(model(part, past))
        torch.testing.assert_close(torch.cat(logits, 1), model(ids), rtol=1e-4, atol=1e-4)
    assert len(past[0]) == 10


@pytest.mark.parametrize("kind", ["plain", "dhc", "mhc"])
def test_greedy_generation_is_the_naive_loop(kind):
    model, ids = make_model(kind).double(), make_ids(3, 4)
    expected = ids
    for _ in range(8):
        expected = torch.cat([expected, model(expected)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(ids, 8), expected)
    assert model.training
    assert torch.equal(model.generate(ids, 0), ids)


def test_drawing_follows_its_options():
    model, ids = make_model("dhc").double(), make_ids(64, 4)
    draws = [
        model.generate(ids, 5, temperature=2.0, top_k=3, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    allowed = model(ids)[:, -1].topk(3).indices
    first = draws[0][:, 4:5]
    assert (allowed == first).any(1).all() and len({*(allowed == first).nonzero()[:, 1].tolist()}) == 3
    assert torch.equal(model.generate(ids, 5, temperature=1.0, top_k=1), model.generate(ids, 5))


def test_generation_ends_where_all_rows_have_ended():
    model, ids = make_model("shc").double(), make_ids(3, 4)
    free = model.generate(ids, 12)
    end = int(free[0, 6])
    ended = model.generate(ids, 12, end_id=end)
    for row, reference_row in zip(ended[:, 4:], free[:, 4:], strict=True):
        stops = (reference_row == end).nonzero().flatten().tolist()
        length = stops[0] + 1 if stops else 12
        assert torch.equal(row[:length], reference_row[:length]) and (row[length:] == end).all()
    alone = model.generate(ids[:1], 12, end_id=end)
    assert alone.shape[1] <= 7 and alone[0, -1] == end


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"top_k": 0}, "top_k"), ({"temperature": -1.0}, "temperature"), ({"max_new_tokens": -1}, "max_new_tokens")],
)
def test_generation_refuses_nonsense(arguments, message):
    with pytest.raises(ValueError, match=f"{message} must be at least"):
        make_model("plain").generate(make_ids(), **arguments)
    with pytest.raises(ValueError, match="S at least 1"):
        make_model("plain").generate(make_ids()[:, :0])


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_blocks_changes_no_gradient(kind):
    batch = make_batch()
    kept = gradients(make_model(kind, dropout=0.2), batch)
    model = make_model(kind, dropout=0.2)
    model.gradient_checkpointing_enable()
    recomputed = gradients(model, batch)
    assert kept.keys() == recomputed.keys()
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_recomputing_blocks_keeps_only_what_they_hand_on():
    def saved(recompute: bool) -> int:
        model, sizes = make_model("dhc"), []
        if recompute:
            model.gradient_checkpointing_enable()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            model(make_ids())
        return sum(sizes)

    assert saved(True) < saved(False) / 2


def test_the_loss_is_the_mean_over_predicted_tokens():
    model, batch = LanguageModel(make_model("dhc")), make_batch(2, 6)
    batch["labels"][0, 3:] = -100
    output = model(**batch)
    log_probabilities = model.model(batch["input_ids"]).log_softmax(-1)
    picked = -log_probabilities.gather(-1, batch["labels"].clamp(min=0)[..., None])[..., 0]
    predicted = batch["labels"] != -100
    torch.testing.assert_close(output.loss, picked[predicted].mean())
    torch.testing.assert_close(output.token_loss, picked * predicted)


def test_adjacent_inputs_are_compared_in_evaluation_only():
    model = LanguageModel(make_model("dhc"))
    batch = make_batch()
    model(**batch)
    assert model.usage() == {"similarity": {}}
    seen = []
    for block in model.model.blocks:
        for norm in (block.attention_norm, block.mlp_norm):
            norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model.eval()
    model(**batch)
    model.model.generate(batch["input_ids"], 2)  # is none of its business
    found = model.usage(reset=True)["similarity"]
    assert list(found) == [f"{i}.{part}" for i in range(LAYERS) for part in ("attention", "mlp")][1:]
    for index, value in enumerate(found.values(), start=1):
        cosine = F.cosine_similarity(seen[index], seen[index - 1], dim=-1).mean()
        assert value == pytest.approx(float(cosine), abs=1e-6)
    assert model.usage() == {"similarity": {}}


def test_weight_decay_is_for_matrices_and_dynamic_weights():
    for kind, dynamic in (
        ("plain", set()),
        ("shc", set()),
        ("dhc", {"dynamic_alpha", "dynamic_beta"}),
        ("mhc", {"phi"}),
    ):
        model = make_model(kind)
        decayed, others = model.parameter_groups(1e-3, 0.1)
        assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        grouped = [{names[id(parameter)] for parameter in group["params"]} for group in (decayed, others)]
        assert not grouped[0] & grouped[1] and grouped[0] | grouped[1] == set(names.values())
        assert {name.split(".")[-1] for name in grouped[0]} == {"weight"} | dynamic
        assert all("norm" in name for name in grouped[1] if name.endswith("weight"))
        assert "embedding.weight" in grouped[0]


def test_layers_of_gradients_hold_every_parameter_once():
    model = LanguageModel(make_model("mhc"))
    grouped = [id(parameter) for layer in model.gradient_groups().values() for parameter in layer]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())


# ---- files and settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_saved_models_come_back(tmp_path, kind):
    from safetensors.torch import load_file

    model = make_model(kind, dropout=0.1).eval()
    model.save_pretrained(tmp_path / "model")
    again = HyperTransformer.from_pretrained(tmp_path / "model").eval()
    assert again.config == model.config and torch.equal(again(make_ids()), model(make_ids()))
    saved = load_file(tmp_path / "model" / "hyper_lm.safetensors")
    assert saved.keys() == dict(model.named_parameters()).keys()  # no buffers, and the tied weight once
    assert sum(tensor.shape == (VOCABULARY, 16) for tensor in saved.values()) == 1


def test_what_cannot_be_loaded_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="no hyper_lm model in"):
        HyperTransformer.from_pretrained(tmp_path)
    make_model("shc").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "hyper_lm_config.json").read_text())
    for change, told in (({"hidden_size": 32}, "do not fit"), ({"colour": "red"}, "does not know: colour")):
        (tmp_path / "hyper_lm_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=told) as caught:
            HyperTransformer.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)


def test_the_embedding_makes_the_logits():
    model = make_model("dhc")
    assert [name for name, p in model.named_parameters() if VOCABULARY in p.shape] == ["embedding.weight"]
    with torch.no_grad():
        model.embedding.weight[5] = 0
    assert (model(make_ids())[..., 5] == 0).all()


def test_the_documented_constructor():
    model = HyperTransformer(vocab_size=60, hidden_size=32, num_layers=2, num_heads=2, expansion_rate=2, use_tanh=False)
    assert model(make_ids()).shape == (2, 9, 60) and model.config.residual == "dhc"
    assert HyperTransformer(60, 32, 2, 2, static_weights=True).config.residual == "shc"
    with torch.device("meta"):
        counts = {
            size: sum(p.numel() for p in HyperTransformer(50257, **_sizes(size)).parameters()) / 1e6
            for size in ("small", "base", "large")
        }
    assert counts == {
        "small": pytest.approx(124, abs=3),
        "base": pytest.approx(354, abs=4),
        "large": pytest.approx(984, abs=6),
    }


def _sizes(size: str) -> dict[str, int]:
    config = sized(size)
    return {name: getattr(config, name) for name in ("hidden_size", "num_layers", "num_heads")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"residual": "highway"}, "residual must be one of plain, shc, dhc, mhc, got 'highway'"),
        ({"expansion_rate": 0}, "expansion_rate must be at least 1, got 0"),
        ({"hidden_size": 30, "num_heads": 4}, "hidden_size must be a multiple of 2·num_heads = 8"),
        ({"dropout": 1.0}, "dropout must be at least 0 and less than 1"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        HyperLMConfig(**changes)
    assert set(RESIDUALS) == {"plain", "shc", "dhc", "mhc"}
