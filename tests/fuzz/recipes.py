"""Valid calls of every operator and of every public function, with their right answers.

An operator that has no recipe fails `test_fuzz.py`; it is fuzzed by its schema alone until it has one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuzz.draws import INTS, NUMBERS, Draw, Spec
from xlayer_ext import functional as XF
from xlayer_ext import reference

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A forward operator: how to draw its arguments by name, and the formula on the same arguments.

    ``formula`` returns an output for every output of the operator; None where it has none to compare with.
    ``gradients`` names what the backward operator returns, in its order; ``upstream`` its arguments that are gradients
    of outputs, and ``kept`` those that are outputs of the forward operator, both by number.
    """

    draw: Callable[[Draw], Arguments]
    formula: Callable[..., tuple[Tensor | None, ...]]
    gradients: tuple[str, ...] = ()
    upstream: tuple[tuple[str, int], ...] = ()
    kept: tuple[tuple[str, int], ...] = ()
    extras: Callable[[Draw, Arguments], Arguments] = lambda d, forward: {}
    loose: bool = False  # outputs may be a step of the quantizer away
    smooth: Callable[[Arguments], bool] = lambda arguments: True  # whether gradients may be compared


def _number(d: Draw, *valid: float) -> float:
    return d.rng.choice(NUMBERS) if d.hostile and d.rng.random() < 0.1 else d.rng.choice(valid)


def _integer(d: Draw, valid: int) -> int:
    return d.rng.choice(INTS) if d.hostile and d.rng.random() < 0.1 else valid


# ---- routing ---------------------------------------------------------------------------------------------------------


def _masked_mean(d: Draw) -> Arguments:
    return {"x": d.float(d.B, d.S, d.H), "mask": d.maybe(d.mask(d.B, d.S), 0.7)}


def _masked_mean_extras(d: Draw, forward: Arguments) -> Arguments:
    return {"grad": d.float(d.B, d.H), "tokens": _integer(d, d.S)}


# ---- aggregate -------------------------------------------------------------------------------------------------------


def _ema_scan(d: Draw) -> Arguments:
    norm = d.maybe(d.wide(d.d))
    return {
        "x": d.float(d.L, d.N, d.d),
        "gate_logits": d.wide(d.L),
        "initial_state": d.maybe(d.float(d.N, d.d)),
        "norm_weight": norm,
        "norm_bias": d.maybe(d.wide(d.d)) if norm else None,
        "eps": _number(d, 1e-5, 1e-3),
        "last_only": d.flag(),
    }


def _ema_scan_extras(d: Draw, forward: Arguments) -> Arguments:
    return {"grad": d.float(d.N, d.d) if forward["last_only"] else d.float(d.L, d.N, d.d)}


def _depth_gru(d: Draw) -> Arguments:
    return {
        "x": d.float(d.L, d.N, d.i),
        "weight_ih": d.float(3 * d.d, d.i),
        "weight_hh": d.float(3 * d.d, d.d),
        "bias_ih": d.float(3 * d.d),
        "bias_hh": d.float(3 * d.d),
        "initial_state": d.maybe(d.float(d.N, d.d)),
        "keep": d.flag(),
    }


def _depth_gru_extras(d: Draw, forward: Arguments) -> Arguments:
    states = (d.L, d.N, d.d)
    return {"grad": d.float(*states), "states": d.float(*states), "gates": d.float(d.L, d.N, 4, d.d)}


def _heads(d: Draw) -> int:
    """Draws the number of heads, which is 1 where the width is 0."""
    return d.size("h", (1, 1, 2, 3, 8) if d.hostile or d.w else (1,))


def _depth_attention(d: Draw) -> Arguments:
    inner = _heads(d) * d.w
    return {
        "keys": d.float(d.L, d.N, inner),
        "values": d.float(d.L, d.N, inner),
        "weight_query": d.weight(inner, d.d),
        "weight_out": d.weight(d.d, inner),
        "initial_state": d.maybe(d.float(d.N, d.d)),
        "num_heads": _integer(d, d.h),
        "window": _integer(d, d.choice(1, 2, 3, 4, 100)),
        "scale": _number(d, 0.125, max(d.w, 1) ** -0.5),
        "keep": d.flag(),
    }


def _depth_attention_extras(d: Draw, forward: Arguments) -> Arguments:
    states = d.float(d.L, d.N, d.d)
    return {"grad": d.float(d.L, d.N, d.d), "states": states, "attended": d.float(d.L, d.N, d.h * d.w)}


def _depth_attention_formula(
    keys: Tensor, values: Tensor, weight_query: Tensor, weight_out: Tensor, initial_state: Tensor | None, keep: bool,
    **options: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    return reference.depth_attention(keys, values, weight_query, weight_out, initial_state, **options), None


# ---- hdim ------------------------------------------------------------------------------------------------------------


def _hdim_attention(d: Draw) -> Arguments:
    return {
        "query": d.float(d.B, d.Sq, d.D),
        "key": d.float(d.B, d.Sk, d.D),
        "value": d.float(d.B, d.Sk, d.H),
        "weight1": d.float(d.M, 4 * d.D),
        "bias1": d.float(d.M),
        "weight2": d.float(d.M),
        "key_mask": d.maybe(d.mask(d.B, d.Sk)),
        "attn_mask": d.maybe(d.mask(d.B, d.Sq, d.Sk)),
        "temperature": _number(d, 1.0, 4.0, 0.5),
        "gelu": d.flag(),
        "tf32": False,
    }


def _hdim_extras(d: Draw, forward: Arguments) -> Arguments:
    return {
        "grad_context": d.float(d.B, d.Sq, d.H),
        "grad_row_entropy": d.maybe(d.wide(d.B, d.Sq)),
        "context": d.float(d.B, d.Sq, d.H),
        "statistics": d.wide(d.B, d.Sq, 3),
    }


def _hdim_formula(gelu: bool, tf32: bool, **arguments: Any) -> tuple[Tensor | None, ...]:
    context, _ = reference.hdim_attention(**arguments, activation="gelu" if gelu else "relu")
    return context, None, None


# ---- hyper -----------------------------------------------------------------------------------------------------------

_NORMS = ("none", "layer", "rms", "rms_all")
_FORMS = ("identity", "tanh", "sinkhorn_rows", "sinkhorn_columns")


def _streams(d: Draw) -> Spec:
    d.size("n", (1, 2, 3, 4, 4, 7, 8, 16, *((17, 0) if d.hostile else ())))
    if not d.hostile:
        d.sizes.setdefault("d", d.rng.choice((1, 2, 3, 7, 16, 65)))
    return d.float(d.outer, d.inner, d.n, d.d)


def _connection(d: Draw) -> Arguments:
    n, width = d.n, d.d
    norm = d.choice(0, 1, 2, 3)
    form = d.choice(0, 1) if norm == 0 else d.choice(0, 1, 2, 3)
    columns = (n * (n + 2), n * width) if norm == 3 else (n + 2, width)
    return {
        "base": d.wide(n, n + 2),
        "weight": d.wide(*columns) if norm else None,
        "bias": d.maybe(d.wide(n + 2)) if norm and form < 2 else None,
        "scale": d.wide(n + 2) if norm else None,
        "norm": _integer(d, norm),
        "form": _integer(d, form),
        "sinkhorn_iters": _integer(d, d.choice(1, 2, 5)),
        "eps": _number(d, 1e-5, 1e-3),
    }


def _post(d: Draw) -> Arguments:
    streams = _streams(d)
    shared = d.rng.random() < 0.3
    return {
        "streams": streams,
        "branch_output": d.float(d.outer, d.inner, d.d),
        "coefficients": d.wide(d.n, d.n + 2) if shared else d.wide(d.outer, d.inner, d.n, d.n + 2),
    }


def _saved_numbers(d: Draw, forward: Arguments) -> Arguments:
    numbers = (d.outer, d.inner, d.n, d.n + 2) if forward["norm"] else (0,)
    return {
        "grad_branch_input": d.float(d.outer, d.inner, d.d),
        "grad_coefficients": d.maybe(d.wide(*numbers)) if forward["norm"] else None,
        "next_coefficients": d.wide(*numbers),
        "logits": d.wide(*numbers),
        "statistics": d.wide(d.outer, d.inner, d.n, 3) if forward["norm"] else d.wide(0),
    }


def _grad_out(d: Draw, forward: Arguments) -> Arguments:
    return {"grad_out": d.float(d.outer, d.inner, d.n, d.d)}


def _as_connection(norm: int, form: int, **given: Any) -> XF.Connection:
    return XF.Connection(norm=_NORMS[norm] if norm else "layer", form=_FORMS[form] if norm else "identity", **given)


def _pre_formula(streams: Tensor, norm: int, **connection: Any) -> tuple[Tensor | None, ...]:
    x, c = reference.hyper_pre(streams, _as_connection(norm, **connection))
    return x, c if norm else None, None, None


def _post_pre_formula(
    streams: Tensor, branch_output: Tensor, coefficients: Tensor, norm: int, **connection: Any
) -> tuple[Tensor | None, ...]:
    given = _as_connection(norm, **connection)
    out, x, c = reference.hyper_post_pre(streams, branch_output, coefficients, given)
    return out, x, c if norm else None, None, None


# ---- quantize --------------------------------------------------------------------------------------------------------


def _vq_nearest(d: Draw) -> Arguments:
    if not d.hostile:
        d.sizes |= {"K": d.choice(1, 2, 3, 17, 65), "D": d.choice(1, 2, 3, 16, 65)}
    x, codebook = d.float(d.h, d.N, d.D), d.float(d.h, d.K, d.D)
    return {"x": x, "codebook": codebook, "cosine": d.flag(), "tf32": False}


def _vq_nearest_formula(x: Tensor, codebook: Tensor, cosine: bool, tf32: bool) -> tuple[Tensor | None, ...]:
    return None, reference.vq_nearest(x, codebook, "cosine" if cosine else "euclidean")[1]


def _vq_statistics(d: Draw) -> Arguments:
    return {
        "x": d.float(d.h, d.N, d.D),
        "indices": d.index(d.h, d.N),
        "codebook_size": _integer(d, d.choice(1, 2, 3, 65)),
    }


def _levels(d: Draw) -> list[int]:
    width = d.size("c", (1, 2, 3, 7, 17, 64))
    return [d.choice(3, 4, 5, 8, 1000, 2**20) for _ in range(width)]


def _fsq(d: Draw) -> Arguments:
    offset, levels = d.flag(), _levels(d)
    columns = zip(*reference.quantize.fsq_offsets(levels, d.choice("package", "paper")), strict=True)
    shift, half, middle = (list(column) for column in columns) if offset else ([], [], [])
    lead = [d.N, d.T][: d.choice(0, 1, 2)]
    z = d.float(*lead, d.c)
    given = {"z": z, "levels": levels, "shift": shift, "half": half, "middle": middle, "offset": offset}
    return given | {"keep": d.flag()}


def _fsq_formula(z: Tensor, levels: list[int], offset: bool, half: list[float], **rest: Any) -> tuple[Any, ...]:
    paper = bool(offset) and half[0] < (levels[0] - 1) / 2
    bound, variant = "offset" if offset else "tanh", "paper" if paper else "package"
    return reference.fsq(z, levels, bound=bound, variant=variant)[0], None, None


OPERATORS = {
    "masked_mean": Recipe(
        _masked_mean,
        lambda x, mask: (reference.masked_mean(x, mask),),
        gradients=("x",),
        upstream=(("grad", 0),),
        extras=_masked_mean_extras,
    ),
    "ema_scan": Recipe(
        _ema_scan,
        lambda **given: (reference.ema_scan(**given),),
        gradients=("x", "gate_logits", "initial_state", "norm_weight", "norm_bias"),
        upstream=(("grad", 0),),
        extras=_ema_scan_extras,
    ),
    "depth_gru": Recipe(
        _depth_gru,
        lambda keep, **given: (reference.depth_gru(**given), None),
        gradients=("x", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "initial_state"),
        upstream=(("grad", 0),),
        kept=(("states", 0), ("gates", 1)),
        extras=_depth_gru_extras,
    ),
    "depth_attention": Recipe(
        _depth_attention,
        _depth_attention_formula,
        gradients=("keys", "values", "weight_query", "weight_out", "initial_state"),
        upstream=(("grad", 0),),
        kept=(("states", 0), ("attended", 1)),
        extras=_depth_attention_extras,
    ),
    "hdim_attention": Recipe(
        _hdim_attention,
        _hdim_formula,
        gradients=("query", "key", "value", "weight1", "bias1", "weight2"),
        upstream=(("grad_context", 0),),
        kept=(("context", 0), ("statistics", 1)),
        extras=_hdim_extras,
        smooth=lambda given: given["gelu"],  # rounding chooses a side of relu's kink
    ),
    "hyper_pre": Recipe(
        lambda d: {"streams": _streams(d)} | _connection(d),
        _pre_formula,
        gradients=("streams", "base", "weight", "bias", "scale"),
        upstream=(("grad_branch_input", 0), ("grad_coefficients", 1)),
        kept=(("next_coefficients", 1), ("logits", 2), ("statistics", 3)),
        extras=_saved_numbers,
    ),
    "hyper_post": Recipe(
        _post,
        lambda **given: (reference.hyper_post(**given),),
        gradients=("streams", "branch_output", "coefficients"),
        upstream=(("grad_out", 0),),
        extras=_grad_out,
    ),
    "hyper_post_pre": Recipe(
        lambda d: _post(d) | _connection(d),
        _post_pre_formula,
        gradients=("streams", "branch_output", "coefficients", "base", "weight", "bias", "scale"),
        upstream=(("grad_out", 0), ("grad_branch_input", 1), ("grad_coefficients", 2)),
        kept=(("next_coefficients", 2), ("logits", 3), ("statistics", 4)),
        extras=lambda d, forward: _saved_numbers(d, forward) | _grad_out(d, forward),
    ),
    "vq_nearest": Recipe(_vq_nearest, _vq_nearest_formula),
    "vq_statistics": Recipe(_vq_statistics, lambda **given: reference.vq_statistics(**given)),
    "fsq": Recipe(_fsq, _fsq_formula, loose=True),
}


@functools.cache
def operators() -> list[str]:
    """Names of all operators of the library, forward and backward."""
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("xlayer::"))
    return sorted(name.removeprefix("xlayer::") for name in names)


def recipe_of(operator: str) -> Recipe | None:
    """Returns the recipe that serves the operator; a backward operator is part of its forward's."""
    return OPERATORS.get(operator) or _forward_of(operator)


def _forward_of(operator: str) -> Recipe | None:
    found = OPERATORS.get(operator.removesuffix("_backward"))
    return found if found and found.gradients else None


def draw_operator(operator: str, d: Draw) -> Arguments | None:
    """Draws the operator's arguments by name; returns None without a recipe."""
    recipe = recipe_of(operator)
    if recipe is None:
        return None
    forward = recipe.draw(d)
    return forward if operator in OPERATORS else forward | recipe.extras(d, forward)


# ---- the functional API ----------------------------------------------------------------------------------------------


def _tokens(d: Draw) -> list[int]:
    """Draws leading dimensions."""
    return [d.N, d.T][: d.choice(0, 1, 1, 2)]


def _f_ema_scan(d: Draw) -> Arguments:
    lead = _tokens(d)
    norm = d.maybe(d.wide(d.d))
    return {
        "x": d.float(d.L, *lead, d.d),
        "gate_logits": d.float(d.L),
        "initial_state": d.maybe(d.float(*lead, d.d)),
        "norm_weight": norm,
        "norm_bias": d.maybe(d.wide(d.d)) if norm else None,
        "eps": _number(d, 1e-5),
        "last_only": d.flag(),
    }


def _f_depth_gru(d: Draw) -> Arguments:
    lead = _tokens(d)
    return {
        "x": d.float(d.L, *lead, d.i),
        "weight_ih": d.float(3 * d.d, d.i),
        "weight_hh": d.float(3 * d.d, d.d),
        "bias_ih": d.maybe(d.float(3 * d.d)),
        "bias_hh": d.maybe(d.float(3 * d.d)),
        "initial_state": d.maybe(d.float(*lead, d.d)),
    }


def _f_depth_attention(d: Draw) -> Arguments:
    lead, inner = _tokens(d), _heads(d) * d.w
    return {
        "x": d.float(d.L, *lead, d.i),
        "weight_query": d.float(inner, d.d),
        "weight_key": d.float(inner, d.i),
        "weight_value": d.float(inner, d.i),
        "weight_out": d.float(d.d, inner),
        "initial_state": d.maybe(d.float(*lead, d.d)),
        "num_heads": _integer(d, d.h),
        "window": _integer(d, d.choice(1, 2, 4)),
    }


def _attention_options(d: Draw) -> Arguments:
    return {
        "key_mask": d.maybe(d.mask(d.B, d.Sk)),
        "attn_mask": d.maybe(d.mask(d.B, d.Sq, d.Sk)),
        "temperature": _number(d, 1.0, 2.0),
        "return_entropy": d.flag(),
    }


def _attention(d: Draw) -> Arguments:
    return {
        "query": d.float(d.B, d.Sq, d.D),
        "key": d.float(d.B, d.Sk, d.D),
        "value": d.float(d.B, d.Sk, d.H),
    }


def _f_hdim_attention(d: Draw) -> Arguments:
    given = _attention(d) | {"weight1": d.float(d.M, 4 * d.D), "bias1": d.float(d.M), "weight2": d.float(d.M)}
    return given | {"bias2": d.float(1), "activation": d.choice("relu", "gelu")} | _attention_options(d)


def _f_value_fusion(d: Draw) -> Arguments:
    mode, blocks = d.choice(("concat_only", 2), ("concat_hadam", 3), ("concat_diff_hadam", 4))
    lead = [d.B, d.S][: d.choice(1, 2)]
    return {
        "context": d.float(*lead, d.H),
        "hidden": d.float(*lead, d.H),
        "weight": d.float(d.E, blocks * d.H),
        "bias": d.maybe(d.float(d.E)),
        "mode": mode,
    }


def _f_connection(d: Draw) -> Arguments:
    """Draws the fields of a Connection, under names that `assembled` recognizes."""
    given = _connection(d)
    norm, form = given["norm"], given["form"]
    if norm in range(4) and form in range(4):
        given |= {"norm": _NORMS[norm] if norm else "layer", "form": _FORMS[form]}
    return {f"connection.{name}": value for name, value in given.items()}


def _f_streams(d: Draw) -> Arguments:
    streams = _streams(d)
    lead = [d.outer, d.inner][d.choice(0, 0, 1, 2) :]
    return {"streams": Spec([*lead, d.n, d.d], streams.dtype, streams.fill, streams.layout)}


def _f_post(d: Draw) -> Arguments:
    given = _f_streams(d)
    lead = given["streams"].shape[:-2]
    numbers = d.wide(d.n, d.n + 2) if d.rng.random() < 0.3 else d.wide(*lead, d.n, d.n + 2)
    return given | {"branch_output": d.float(*lead, d.d), "coefficients": numbers}


def _f_vq_nearest(d: Draw) -> Arguments:
    if not d.hostile:
        d.sizes |= {"K": d.choice(1, 2, 3, 17, 65), "D": d.choice(1, 2, 3, 16, 65)}
    lead = [d.h] if d.flag() else []
    metric = d.choice("euclidean", "cosine")
    return {"x": d.float(*lead, d.N, d.D), "codebook": d.float(*lead, d.K, d.D), "metric": metric}


def _f_vq_statistics(d: Draw) -> Arguments:
    lead = [d.h] if d.flag() else []
    codebook_size = _integer(d, d.choice(1, 2, 3, 65))
    return {"x": d.float(*lead, d.N, d.D), "indices": d.index(*lead, d.N), "codebook_size": codebook_size}


def _f_fsq(d: Draw) -> Arguments:
    levels = _levels(d)
    given = {"z": d.float(*_tokens(d), d.c), "levels": levels, "bound": d.choice("tanh", "offset")}
    return given | {"variant": d.choice("package", "paper")}


def _f_codes(d: Draw) -> Arguments:
    levels = _levels(d)
    return {"codes": d.float(*_tokens(d), d.c), "levels": levels, "bound": d.choice("tanh", "offset")}


def _f_indices(d: Draw) -> Arguments:
    levels = _levels(d)
    digits = reference.quantize.fsq_basis(levels) is None
    lead = _tokens(d)
    indices = d.index(*lead, d.c) if digits else d.index(*lead)
    return {"indices": indices, "levels": levels, "bound": d.choice("tanh", "offset")}


def _labels(d: Draw, *shape: int) -> Spec:
    if not d.hostile:
        d.size("V", (1, 2, 3, 17, 65))  # label 0 is one of them
    return Spec(list(shape), torch.int64, "wild" if d.hostile and d.flag() else "zeros")


def _soft(d: Draw) -> Spec:
    return d.float(d.B, d.K, d.d)


FUNCTIONS: dict[str, Callable[[Draw], Arguments]] = {
    "bag_of_words_loss": lambda d: {
        "input_ids": _labels(d, d.B, d.T),
        "logits": d.float(d.B, d.V),
        "mask": d.maybe(d.mask(d.B, d.T)),
    },
    "batch_diversity_loss": lambda d: {"soft": _soft(d)},
    "bilinear_attention": lambda d: _attention(d) | {"weight": d.float(d.D, d.D)} | _attention_options(d),
    "cosine_anchor_loss": lambda d: {
        "soft": _soft(d),
        "anchor": d.float(d.B, d.T, d.d),
        "anchor_mask": d.maybe(d.mask(d.B, d.T)),
    },
    "cosine_attention": lambda d: _attention(d) | _attention_options(d),
    "depth_attention": _f_depth_attention,
    "depth_gru": _f_depth_gru,
    "ema_scan": _f_ema_scan,
    "first_k_weights": lambda d: {"labels": _labels(d, d.B, d.T), "k": _integer(d, 2), "weight": _number(d, 2.0)},
    "fsq": _f_fsq,
    "fsq_codes_to_indices": _f_codes,
    "fsq_indices_to_codes": _f_indices,
    "hdim_attention": _f_hdim_attention,
    "hyper_post": _f_post,
    "hyper_post_pre": lambda d: _f_post(d) | _f_connection(d),
    "hyper_pre": lambda d: _f_streams(d) | _f_connection(d),
    "info_nce_loss": lambda d: {
        "soft": _soft(d),
        "positives": d.maybe(d.float(d.B, d.d)),
        "temperature": _number(d, 0.07),
    },
    "language_modeling_loss": lambda d: {
        "labels": _labels(d, d.B, d.T),
        "logits": d.float(d.B, d.T, d.V),
        "first_k": d.maybe(_integer(d, 2)),
        "first_weight": _number(d, 2.0),
    },
    "masked_mean": _masked_mean,
    "reconstruction_loss": lambda d: {
        "projected": _soft(d),
        "source": d.float(d.B, d.T, d.d),
        "mask": d.maybe(d.mask(d.B, d.T)),
    },
    "value_fusion": _f_value_fusion,
    "variance_diversity_loss": lambda d: {"z": d.float(d.B, d.T, d.c), "eps": _number(d, 1e-8)},
    "vq_nearest": _f_vq_nearest,
    "vq_statistics": _f_vq_statistics,
}


def functions() -> list[str]:
    """Names of all public functions; `Connection` is an argument of some."""
    return sorted(set(XF.__all__) - {"Connection"})


def assembled(arguments: Arguments) -> Arguments:
    """Returns a function's arguments, with the Connection made of its fields."""
    fields = {name.removeprefix("connection."): value for name, value in arguments.items() if "." in name}
    plain = {name: value for name, value in arguments.items() if "." not in name}
    return plain | {"connection": XF.Connection(**fields)} if fields else plain
