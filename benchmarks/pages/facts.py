"""Reads numbers that the code itself holds: sizes of cases, settings of runs, parameters of models."""

from __future__ import annotations

import json
import re
from math import prod
from typing import Any

from benchmarks.cases import aggregate, hdim, hyper, hyper_model, quantize
from benchmarks.pages.text import ROOT, named, percent

ASSETS = ROOT / "python/xlayer_systems/assets"


# ---- sizes of the cases ----------------------------------------------------------------------------------------------


def hdim_size() -> str:
    _, _, _, d, m, h, _ = hdim.CPU_SIZES["S128"]
    return named(D=d, M=m, H=h)


def hdim_shape(case: str) -> str:
    return " × ".join(str(size) for size in hdim.CPU_SIZES[case][1:3])


def hyper_size() -> str:
    return named(**dict(zip(("B", "S", "d", "n"), hyper.settings(cuda=False)["dhc"].size, strict=True)))


def hyper_model_size() -> str:
    from xlayer_systems.hyper_lm import HyperLMConfig

    b, s, d, layers, _, vocabulary = hyper_model.settings(cuda=False)["L12-d768"].size
    n = HyperLMConfig().expansion_rate
    return f"{layers} layers, {named(d=d, n=n)}, a vocabulary of {vocabulary} and {b} × {s} tokens"


def quantize_size(case: str) -> str:
    return named(**dict(zip("NKD", quantize.settings(cuda=False)[case].size, strict=True)))


def score_bytes(case: str) -> int:
    """Counts the bytes of the N × K scores that a search without fusion writes in float32."""
    n, k, _ = quantize.settings(cuda=False)[case].size
    return 4 * int(n) * int(k)


def fsq_size() -> str:
    rows, levels, columns = quantize.settings(cuda=False)["fsq-8"].size
    return f"{rows:,} × {columns} numbers of {levels} levels"


def aggregate_size() -> str:
    layers, tokens, _ = aggregate.settings(cuda=False)["L24-d128"][0].size
    return f"{layers} layers and {tokens:,} tokens"


def pinned(package: str) -> str:
    """Names a package with its version in constraints.txt, which the rows beside it were made with."""
    found = re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if found is None:
        raise LookupError(f"constraints.txt does not pin {package}")
    return f"`{package}` {found[1]}"


# ---- settings of the systems -----------------------------------------------------------------------------------------


def quick(system: str, preset: str | None = None) -> Any:
    """Builds the options of a `--quick` run on the system's default data and backbone."""
    from xlayer_systems.registry import get_system

    chosen = get_system(system)
    return chosen.options(preset or chosen.default_preset, chosen.default_dataset, chosen.default_backbone, True)


def presets_of_one_source() -> str:
    from xlayer_systems.xlrb import PRESETS

    return f"{sum(config.top_k == 1 for config in PRESETS.values())} of {len(PRESETS)}"


def tool_decoys() -> str:
    from xlayer_systems.data.tools import FRAMES

    training = FRAMES[0]
    return f"{sum('{wrong}' in frame for frame in training)} of the {len(training)}"


def parameters(asset: str) -> str:
    """Counts the parameters of a shipped model by the header of its weights."""
    with (ASSETS / asset / "model.safetensors").open("rb") as file:
        head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    size = sum(prod(tensor["shape"]) for name, tensor in head.items() if name != "__metadata__")
    return f"{size / 1e6:.1f} M parameters"


def sender_width() -> int:
    return int(json.loads((ASSETS / "decoder-sender/config.json").read_text())["hidden_size"])


def bypass_shares() -> tuple[str, str, str]:
    """Counts the parameters of a Llama with the shape of the 1 B one, and the shares that either stage trains.

    The model lives on the meta device and takes no memory.
    """
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
    return f"{base / 1e9:.2f} B", shares[0], shares[1]
