"""Hyper-connections attached to Hugging Face decoders."""

from __future__ import annotations

import copy
import doctest
import importlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.utils.dataclasses import get_module_class_from_name
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from processes import join_processes
from xlayer_ext.testing import relative_error
from xlayer_systems.hyper_lm import HyperAttachment, attach
from xlrb_tools import one_thread

VOCABULARY, LAYERS, TOKENS = 50, 3, 10
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT2_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
RESIDUALS = ("shc", "dhc", "mhc")
KINDS = ("llama", "qwen2", "gpt2")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def make_model(kind: str, seed: int = 0) -> Any:
    """Makes a random decoder whose sublayers matter: weights are wider than Hugging Face draws them."""
    torch.manual_seed(seed)
    made: dict[str, Any] = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZES)),
    }
    model = made[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = None
    return model.eval()


def make_tokens(batch: int = 2, tokens: int = TOKENS, seed: int = 3) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def randomize(handle: nn.Module, seed: int = 5) -> None:
    """Draws coefficients far from the identity, different in every stream, layer and token."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in handle.named_parameters():
            step = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("scale"):
                step = step + 0.5
            parameter += step.to(parameter.dtype)


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    logits: Tensor = model(tokens, **options).logits
    return logits


# ---- The start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_it_starts_as_the_model_it_was(kind: str, residual: str, n: int) -> None:
    model, tokens = make_model(kind), make_tokens()
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0  # padding on the left
    before, masked = logits_of(model, tokens), logits_of(model, tokens, attention_mask=mask)
    attach(model, residual, expansion_rate=n)
    torch.testing.assert_close(logits_of(model, tokens), before, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        logits_of(model, tokens, attention_mask=mask)[mask.bool()], masked[mask.bool()], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_starts_as_it_was(kind: str, residual: str) -> None:
    model, tokens = make_model(kind), make_tokens(tokens=4)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)}
    expected = model.generate(tokens, **options)
    attach(model, residual)
    assert torch.equal(model.generate(tokens, **options), expected) and expected.shape == (2, 12)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_sublayers_and_streams_part_in_training(residual: str) -> None:
    """Streams get different gradients in training; were they alike to every sublayer, they would stay copies of each
    other."""
    model, tokens = make_model("llama"), make_tokens()
    handle = attach(model, residual)
    seen: list[Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.model.layers[-1].register_forward_hook(lambda _, args, output: seen.append(output[0]))
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.5)
    for _ in range(4):
        optimizer.zero_grad()
        seen.clear()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    streams = seen[0]
    assert (streams - streams.mean(2, keepdim=True)).abs().max() > 1e-4


# ---- Random coefficients ---------------------------------------------------------------------------------------------


def written_out(model: Any, handle: Any, tokens: Tensor) -> Tensor:
    """Computes the Llama model's logits with hyper-connections, one sublayer after another."""
    decoder = model.model
    h = decoder.embed_tokens(tokens).unsqueeze(2).repeat(1, 1, handle.config.expansion_rate, 1)
    positions = torch.arange(tokens.shape[1]).unsqueeze(0)
    rotary = decoder.rotary_emb(h, position_ids=positions)
    for layer, own in zip(decoder.layers, handle.layers, strict=True):
        x, c = own["attention"].pre(h)
        y, _ = layer.self_attn(layer.input_layernorm(x), position_embeddings=rotary, attention_mask=None)
        h = own["attention"].post(h, y, c)
        x, c = own["mlp"].pre(h)
        h = own["mlp"].post(h, layer.mlp(layer.post_attention_layernorm(x)), c)
    return model.lm_head(decoder.norm(h.mean(2)))


@pytest.mark.parametrize("residual", RESIDUALS)
def test_logits_are_the_written_out_ones(residual: str) -> None:
    model, tokens = make_model("llama").double(), make_tokens()
    handle = attach(model, residual, expansion_rate=3)
    randomize(handle)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(model, tokens), written_out(model, handle, tokens))


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_token_sees_later_ones(kind: str, residual: str) -> None:
    model, tokens = make_model(kind), make_tokens()
    randomize(attach(model, residual))
    before = logits_of(model, tokens)
    for t in (0, 4, TOKENS - 2):
        changed = tokens.clone()
        changed[:, t + 1 :] = make_tokens(seed=9)[:, t + 1 :]
        after = logits_of(model, changed)
        assert torch.equal(after[:, : t + 1], before[:, : t + 1]) and not torch.equal(after, before)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("kind", KINDS)
def test_cached_steps_give_the_logits_of_the_whole(kind: str, residual: str) -> None:
    model, tokens = make_model(kind), make_tokens()
    randomize(attach(model, residual))
    whole, cache, steps = logits_of(model, tokens), None, []
    for chunk in tokens.split([4, 1, 1, 2, 2], 1):
        with torch.no_grad():
            out = model(chunk, past_key_values=cache, use_cache=True)
        steps.append(out.logits)
        cache = out.past_key_values
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_random_coefficients(kind: str) -> None:
    model, tokens = make_model(kind), make_tokens(tokens=4)
    randomize(attach(model, "dhc"))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)}
    out = model.generate(tokens, **options, return_dict_in_generate=True, output_logits=True)
    whole = logits_of(model, out.sequences)
    torch.testing.assert_close(torch.stack(out.logits, 1), whole[:, 3:-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_streams(kind: str) -> None:
    model, tokens = make_model(kind), make_tokens()
    attach(model, "dhc")
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
    assert [tuple(state.shape[2:]) for state in states] == [(32,), (4, 32), (4, 32), (32,)]


# ---- Training --------------------------------------------------------------------------------------------------------


def gradients(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    grads = {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}
    missing = [name for name, grad in grads.items() if grad is None]
    assert not missing, f"no gradient for {missing}: DDP would stop"
    return {name: (grad.full_tensor() if hasattr(grad, "full_tensor") else grad) for name, grad in grads.items()}


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_gradients(kind: str, residual: str) -> None:
    model, tokens = make_model(kind).train(), make_tokens()
    randomize(attach(model, residual))
    expected = gradients(model, tokens)
    assert all(grad.any() for name, grad in expected.items() if "hyper_" in name), "a hyper-connection does not learn"
    calls = []
    layer = model.base_model.get_submodule("h.0" if kind == "gpt2" else "layers.0")
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model.activation_checkpointing_enable({"use_reentrant": False})
    actual = gradients(model, tokens)
    assert len(calls) == 2  # it did compute again
    assert all(torch.equal(actual[name], grad) for name, grad in expected.items())


def test_reentrant_checkpointing_is_refused() -> None:
    model = make_model("llama").train()
    attach(model)
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        gradients(model, make_tokens())


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(residual: str, dtype: torch.dtype) -> None:
    model, tokens = make_model("llama"), make_tokens()
    randomize(attach(model, residual))
    expected = logits_of(model, tokens)
    with torch.autocast("cpu", dtype):
        mixed = model(tokens, labels=tokens)
    mixed.loss.backward()
    assert relative_error(mixed.logits, expected) < 0.1
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert relative_error(logits_of(model.to(dtype), tokens), expected) < 0.1


@pytest.mark.parametrize("residual", RESIDUALS)
def test_compiles_to_one_graph(residual: str) -> None:
    torch._dynamo.reset()
    model, tokens = make_model("llama"), make_tokens()
    randomize(attach(model, residual))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        actual = compiled(tokens, use_cache=False).logits
    torch.testing.assert_close(actual, logits_of(model, tokens))


def test_weight_decay_is_for_dynamic_weights_alone() -> None:
    handle = attach(make_model("llama"), "dhc")
    decayed = {name for name, _ in handle.named_parameters()} - handle.no_weight_decay()
    assert {name.rsplit(".", 1)[1] for name in decayed} == {"dynamic_alpha", "dynamic_beta"}
    assert len(decayed) == 2 * 2 * LAYERS
    handle = attach(make_model("llama"), "mhc")
    decayed = {name for name, _ in handle.named_parameters()} - handle.no_weight_decay()
    assert {name.rsplit(".", 1)[1] for name in decayed} == {"phi"}


# ---- Taking off, saving ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("kind", KINDS)
def test_remove_restores_every_bit(kind: str, residual: str) -> None:
    model, tokens = make_model(kind), make_tokens()
    before, names = logits_of(model, tokens), list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    handle = attach(model, residual)
    randomize(handle)
    assert (logits_of(model, tokens) - before).abs().max() > 0.01
    handle.remove()
    handle.remove()  # a second time is nothing
    assert list(model.state_dict()) == names and [type(module) for module in model.modules()] == classes
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks
    assert torch.equal(logits_of(model, tokens), before)
    attach(model, residual)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind: str, residual: str, tmp_path: Path) -> None:
    model, tokens = make_model(kind), make_tokens()
    handle = attach(model, residual, expansion_rate=3)
    randomize(handle)
    handle.save_pretrained(tmp_path / "made")
    files = {file.name: file.stat().st_size for file in (tmp_path / "made").iterdir()}
    assert sorted(files) == ["hyper_attachment.json", "hyper_attachment.safetensors"]
    own = 4 * sum(parameter.numel() for parameter in handle.parameters())
    assert own < files["hyper_attachment.safetensors"] < own + 20_000
    fresh = make_model(kind)
    loaded = HyperAttachment.from_pretrained(fresh, tmp_path / "made")
    assert loaded.config == handle.config
    assert torch.equal(logits_of(fresh, tokens), logits_of(model, tokens))


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    attach(make_model("llama"), "dhc").save_pretrained(tmp_path)
    for model, told in [
        (make_model("qwen2"), "made for a model with model_type 'llama', got 'qwen2'"),
        (LlamaForCausalLM(LlamaConfig(**SIZES | {"hidden_size": 64})), "with hidden_size 32, got 64"),
        (LlamaForCausalLM(LlamaConfig(**SIZES | {"num_hidden_layers": 2})), "with num_hidden_layers 3, got 2"),
    ]:
        names = list(model.state_dict())
        with pytest.raises(ValueError, match=told) as error:
            HyperAttachment.from_pretrained(model, tmp_path)
        assert "\n" not in str(error.value) and list(model.state_dict()) == names
    with pytest.raises(ValueError, match=r"hyper_attachment.json, hyper_attachment.safetensors missing"):
        HyperAttachment.from_pretrained(make_model("llama"), tmp_path / "nowhere")
    other = attach(make_model("llama"), "dhc", expansion_rate=2)
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "hyper_attachment.safetensors").rename(tmp_path / "hyper_attachment.safetensors")
    model = make_model("llama")
    with pytest.raises(ValueError, match="do not fit their configuration"):
        HyperAttachment.from_pretrained(model, tmp_path)
    assert not any("hyper_" in name for name in model.state_dict())


def test_bad_calls_are_named() -> None:
    with pytest.raises(ValueError, match="residual must be one of shc, dhc, mhc, got 'hc'"):
        attach(make_model("llama"), "hc")
    with pytest.raises(ValueError, match="attach has no option rate"):
        attach(make_model("llama"), rate=2)
    with pytest.raises(ValueError, match="got Linear"):
        attach(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got GraniteModel"):  # the same parts, but scaled residuals
        attach(GraniteForCausalLM(GraniteConfig(**SIZES)))
    with pytest.raises(ValueError, match="ln_1, ln_2, mlp and nothing else"):
        attach(GPT2LMHeadModel(GPT2Config(**GPT2_SIZES, add_cross_attention=True)))
    model = make_model("llama")
    attach(model)
    with pytest.raises(ValueError, match="has hyper-connections already"):
        attach(model)
    model = make_model("llama")
    model.model.layers[1].forward = model.model.layers[1].forward
    with pytest.raises(ValueError, match="attach hyper-connections first"):
        attach(model)


def test_fsdp_policies_find_all_layers_by_the_name_of_their_class() -> None:
    model = make_model("llama")
    attach(model)
    (name,) = model._no_split_modules
    found = get_module_class_from_name(model, name)
    assert all(isinstance(layer, found) for layer in model.model.layers)


def test_a_copy_of_the_model_is_its_own() -> None:
    model, tokens = make_model("llama"), make_tokens()
    randomize(attach(model, "dhc"))
    twin = copy.deepcopy(model)
    assert torch.equal(logits_of(twin, tokens), logits_of(model, tokens))
    with torch.no_grad():
        twin.model.layers[0].hyper_mlp.static_beta.zero_()
    assert not torch.equal(logits_of(twin, tokens), logits_of(model, tokens))


def test_examples_in_the_docstrings() -> None:
    result = doctest.testmod(importlib.import_module("xlayer_systems.hyper_lm.attach"))
    assert result.attempted and not result.failed


# ---- Two processes ---------------------------------------------------------------------------------------------------

CASES = [
    *itertools.product(("ddp", "fsdp2"), ("llama",), RESIDUALS, (False, True)),
    *itertools.product(("ddp", "fsdp2"), ("gpt2",), ("dhc",), (True,)),
]


def distributed_model(kind: str, residual: str, recompute: bool) -> Any:
    model = make_model(kind).double().train()
    randomize(attach(model, residual))
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def wrapped(wrapper: str, model: Any) -> nn.Module:
    if wrapper == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for layer in getattr(model.base_model, "h", None) or model.base_model.layers:
        fully_shard(layer)
    return fully_shard(model)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    join_processes(rank, folder)
    tokens = make_tokens(4).chunk(2)[rank]
    results = {}
    for wrapper, *case in CASES:
        model = wrapped(wrapper, distributed_model(*case))
        gradients(model, tokens)
        results[(wrapper, *case)] = gradients(model, tokens)  # the second step meets what the first left behind
    if rank == 0:
        torch.save(results, f"{folder}/gradients.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder: Path = tmp_path_factory.mktemp("attach")
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return torch.load(folder / "gradients.pt")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_two_processes_equal_one(results: dict, case: tuple[str, str, str, bool]) -> None:
    expected = gradients(distributed_model(*case[1:]), make_tokens(4))
    assert results[case].keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(results[case][name], grad, rtol=1e-5, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
