"""Numbers in the README's sentences that the code itself holds: sizes, settings, limits, shares of parameters."""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path
from typing import Any

from benchmarks.cases import aggregate as bench_aggregate
from benchmarks.cases import hdim as bench_hdim
from benchmarks.cases import hyper as bench_hyper
from benchmarks.cases import hyper_model as bench_hyper_model
from benchmarks.cases import quantize as bench_quantize
from benchmarks.readme_tables import block, named, percent, power

ROOT = Path(__file__).parents[1]
INCLUDE = ROOT / "csrc/include/xlayer"
ASSETS = ROOT / "python/xlayer_systems/assets"


# ---- limits and sizes of the kernels -------------------------------------------------------------------------------


def constant(header: str, name: str) -> str:
    """An integer that a contract names."""
    found = re.search(rf"\b{name} = (\d+);", (INCLUDE / header).read_text())
    if found is None:
        raise LookupError(f"{header} has no integer {name}")
    return found[1]


@block
def most_projections() -> str:
    return constant("hdim.h", "kHdimMaxProjDim")


@block
def most_streams() -> str:
    return constant("hyper.h", "kHyperMaxStreams")


@block
def hdim_size() -> str:
    _, _, _, d, m, h, _ = bench_hdim.CPU_SIZES["S128"]
    return named(D=d, M=m, H=h)


@block
def hyper_size() -> str:
    return named(**dict(zip(("B", "S", "d", "n"), bench_hyper.settings(cuda=False)["dhc"].size, strict=True)))


@block
def hyper_model_size() -> str:
    from xlayer_systems.hyper_lm import HyperLMConfig

    b, s, d, layers, _, vocabulary = bench_hyper_model.settings(cuda=False)["L12-d768"].size
    n = HyperLMConfig().expansion_rate
    return f"{layers} layers, {named(d=d, n=n)}, vocabulary {vocabulary}, {b} × {s} tokens"


@block
def quantize_size() -> str:
    cases = bench_quantize.settings(cuda=False)
    rows, levels, columns = cases["fsq-8"].size
    sizes = named(**dict(zip("NKD", cases["K4096-D256"].size, strict=True)))
    return f"{sizes}, and {rows:,} × {columns} numbers of {levels} levels for FSQ"


@block
def aggregate_size() -> str:
    layers, tokens, _ = bench_aggregate.settings(cuda=False)["L24-d128"][0].size
    return f"{layers} layers, {tokens} tokens"


def pinned(package: str) -> str:
    """The version that the rows beside a package were made with: the one of constraints.txt."""
    found = re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if found is None:
        raise LookupError(f"constraints.txt does not pin {package}")
    return f"`{package}` {found[1]}"


@block
def hyper_connections_version() -> str:
    return pinned("hyper-connections")


@block
def vector_quantize_version() -> str:
    return pinned("vector-quantize-pytorch")


# ---- settings of the systems ---------------------------------------------------------------------------------------


def quick(system: str, preset: str | None = None) -> Any:
    """The options of a `--quick` run on the data and the backbone that a system takes by itself."""

    from xlayer_systems.registry import get_system

    chosen = get_system(system)
    return chosen.options(preset or chosen.default_preset, chosen.default_dataset, chosen.default_backbone, True)


@block
def presets() -> str:
    from xlayer_systems.xlrb import PRESETS

    return str(len(PRESETS))


@block
def presets_of_one_source() -> str:
    from xlayer_systems.xlrb import PRESETS

    return f"{sum(config.topk == 1 for config in PRESETS.values())} of {len(PRESETS)}"


@block
def hyper_lm_setup() -> str:
    from xlayer_systems.hyper_lm import SIZES

    size, options = SIZES["tiny"], quick("hyper_lm")
    shape = f"{options.batch_size} × {options.max_length} tokens"
    return f"{size['num_layers']} layers, {named(d=size['hidden_size'])}, {options.max_steps} steps of {shape}"


@block
def hyper_lm_blocks() -> str:
    return str(quick("hyper_lm").eval_blocks)


@block
def hyper_lm_rate() -> str:
    return power(quick("hyper_lm").learning_rate)


@block
def telepathy_rate() -> str:
    return power(quick("telepathy").learning_rate)


@block
def telepathy_steps() -> str:
    return f"{quick('telepathy').max_steps} steps"


@block
def xlrb_rate() -> str:
    return power(quick("xlrb", "plain").encoder_lr)


@block
def tool_decoys() -> str:
    from xlayer_systems.data.tools import FRAMES

    training = FRAMES[0]
    return f"{sum('{wrong}' in frame for frame in training)} of the {len(training)}"


@block
def attention_taps() -> str:
    from xlayer_systems.lformer.config import ModelConfig

    return f"{ModelConfig().memory} taps"


# ---- models --------------------------------------------------------------------------------------------------------


def millions(asset: str) -> str:
    """Parameters of a shipped model, from the head of its weights."""
    with (ASSETS / asset / "model.safetensors").open("rb") as file:
        head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    size = sum(prod(tensor["shape"]) for name, tensor in head.items() if name != "__metadata__")
    return f"{size / 1e6:.1f} M"


@block
def sender_parameters() -> str:
    return f"{millions('decoder-sender')} parameters"


@block
def receiver_parameters() -> str:
    return millions("decoder-receiver")


@block
def sender_width() -> str:
    return str(json.loads((ASSETS / "decoder-sender/config.json").read_text())["hidden_size"])


@block
def bypass_shares() -> str:
    """Of a Llama of the shape of the 1 B one, which takes no memory here."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from xlayer_systems.bypass import BypassConfig, attach

    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    shape = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    config = LlamaConfig(**shape, **heads, tie_word_embeddings=True)
    shares = []
    for stage in ("task", "reconstruct"):
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        base = sum(parameter.numel() for parameter in model.parameters())
        bypass = attach(model, BypassConfig(), stage=stage)
        trained = sum(parameter.numel() for parameter in bypass.parameters() if parameter.requires_grad)
        shares.append(percent(trained / base, 2))
    return (
        f"{base / 1e9:.2f} B parameters the projectors are {shares[0]} of the model, encoder and projectors {shares[1]}"
    )
