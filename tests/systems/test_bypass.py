"""The bypass on tiny random models: what it computes, that it never looks ahead, caches, files, sizes, components."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, T5Config, T5Model
from transformers.cache_utils import DynamicCache

from bypass_tools import DECODERS, ENCODER, LAYERS, PAD, WIDTH, make_bypass, make_ids, make_model, output
from xlayer_systems.bypass import BypassConfig, attach, reconstruction
from xlayer_systems.bypass.caches import Companion
from xlayer_systems.bypass.model import WEIGHTS_FILE, Bypass
from xlayer_systems.bypass.reconstruction import principal_directions, r2_per_layer, spread
from xlayer_systems.bypass.report import format_reconstruction
from xlayer_systems.bypass.task import compare, matching_rank
from xlayer_systems.hf.pretrained import weights_fingerprint

VARIANTS = ("full", "offset")
KINDS = (*DECODERS, ENCODER)


# ---- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_bypass_changes_no_bit(kind: str, variant: str) -> None:
    model, ids = make_model(kind), make_ids()
    before = output(model, ids)
    bypass = attach(model, latent=6, variant=variant)
    assert torch.equal(output(model, ids), before)
    torch.nn.init.normal_(bypass.projectors)
    assert (output(model, ids) - before).abs().max() > 0.1
    bypass.remove()
    assert torch.equal(output(model, ids), before)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_biases_and_where_they_go(kind: str, variant: str) -> None:
    model, ids = make_model(kind), make_ids()
    layers = LAYERS if variant == "full" else LAYERS - 1
    bypass = make_bypass(model, variant=variant)
    states = collected(bypass, model, ids)
    biases = naive_biases(bypass, states)
    assert biases.shape == (layers, *ids.shape, WIDTH)
    found, _ = bypass(states)
    torch.testing.assert_close(found.double(), biases, rtol=1e-4, atol=1e-4)
    modified = output(model, ids)
    bypass.remove()
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, b=bias: (args[0] + b.float(), *args[1:]))
        for layer, bias in zip(layer_list(model), biases, strict=False)
    ]
    torch.testing.assert_close(output(model, ids), modified, rtol=1e-3, atol=1e-3)
    for hook in hooks:
        hook.remove()


def layer_list(model: Any) -> Any:
    stack = model.base_model
    return stack.h if hasattr(stack, "h") else stack.layers if hasattr(stack, "layers") else stack.encoder.layer


def collected(bypass: Bypass, model: Any, ids: Tensor) -> Tensor:
    """Collects the outputs of the unmodified model's layers by hooks of the test's own, as `collect` does."""
    found: list[Tensor] = []
    projectors = bypass.projectors.detach().clone()
    with torch.no_grad():
        bypass.projectors.zero_()
        hooks = [
            layer.register_forward_hook(lambda _, args, out: found.append(out[0] if isinstance(out, tuple) else out))
            for layer in layer_list(model)
        ]
        output(model, ids)
        bypass.projectors.copy_(projectors)
    for hook in hooks:
        hook.remove()
    states = torch.stack(found[-LAYERS:], dim=2)
    assert torch.equal(bypass.collect(input_ids=ids), states)
    return states


def naive_biases(bypass: Bypass, states: Tensor) -> Tensor:
    """Computes the formula of the module's docstring, one layer and one token after the other."""
    states, encoder, projectors = states.double(), bypass.encoder.double(), bypass.projectors.double()
    mean, scale, offset = bypass.mean.double(), bypass.scale.double(), bypass.config.offset
    read = bypass.input_scale.double()
    biases = torch.zeros(len(bypass.targets), *states.shape[:2], states.shape[-1], dtype=torch.float64)
    for t in range(states.shape[1]):
        source = t - 1 if bypass.is_causal else t
        if source < 0:
            continue
        parts = [((states[:, source, i] - mean[i]) / scale[i]) @ encoder[i] for i in range(LAYERS)]
        for row, layer in enumerate(bypass.targets):
            latent = sum(parts) if bypass.config.variant == "full" else parts[layer + offset]
            biases[row, :, t] = read[layer] * (latent @ projectors[row])
    return biases.detach()


def test_a_head_that_calls_an_inner_model() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 48, "vocab_size": 60}
    config = OPTConfig(
        num_hidden_layers=LAYERS, num_attention_heads=4, max_position_embeddings=64, init_std=0.3, **sizes
    )
    model, ids = OPTForCausalLM(config).eval(), make_ids()  # its forward passes by the one of its base model
    before = output(model, ids)
    bypass = make_bypass(model, scale=0.0)
    assert torch.equal(output(model, ids), before)
    torch.nn.init.normal_(bypass.projectors)
    assert (output(model, ids) - before).abs().max() > 0.1
    states = torch.randn(1, 3, WIDTH)
    refused("the layers ran without the forward pass of OPTDecoder", lambda: model.model.decoder.layers[0](states))


def test_only_the_chosen_layers_get_a_bias() -> None:
    model, ids = make_model("llama"), make_ids()
    bypass = make_bypass(model, layers=(2,))
    seen: list[Tensor] = []
    hook = layer_list(model)[1].register_forward_hook(lambda _, args, out: seen.append(out))
    output(model, ids)
    hook.remove()
    assert bypass.projectors.shape[0] == 1
    assert torch.equal(seen[0], seen[1])  # of the two passes: layer 1 comes before any bias


def test_statistics_and_standardized_states() -> None:
    model, ids = make_model("llama"), make_ids(8)
    bypass = attach(model, latent=6)
    mask = torch.ones_like(ids)
    mask[2:4, 7:] = 0
    bypass.calibrate([{"input_ids": ids[:4], "attention_mask": mask[:4]}, {"input_ids": ids[4:]}])
    kept = bypass.collect(input_ids=ids, attention_mask=mask)[mask.bool()]
    embedded = model.get_input_embeddings()(ids)[mask.bool()]
    torch.testing.assert_close(bypass.mean, kept.mean(0), rtol=1e-4, atol=1e-5)
    made = bypass.standardize(kept)
    torch.testing.assert_close(made.square().mean((0, 2)), torch.ones(LAYERS), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.mean(0), torch.zeros(LAYERS, WIDTH), rtol=0, atol=1e-5)
    read = (embedded - embedded.mean(0)).square().mean().sqrt()
    torch.testing.assert_close(bypass.input_scale, torch.stack([read, *bypass.scale[:-1]]), rtol=1e-4, atol=1e-5)
    refused("at least one token", lambda: bypass.calibrate([]))


def test_stages_train_what_they_should() -> None:
    first = attach(make_model("llama"), latent=6, stage="reconstruct")
    assert {n for n, p in first.named_parameters() if p.requires_grad} == {"encoder", "projectors"}
    assert not first.injects and first.projectors.abs().sum() > 0
    model = make_model("llama")
    second = attach(model, latent=6)
    assert {n for n, p in second.named_parameters() if p.requires_grad} == {"projectors"}
    output(model, make_ids()).square().mean().backward()
    assert second.projectors.grad is not None and bool(second.projectors.grad.abs().amax((1, 2)).min() > 0)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


# ---- no look ahead ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", DECODERS)
def test_later_tokens_change_no_bit_before_them(kind: str, variant: str) -> None:
    model, ids = make_model(kind), make_ids()
    make_bypass(model, variant=variant)
    before = output(model, ids)
    for t in range(1, ids.shape[1]):
        changed = ids.clone()
        changed[:, t:] = (changed[:, t:] - 2) % (ids.max() - 3) + 3
        after = output(model, changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t:], before[:, t:])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("steps", [(1,) * 10, (4, 1, 3, 2)], ids=str)
def test_step_by_step_is_teacher_forced(kind: str, variant: str, steps: tuple[int, ...]) -> None:
    model, ids = make_model(kind), make_ids()
    make_bypass(model, variant=variant)
    expected, cache, found = output(model, ids), None, []
    for part in ids.split(list(steps), dim=1):
        made = model(part, past_key_values=cache, use_cache=True)
        cache = made.past_key_values
        found.append(made.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", DECODERS)
def test_generate_takes_the_likeliest_tokens(kind: str) -> None:
    model, ids = make_model(kind), make_ids()
    unmodified = model.generate(ids, max_new_tokens=8, do_sample=False)
    make_bypass(model)
    made = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(output(model, made)[:, 9:-1].argmax(-1), made[:, 10:])
    assert not torch.equal(made, unmodified)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False), made)


@pytest.mark.parametrize("kind", DECODERS)
def test_beam_search_scores_what_the_model_says(kind: str) -> None:
    model, ids = make_model(kind), make_ids()
    make_bypass(model)
    kept = {"return_dict_in_generate": True, "output_scores": True}
    made = model.generate(ids, max_new_tokens=6, num_beams=4, do_sample=False, **kept)
    chosen = torch.log_softmax(output(model, made.sequences), -1)[:, 9:-1].gather(-1, made.sequences[:, 10:, None])
    torch.testing.assert_close(chosen[..., 0].sum(-1) / 6, made.sequences_scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", DECODERS)
def test_padding_on_the_left_changes_nothing(kind: str) -> None:
    model, ids = make_model(kind), make_ids(1)
    make_bypass(model)
    padded = torch.cat([torch.full((1, 4), PAD), ids], 1)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    mask = (padded != PAD).long()
    made = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(made[:, 14:], expected[:, 10:])


@torch.no_grad()
def test_a_cache_can_be_copied_cropped_and_repeated() -> None:
    model, ids = make_model("llama"), make_ids()
    make_bypass(model)
    expected = output(model, ids)
    cache = model(ids[:, :6], use_cache=True).past_key_values
    assert len(cache.layers) == 2 * LAYERS + 1
    copied = copy.deepcopy(cache)
    model(ids[:, 6:7], past_key_values=cache)
    for kept in (copied, cache):
        if kept is cache:
            kept.crop(-1)
        found = model(ids[:, 6:], past_key_values=kept).logits
        torch.testing.assert_close(found, expected[:, 6:], rtol=1e-4, atol=1e-4)
    repeated = model(ids[:, :6], use_cache=True).past_key_values
    repeated.batch_repeat_interleave(2)
    found = model(ids[:, 6:].repeat_interleave(2, 0), past_key_values=repeated).logits
    torch.testing.assert_close(found, expected[:, 6:].repeat_interleave(2, 0), rtol=1e-4, atol=1e-4)


def test_an_encoder_gets_the_bias_of_its_own_token() -> None:
    model, ids = make_model(ENCODER), make_ids()
    bypass = make_bypass(model)
    assert not bypass.is_causal
    _, latents = bypass(bypass.collect(input_ids=ids))
    found, _ = bypass(bypass.collect(input_ids=ids))
    assert torch.equal(found, bypass.project(latents)) and bool((found[:, :, 0].abs() > 0).any())
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    cut = output(model, ids[:1, :7])
    torch.testing.assert_close(output(model, ids, attention_mask=mask)[:1, :7], cut, rtol=1e-4, atol=1e-4)


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused(message: str, action: Any) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        action()
    assert "\n" not in str(caught.value)


def test_wrong_settings_and_models_are_refused() -> None:
    model = make_model("llama")
    refused("latent must be at least 1, got 0", lambda: BypassConfig(latent=0))
    refused("variant must be one of full, offset, got 'half'", lambda: attach(model, variant="half"))
    refused("attach has no option colour", lambda: attach(model, colour="red"))
    refused("offset must be below the model's 3 layers, got 3", lambda: attach(model, variant="offset", offset=3))
    refused("layers must be different numbers from 0 to 2, got \\[1, 3\\]", lambda: attach(model, layers=(1, 3)))
    refused(
        "layers must be different numbers from 0 to 1, got \\[2\\]",
        lambda: attach(model, variant="offset", layers=(2,)),
    )
    sizes: dict[str, Any] = {"d_model": 16, "d_ff": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "vocab_size": 20}
    refused("an encoder or a decoder of Hugging Face; got T5Model", lambda: attach(T5Model(T5Config(**sizes))))
    refused("one list of 4 layers in LlamaModel; found none", lambda: attach(deeper()))
    attach(model, latent=4)
    refused("has a bypass already", lambda: attach(model, latent=4))


def deeper() -> Any:
    model = make_model("llama")
    model.config.num_hidden_layers = 4
    return model


def test_what_cannot_be_exact_is_refused() -> None:
    model, ids = make_model("llama"), make_ids()
    cache = model(ids, use_cache=True).past_key_values
    bypass = make_bypass(model)
    refused("filled without the bypass", lambda: model(ids, past_key_values=cache))
    model.train().gradient_checkpointing_enable()
    refused("gradient checkpointing", lambda: model(ids))
    model.eval()
    assert output(model, ids).isfinite().all()  # a refused forward pass leaves nothing behind
    bypass.remove()
    assert Companion.of(DynamicCache()).last is None


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_and_loaded(tmp_path: Path, variant: str) -> None:
    model, ids = make_model("llama"), make_ids()
    bypass = make_bypass(model, variant=variant, layers=(0, 1))
    expected = output(model, ids)
    bypass.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"bypass.json", "bypass.safetensors"}
    size = 4 * sum(t.numel() for t in bypass.state_dict().values())
    assert size < (tmp_path / WEIGHTS_FILE).stat().st_size < size + 1000  # nothing of the model is in it
    other = make_model("llama")
    loaded = Bypass.from_pretrained(other, tmp_path)
    assert torch.equal(output(other, ids), expected)
    assert loaded.config == bypass.config


def test_an_encoder_is_taken_over(tmp_path: Path) -> None:
    first = make_bypass(make_model("llama"), stage="reconstruct")
    first.save_pretrained(tmp_path)
    model, ids = make_model("llama"), make_ids()
    before = output(model, ids)
    second = attach(model, latent=6, encoder=str(tmp_path))
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("encoder", "mean", "scale"))
    assert not second.encoder.requires_grad and torch.equal(output(model, ids), before)
    refused(
        "made with latent 6, this bypass has 5", lambda: attach(make_model("llama"), latent=5, encoder=str(tmp_path))
    )


def test_another_model_is_refused(tmp_path: Path) -> None:
    make_bypass(make_model("llama")).save_pretrained(tmp_path)
    for model, message in (
        (make_model("gpt2"), "made for a model with model_type 'llama', got 'gpt2'"),
        (make_model("llama", width=16), "made for a model with hidden_size 32, got 16"),
        (make_model("llama", seed=5), "made for a model with fingerprint"),
    ):
        before = output(model, make_ids())
        refused(message, lambda m=model: Bypass.from_pretrained(m, tmp_path))
        assert torch.equal(output(model, make_ids()), before)
        attach(model, latent=3)  # nothing of the refused one is left on it
    refused(
        "bypass.json, bypass.safetensors missing", lambda: Bypass.from_pretrained(make_model("llama"), tmp_path / "x")
    )


def test_the_fingerprint_is_of_the_weights_not_of_their_dtype() -> None:
    model = make_model("llama").bfloat16()

    def fingerprint(model: Any) -> str:
        return weights_fingerprint(model.named_parameters(), 64)

    assert fingerprint(model) == fingerprint(copy.deepcopy(model).float()) != fingerprint(make_model("gpt2"))
    ids = make_ids()
    make_bypass(model, scale=0.1)
    assert output(model, ids).dtype == torch.bfloat16


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_share_of_the_parameters_of_a_model_of_1_billion(capsys: pytest.CaptureFixture[str]) -> None:
    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    shares = {}
    for stage in ("reconstruct", "task"):
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        base = sum(p.numel() for p in model.parameters())
        assert 1.2e9 < base < 1.3e9
        bypass = attach(model, BypassConfig(), stage=stage)
        trained = sum(p.numel() for p in bypass.parameters() if p.requires_grad)
        shares[stage] = trained / base
        assert trained == 16 * 256 * 2048 * (2 if stage == "reconstruct" else 1)
        print(f"{stage}: {trained:,} of {base:,} parameters, {100 * shares[stage]:.2f} %")
    assert shares["task"] < 0.01
    assert "reconstruct: 16,777,216 of 1,235,814,400 parameters, 1.36 %" in capsys.readouterr().out


@pytest.mark.parametrize("kind", DECODERS)
def test_an_adapter_of_the_same_size(kind: str) -> None:
    pytest.importorskip("peft")
    from xlayer_systems.bypass import AdapterConfig
    from xlayer_systems.bypass.task import build_adapter

    model, ids = make_model(kind), make_ids()
    before = output(model, ids)
    rank = matching_rank(model, 64)
    adapted = build_adapter(model, AdapterConfig(latent=64))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    wanted = LAYERS * 64 * WIDTH
    assert abs(trained - wanted) <= trained / rank  # no other rank is nearer
    assert torch.equal(output(adapted, ids), before)
    assert matching_rank(make_model(kind), 1) == 1


# ---- principal components and intervals ------------------------------------------------------------------------------


def test_principal_directions_by_either_gram_matrix() -> None:
    torch.manual_seed(0)
    for shape in ((40, 12), (12, 40)):
        x = torch.randn(shape, dtype=torch.float64) * torch.linspace(1, 3, shape[1], dtype=torch.float64)
        expected = torch.linalg.svd(x, full_matrices=False).Vh[:5]
        found = principal_directions(x, 5)
        torch.testing.assert_close(found @ found.T, expected.T @ expected, rtol=1e-8, atol=1e-8)


def test_principal_directions_of_many_tokens_and_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by random ones they keep what the exact ones keep, and are the same every time."""
    torch.manual_seed(0)
    states = torch.randn(400, 300) * torch.linspace(0.1, 3, 300) ** 2
    exact = principal_directions(states, 20).to(states)
    monkeypatch.setattr(reconstruction, "MAX_EXACT", 100)
    before = torch.get_rng_state()
    found = principal_directions(states, 20)
    assert torch.equal(found, principal_directions(states, 20)) and torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(found.T @ found, torch.eye(20), rtol=0, atol=1e-5)
    assert (states @ found).square().sum() > 0.999 * (states @ exact).square().sum()


def test_r2_per_layer() -> None:
    states = torch.tensor([[[0.0, 0.0], [1.0, 1.0]], [[2.0, 2.0], [3.0, 5.0]]])
    assert r2_per_layer(states, states) == [1.0, 1.0]
    assert r2_per_layer(states, states.mean(0).expand_as(states)) == [0.0, 0.0]
    worse = states.clone()
    worse[0, 1, 0] += 1  # error 1, deviations 2·1 + 2·4 = 10
    assert r2_per_layer(states, worse) == pytest.approx([1.0, 0.9])


def test_many_layers_are_listed_one_below_the_other() -> None:
    few = format_reconstruction({"r2": [0.5] * 8})
    assert few[0].split() == ["layer", *map(str, range(8)), "mean"]
    many = format_reconstruction({"r2": [0.5] * 30, "pca": [0.75] * 30, "latent": 12})
    assert len(many) == 32 and max(map(len, many)) < 80
    assert many[30].split() == ["29", "0.5000", "0.7500", "0.6667"] and many[31].split()[0] == "mean"


def test_spread_blocks_do_not_depend_on_a_seed() -> None:
    blocks = list(torch.arange(100).repeat_interleave(11).view(100, 11))
    assert [int(block[0]) for block in spread(blocks, 40)] == [0, 25, 50, 75]
    assert len(spread(blocks, 10**6)) == 100


def test_compared_losses_are_paired() -> None:
    base = [3.0, 4.0, 5.0, 6.0]
    found = compare({"base": base, "a": [x - 0.1 for x in base], "b": [x + 0.2 for x in base]}, "base")
    assert "difference" not in found["rows"]["base"]
    difference = found["rows"]["a"]["difference"]
    assert difference["low"] == pytest.approx(-0.1) and difference["high"] == pytest.approx(-0.1)
    assert found["between"]["names"] == ["a", "b"] and found["between"]["mean"] == pytest.approx(-0.3)
    assert found["rows"]["a"]["loss"]["high"] - found["rows"]["a"]["loss"]["low"] > 1
    assert dataclasses.asdict(BypassConfig(layers=[1, 2]))["layers"] == (1, 2)  # type: ignore[arg-type]
