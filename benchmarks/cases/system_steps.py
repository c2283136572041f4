"""The systems whose training steps are timed: their shapes, a step of each, and the least work of that step.

A step is the model and objective that `xlayer train` uses, with random weights, on random tokens. Frozen models are in
the element type of the case, as one loads them for mixed precision; what is trained is in float32.

The least work counts matrices alone; vectors (biases, norms, gates) and what only one row per example meets are left
out, which makes the limit stricter. Passes over a matrix W that multiplies rows of x:

    3   W is trained, and a gradient goes on to x: product, gradient of x, gradient of W
    2   W is trained and x needs no gradient, or W is frozen and x needs one
    1   neither: W is frozen, and nothing below it is trained

    bytes = Σ passes · elements of W · their size       (it is read, read again, and its gradient written)
    flops = Σ passes · 2 · rows · elements of W

Attention has two products of activations forward and four backward, half of them where it is causal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.cases import hdim as hdim_cases

Size = dict[str, Any]  # a list holds the numbers of the sender and of the receiver

PAPER: dict[str, Size] = {
    "xlrb": {"layers": 24, "targets": 4, "d": 1024, "heads": 16, "vocabulary": 50265, "B": 16, "S": 256},
    "lformer": {"layers": 8, "d": 512, "heads": 8, "d_side": 128, "vocabulary": 5000, "B": 16, "S": 256},
    "bypass": {
        **{"layers": 32, "d": 4096, "heads": 32, "MLP": 14336, "vocabulary": 128256},
        **{"latent": 256, "B": 2, "S": 512},
    },
    "telepathy": {
        **{"layers": [32, 32], "d": [4096, 4096], "heads": [32, 32], "MLP": [14336, 14336]},
        **{"vocabulary": [128256, 32768], "soft tokens": 128, "codes": 4096, "B": 2, "S": 512},
    },
}
# Smaller so that the kernels' share of the step stays near the paper's, and the activations are larger than the
# gradients, or peak memory would show nothing: XLRB keeps one target in six layers, and its pairs of tokens, which grow
# with S, about their weight beside the encoder, which grows with d; codes shrink with the width of the receiver.
CPU: dict[str, Size] = {
    "xlrb": PAPER["xlrb"] | {"layers": 6, "targets": 1, "d": 768, "heads": 12, "vocabulary": 8192, "B": 4, "S": 128},
    "lformer": PAPER["lformer"] | {"B": 4, "S": 128},
    "bypass": PAPER["bypass"] | {"layers": 6, "d": 512, "heads": 8, "MLP": 1792, "vocabulary": 4096, "S": 256},
    "telepathy": PAPER["telepathy"]
    | {
        **{"layers": [6, 6], "d": [512, 384], "heads": [8, 8], "MLP": [1792, 1344], "vocabulary": [8192, 4096]},
        **{"codes": 512, "S": 256},
    },
}
TOY: dict[str, Size] = {
    "xlrb": PAPER["xlrb"] | {"layers": 3, "targets": 2, "d": 32, "heads": 2, "vocabulary": 64, "B": 2, "S": 16},
    "lformer": PAPER["lformer"] | {"layers": 2, "d": 32, "heads": 2, "d_side": 16, "vocabulary": 64, "B": 2, "S": 16},
    "bypass": PAPER["bypass"] | {"layers": 2, "d": 32, "heads": 4, "MLP": 48, "vocabulary": 64, "latent": 8, "S": 16},
    "telepathy": PAPER["telepathy"]
    | {
        **{"layers": [2, 2], "d": [64, 32], "heads": [4, 4], "MLP": [96, 48], "vocabulary": [64, 3072]},
        **{"soft tokens": 8, "codes": 16, "S": 16},
    },
}
# The kernel that a system needs; the bypass has none: both of its backends are the same products.
KERNELS = {"xlrb": "hdim_attention", "lformer": "ema_scan", "bypass": None, "telepathy": "vq_nearest"}
ANSWER = 16  # tokens of the receiver's answer


class Part(NamedTuple):
    """Matrices by their number of elements, and the rows that they are multiplied with in each of the passes."""

    elements: int
    rows: int
    passes: int
    is_frozen: bool = False


class Step(NamedTuple):
    """A system's model and its batch: the loss is ``model(**batch).loss``. ``products`` are flops beside the parts'."""

    model: Any
    batch: dict[str, Tensor]
    parts: list[Part]
    products: int

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def parameters(self) -> int:
        """Counts the parameters of all models, also of the frozen ones, which are no submodules."""
        models = (self.model, *getattr(self.model, "frozen", ()))
        return sum({id(p): p.numel() for model in models for p in model.parameters()}.values())

    def least_bytes(self, element: int) -> int:
        sizes = {True: element, False: max(4, element)}
        return sum(part.passes * part.elements * sizes[part.is_frozen] for part in self.parts)

    def least_flops(self) -> int:
        return self.products + sum(2 * part.passes * part.rows * part.elements for part in self.parts)


def make(system: str, size: Size, dtype: str, device: str) -> Step:
    """Makes the step on the device; on "meta" it has no numbers, only shapes to count."""
    element = getattr(torch, dtype)
    torch.manual_seed(0)
    with torch.device(device):
        step = SYSTEMS[system](size, element)
    if element == torch.float64:
        step.model.to(element)
    step.model.train()
    return step


# ---- the systems ---------------------------------------------------------------------------------------------------


def xlrb(size: Size, element: torch.dtype) -> Step:
    """Makes RoBERTa with bridges of the preset H9 into its last layers, all of it trained."""
    from transformers import RobertaConfig, RobertaModel

    from xlayer_systems.xlrb import XLRBClassifier, preset

    layers, targets, d, heads, vocabulary, b, s = (size[name] for name in PAPER["xlrb"])
    shape = {"vocab_size": vocabulary, "hidden_size": d, "intermediate_size": 4 * d, "max_position_embeddings": 514}
    depth = {"num_hidden_layers": layers, "num_attention_heads": heads, "type_vocab_size": 1}
    config = replace(preset("H9"), route_last_n=targets)
    model = XLRBClassifier(RobertaModel(RobertaConfig(**shape, **depth), add_pooling_layer=False), config, num_labels=2)
    bridge: Any = model.bridge
    for target in bridge.layers.values():  # they start near 0, where no message would be seen in the loss
        nn.init.normal_(target.blend.output.weight, std=d**-0.5)
    batch = {"input_ids": _tokens(vocabulary, b, s), "attention_mask": _ones(b, s), "labels": torch.randint(2, (b,))}
    messages = [(hdim.target_proj, hdim.source_proj, hdim.value_in, hdim.value_out) for hdim in bridge.hdim]
    parts = [
        Part(model.encoder.embeddings.word_embeddings.weight.numel(), 0, 1),  # looked up; its gradient is written
        Part(matrices(model.encoder.encoder, bridge.layers, *sum(messages, ())), b * s, 3),
    ]
    pairs = hdim_cases.least_flops(b * s * s, config.proj_dim, config.mlp_dim, d, "fwd+bwd")
    return Step(model, batch, parts, 3 * attention(layers, b, s, s, d) + len(messages) * pairs)


def lformer(size: Size, element: torch.dtype) -> Step:
    """Makes the L-Former that creates its own base and trains with it; no gradient goes from the taps to the base."""
    from xlayer_systems.lformer import LFormer, ModelConfig

    layers, d, heads, side, vocabulary, b, s = (size[name] for name in PAPER["lformer"])
    model = LFormer(ModelConfig(vocabulary, d, layers, heads, 4 * d, side_size=side))
    ids = _tokens(vocabulary, b, s + 1)
    targets = {"tools": torch.randint(model.config.num_tools, (b,)), "values": torch.randn(b)}
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "attention_mask": _ones(b, s), **targets}
    base = model.base.transformer
    parts = [
        Part(matrices(base.h) + base.wte.weight.numel(), b * s, 3),  # the embedding makes the logits too
        Part(model.path.projector.weight.numel(), b, 2),  # of pooled taps
    ]
    return Step(model, batch, parts, 3 * attention(layers, b, s, s, d) // 2)


def bypass(size: Size, element: torch.dtype) -> Step:
    """Makes stage 2 on a frozen Llama, which runs unmodified first, and then with the biases of projectors that are not
    0."""
    from xlayer_systems.bypass import BypassConfig, attach
    from xlayer_systems.bypass.task import BypassLanguageModel

    layers, d, heads, mlp, vocabulary, latent, b, s = (size[name] for name in PAPER["bypass"])
    decoder = make_decoder("llama", (layers, d, heads, mlp, vocabulary), element)
    added = attach(decoder, BypassConfig(latent=latent, stage="task"))
    nn.init.normal_(added.projectors, std=0.02 * latent**-0.5)
    ids = _tokens(vocabulary, b, s + 1)
    parts = [
        Part(matrices(decoder.model.layers), b * s, 1 + 2, is_frozen=True),
        Part(matrices(decoder.lm_head), b * s, 2, is_frozen=True),
        Part(added.encoder.numel(), b * s, 1),
        Part(added.projectors.numel(), b * s, 2),
    ]
    products = (1 + 3) * attention(layers, b, s, s, d) // 2
    return Step(BypassLanguageModel(decoder, added), {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}, parts, products)


def telepathy(size: Size, element: torch.dtype) -> Step:
    """Makes a VQ bridge (the report's phase 15) from a frozen Llama to a frozen Mistral."""
    from transformers import AutoTokenizer

    from xlayer_systems.hf.decoders import ASSETS, RECEIVER
    from xlayer_systems.telepathy import Pair, TelepathyModel
    from xlayer_systems.telepathy.bridge import TelepathyBridge
    from xlayer_systems.telepathy.presets import preset

    shapes = list(zip(*(size[name] for name in ("layers", "d", "heads", "MLP", "vocabulary")), strict=True))
    sender = make_decoder("llama", shapes[0], element)
    receiver = make_decoder("mistral", shapes[1], element)
    count, codes, b, s = (size[name] for name in ("soft tokens", "codes", "B", "S"))
    tokenizer: Any = AutoTokenizer.from_pretrained(ASSETS / RECEIVER)  # for the primer and the special tokens
    pair = Pair("sender", "receiver", sender, tokenizer, receiver, tokenizer, "", "")
    config = replace(preset("v15-vq"), soft_tokens=count, codebook_size=codes)
    bridge = TelepathyBridge(config, pair.dimensions, receiver.config.initializer_range)
    model = TelepathyModel(pair, bridge)
    answers = _tokens(len(tokenizer), b, ANSWER)
    batch = {"input_ids": _tokens(shapes[0][4], b, s), "attention_mask": _ones(b, s), "target_ids": answers}
    batch |= {"answer_ids": answers, "question_ids": answers}  # of losses that this preset does not have
    primer = len(tokenizer(config.primer, add_special_tokens=False)["input_ids"])
    resampler: Any = bridge.resampler
    heard, d = primer + count + ANSWER + 2, shapes[1][1]
    reads = [block.cross_attention.key_value for block in resampler.blocks]
    inner = matrices(resampler) - matrices(resampler.project, *reads)
    parts = [
        Part(matrices(*sender.model.layers[: model.layer]), b * s, 1, is_frozen=True),
        Part(matrices(resampler.project), b * s, 2),
        Part(matrices(*reads), b * s, 3),
        Part(inner, b * count, 3),
        Part(codes * d, b * count, 1 + 3),  # the search, and the scores of the entropy
        Part(matrices(receiver.model.layers), b * heard, 2, is_frozen=True),
        Part(matrices(receiver.lm_head), b * (ANSWER + 2), 2, is_frozen=True),
    ]
    products = attention(model.layer, b, s, s, shapes[0][1]) // 2
    products += (
        3 * attention(config.num_layers, b, count, s + count, d) + 3 * attention(shapes[1][0], b, heard, heard, d) // 2
    )
    return Step(model, batch, parts, products)


SYSTEMS: dict[str, Callable[[Size, torch.dtype], Step]] = {
    "xlrb": xlrb,
    "lformer": lformer,
    "bypass": bypass,
    "telepathy": telepathy,
}


# ---- what they share -----------------------------------------------------------------------------------------------


def make_decoder(kind: str, shape: tuple[int, ...], element: torch.dtype) -> Any:
    """Makes a frozen causal language model of (layers, width, heads, width of the MLP, vocabulary), with four query
    heads to a key head."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    layers, d, heads, mlp, vocabulary = shape
    sizes: dict[str, Any] = {"vocab_size": vocabulary, "hidden_size": d, "intermediate_size": mlp}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads // 4}
    if kind == "llama":
        decoder: Any = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        decoder = MistralForCausalLM(MistralConfig(sliding_window=None, **sizes))
    return decoder.to(element).eval().requires_grad_(False)


def matrices(*modules: nn.Module) -> int:
    """Counts the elements of the weights of all linear layers in the modules."""
    from transformers.pytorch_utils import Conv1D

    inside = (part for module in modules for part in module.modules())
    return sum(part.weight.numel() for part in inside if isinstance(part, nn.Linear | Conv1D))


def attention(layers: int, b: int, queries: int, keys: int, d: int) -> int:
    """Counts the flops of scores and weighted sums in the forward."""
    return layers * 4 * b * queries * keys * d


def _tokens(vocabulary: int, *shape: int) -> Tensor:
    """Draws random tokens, none of them special in these models."""
    return torch.randint(3, vocabulary, shape)


def _ones(b: int, s: int) -> Tensor:
    return torch.ones(b, s, dtype=torch.int64)
