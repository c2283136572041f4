"""Lists calls of every operator for tests that are the same for all (tests/ops/test_torch_contract.py).

``CALLS`` go through the functional API, ``DIRECT`` ones straight to ``torch.ops.xlayer``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from aggregate_tools import OPERATORS as AGGREGATE
from aggregate_tools import aggregate_case
from hyper_tools import HyperCase, hyper_case, pack
from oracle import FLOATS, HdimCase, draw, fresh_generator, hdim_case
from xlayer_ext import functional as XF
from xlayer_ext.functional import Connection
from xlayer_ext.functional.hyper import _operator_arguments, _post_arguments
from xlayer_ext.functional.quantize import _operator_levels

OPS = torch.ops.xlayer
HYPER = ("hyper_pre", "hyper_post", "hyper_post_pre")
QUANTIZE = ("vq_nearest", "vq_statistics", "fsq")
LAYERS, WIDTH = 3, 12
LEVELS = [8, 5, 5]

# ---- the functional API ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """Describes calls of the functional API: a function of tensors, or of tuples and dicts of them.

    Attributes:
        operators: the operators that it runs on the native backend.
        draw: draws inputs: ``draw(generator, dtype, *sizes)``.
        sizes: sizes of the dynamic dimensions, for several calls.
        layouts: names of each input's dimensions, ``_`` for a static one; inputs without a layout are static.
        dtype: of the inputs where torch traces the function.
        constant: which of the floating-point inputs get no gradient, by position.
    """

    operators: frozenset[str]
    function: Callable[..., Any]
    draw: Callable[..., tuple[Any, ...]]
    sizes: tuple[tuple[int, ...], ...]
    layouts: tuple[str | None, ...] = ()
    dtype: torch.dtype = torch.float64
    constant: tuple[int, ...] = ()


def draw_masked_mean(generator: torch.Generator, dtype: torch.dtype, *sizes: int) -> tuple[Tensor, ...]:
    """Draws hidden states and a mask whose last row allows no token."""
    x, mask = draw(generator, *sizes, dtype=dtype), torch.rand(sizes[:2], generator=generator) < 0.7
    mask[-1:] = False
    return x, mask


def _aggregate(op: str, **options: int) -> Call:
    def call(tensors: dict[str, Tensor]) -> Tensor:
        states: Tensor = getattr(XF, op)(**tensors, **options)
        return states

    def inputs(generator: torch.Generator, dtype: torch.dtype, tokens: int) -> tuple[Any, ...]:
        return (aggregate_case(generator, op, (LAYERS, tokens, WIDTH), inputs=7).to(dtype).tensors,)

    return Call(frozenset([op]), call, inputs, ((5,),))


def _aggregate_chain(x: Tensor, *parameters: Tensor) -> Tensor:
    """Calls all aggregation operators in a row."""
    gates, weight, bias, *recurrent = parameters
    states = XF.ema_scan(x, gates, norm_weight=weight, norm_bias=bias)
    states = XF.depth_attention(XF.depth_gru(states, *recurrent[:4]), *recurrent[4:], num_heads=2, window=2)
    return states * XF.ema_scan(x, gates, last_only=True)


def _draw_aggregate_chain(generator: torch.Generator, dtype: torch.dtype, tokens: int) -> tuple[Tensor, ...]:
    shapes = [(LAYERS,), (WIDTH,), (WIDTH,)]  # of ema_scan
    shapes += [(3 * WIDTH, WIDTH)] * 2 + [(3 * WIDTH,)] * 2  # of depth_gru
    shapes += [(WIDTH, WIDTH)] * 4  # of depth_attention
    x = draw(generator, LAYERS, tokens, WIDTH, dtype=dtype)
    return x, *(draw(generator, *shape, dtype=dtype) / 4 for shape in shapes)


def _hdim(*sizes: tuple[int, int, int], key_mask: bool = False, attn_mask: bool = False, entropy: bool = False) -> Call:
    def call(*tensors: Any) -> Any:
        *floats, keys, pairs = tensors
        return XF.hdim_attention(*floats, key_mask=keys, attn_mask=pairs, return_entropy=entropy)

    def inputs(generator: torch.Generator, dtype: torch.dtype, b: int, sq: int, sk: int) -> tuple[Any, ...]:
        shape = (b, sq, sk, 24, 33, 20)
        case = hdim_case(generator, sizes=shape, dtype=dtype, key_mask=key_mask, attn_mask=attn_mask)
        return *(case.floats[name] for name in FLOATS), case.masks["key_mask"], case.masks["attn_mask"]

    keys = "batch keys"
    layouts = ("batch queries", keys, keys, *[None] * 4, keys if key_mask else None, None)
    if attn_mask:
        layouts = (*layouts[:-1], "batch queries keys")
    return Call(frozenset(["hdim_attention"]), call, inputs, sizes, layouts)


def _hyper(part: str, kind: str = "dhc") -> Call:
    def inputs(generator: torch.Generator, dtype: torch.dtype, *lead: int) -> tuple[Any, ...]:
        case = hyper_case(generator, kind=kind, lead=lead).to(dtype)
        post = (case.branch_output, case.coefficients) if "post" in part else ()
        return case.streams, *post, *([case.connection] if "pre" in part else [])

    function = getattr(XF, f"hyper_{part}")
    return Call(frozenset([f"hyper_{part}"]), function, inputs, ((2, 5), (3, 7), (4, 11), (2, 6)))


def _hyper_chain(streams: Tensor, y: Tensor, base: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    connection = Connection(base, weight, None, scale, "rms", "tanh")
    x, c = XF.hyper_pre(streams, connection)
    return XF.hyper_post_pre(streams, y + x, c, connection)[:2]


def _draw_hyper_chain(generator: torch.Generator, dtype: torch.dtype, *lead: int) -> tuple[Any, ...]:
    case = hyper_case(generator, kind="dhc-rms", lead=lead, d=12).to(dtype)
    base, weight, _, scale = case.connection[:4]
    return case.streams, case.branch_output, base, weight, scale


def quantize_chain(x: Tensor, codebook: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    """Calls all quantization operators in one function, with a gradient to z."""
    indices, distance = XF.vq_nearest(x, codebook)
    counts, sums = XF.vq_statistics(x, indices, codebook.shape[-2])
    codes, numbers = XF.fsq(z, LEVELS, bound="offset")
    return indices, distance, counts, sums, codes * codes, numbers


def draw_quantize(
    generator: torch.Generator, dtype: torch.dtype, rows: int, codes: int, tokens: int
) -> tuple[Tensor, ...]:
    shapes = ((rows, 12), (codes, 12), (2, tokens, len(LEVELS)))
    return tuple(draw(generator, *shape, dtype=dtype) for shape in shapes)


CALLS: dict[str, Call] = {
    "masked_mean": Call(
        frozenset(["masked_mean"]), XF.masked_mean, draw_masked_mean, ((2, 5, 8), (3, 7, 4), (4, 11, 6)),
        ("batch tokens width", "batch tokens"),
    ),
    "ema_scan": _aggregate("ema_scan"),
    "depth_gru": _aggregate("depth_gru"),
    "depth_attention": _aggregate("depth_attention", num_heads=2, window=3),
    "aggregate chain": Call(
        frozenset(AGGREGATE), _aggregate_chain, _draw_aggregate_chain,
        ((5,), (7,), (11,), (6,)), ("_ tokens",), torch.float32,
    ),
    "hdim_attention": _hdim((2, 19, 37)),
    "hdim_attention, key mask": _hdim((2, 19, 37), (3, 11, 4), key_mask=True),
    "hdim_attention, masks, entropy": _hdim(
        (2, 5, 7), (3, 9, 4), (4, 12, 31), (2, 6, 6), key_mask=True, attn_mask=True, entropy=True
    ),
    "hyper_pre": _hyper("pre"),
    "hyper_post": _hyper("post"),
    "hyper_post_pre, shc": _hyper("post_pre", "shc"),
    "hyper_post_pre, dhc": _hyper("post_pre", "dhc"),
    "hyper_post_pre, mhc": _hyper("post_pre", "mhc"),
    "hyper chain": Call(
        frozenset(["hyper_pre", "hyper_post_pre"]), _hyper_chain, _draw_hyper_chain, ((2, 5), (3, 11)),
        ("batch tokens", "batch tokens"),
    ),
    "quantize chain": Call(
        frozenset(QUANTIZE), quantize_chain, draw_quantize,
        ((5, 8, 5), (7, 10, 7), (11, 14, 11), (6, 9, 6)), ("rows", "codes", "_ tokens"), torch.float32, (0, 1),
    ),
}  # fmt: skip

# ---- the operators themselves ----------------------------------------------------------------------------------------

Arguments = dict[str, tuple[Any, ...]]  # by operator


@dataclass(frozen=True)
class Direct:
    """Describes direct calls of the operators of a family, their backward among them.

    Attributes:
        operators: the operators without their backward.
        arguments: draws arguments: ``arguments(device, dtype)``.
        dtypes: the dtypes of opcheck.
        tolerance: of opcheck, for operators where its own is too strict.
        accepts: changes of one argument, by operator, that leave its call valid.
    """

    operators: tuple[str, ...]
    arguments: Callable[[str, torch.dtype], Arguments]
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.bfloat16)
    tolerance: Mapping[str, float] = field(default_factory=dict)
    accepts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def masked_mean_arguments(device: str, dtype: torch.dtype, masked: bool) -> Arguments:
    x, mask = (t.to(device) for t in draw_masked_mean(fresh_generator(), dtype, 2, 4, 3))
    chosen = mask if masked else None
    return {"masked_mean": (x, chosen), "masked_mean_backward": (x[:, 0], chosen, 4)}


def aggregate_arguments(device: str, dtype: torch.dtype, initial_state: bool = True) -> Arguments:
    generator, wide = fresh_generator(), torch.promote_types(dtype, torch.float32)

    def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return draw(generator, *shape, dtype=dtype).to(device)

    rows = (LAYERS, 5, WIDTH)
    start = make(*rows[1:]) if initial_state else None
    ema = (make(*rows), make(LAYERS, dtype=wide), start, make(WIDTH, dtype=wide), make(WIDTH, dtype=wide), 1e-5, False)
    square = (3 * WIDTH, WIDTH)
    gru = (make(*rows), make(*square), make(*square))
    taps = (make(*rows), make(*rows), make(WIDTH, WIDTH), make(WIDTH, WIDTH), start, 2, 2, 0.5)
    return {
        "ema_scan": ema,
        "ema_scan_backward": (make(*rows), *ema),
        "depth_gru": (*gru, make(3 * WIDTH), make(3 * WIDTH), start, True),
        "depth_gru_backward": (make(*rows), make(*rows), make(*rows[:2], 4, WIDTH), *gru, start),
        "depth_attention": (*taps, True),
        "depth_attention_backward": (make(*rows), make(*rows), make(*rows), *taps),
    }


def hdim_forward_arguments(case: HdimCase) -> tuple[Any, ...]:
    floats = [case.floats[name] for name in FLOATS[:6]]
    gelu = case.options.get("activation") == "gelu"
    return (*floats, case.masks["key_mask"], case.masks["attn_mask"], 0.9, gelu, False)


def hdim_arguments(device: str, dtype: torch.dtype, masked: bool) -> Arguments:
    """Makes arguments whose backward has a gradient of the entropy where they have masks."""
    sizes, masks = (2, 3, 5, 4, 6, 3), {"key_mask": masked, "attn_mask": masked}
    case = hdim_case(fresh_generator(), sizes=sizes, dtype=dtype, device=device, **masks)
    forward = hdim_forward_arguments(case)
    outputs = OPS.hdim_attention(*forward)
    grad_entropy = torch.ones_like(outputs[2]) if masked else None
    backward = (case.grad_context, grad_entropy, *forward[:8], *outputs[:2], *forward[8:])
    return {"hdim_attention": forward, "hdim_attention_backward": backward}


def hyper_arguments(case: HyperCase) -> Arguments:
    post = _post_arguments(case.streams, case.branch_output, case.coefficients)
    connection = _operator_arguments(case.connection)
    streams = post[0]
    dynamic = case.connection.weight is not None
    _, *pre = OPS.hyper_pre(streams, *connection)
    out, x, *both = OPS.hyper_post_pre(*post, *connection)
    grad_out, grad_x = torch.ones_like(out), torch.ones_like(x)
    return {
        "hyper_pre": (streams, *connection),
        "hyper_post": post,
        "hyper_post_pre": (*post, *connection),
        "hyper_pre_backward": (grad_x, torch.ones_like(pre[0]) if dynamic else None, streams, *pre, *connection),
        "hyper_post_backward": (grad_out, *post),
        "hyper_post_pre_backward": (grad_out, grad_x, None, *post, *both, *connection),
    }


def quantize_arguments(device: str, dtype: torch.dtype, bound: str) -> Arguments:
    generator = fresh_generator()
    x, codebook = (draw(generator, 2, rows, 12, dtype=dtype).to(device) for rows in (9, 7))
    z = draw(generator, 4, 6, len(LEVELS), dtype=dtype).to(device)
    levels = _operator_levels(LEVELS, bound, "package")
    indices = torch.randint(-1, 7, (2, 9), generator=generator).to(device)
    return {
        "vq_nearest": (x, codebook, False, False),
        "vq_statistics": (x, indices, 7),
        "fsq": (z, *levels, True),
    }


def _direct_masked_mean(masked: bool) -> Direct:
    # Without a mask nothing has to agree with x.
    alone = {} if masked else dict.fromkeys(("masked_mean", "masked_mean_backward"), ("size", "meta"))
    return Direct(
        ("masked_mean",),
        lambda device, dtype: masked_mean_arguments(device, dtype, masked),
        dtypes=(torch.float32,),
        accepts=alone,
    )


def _direct_aggregate(initial_state: bool) -> Direct:
    return Direct(AGGREGATE, lambda device, dtype: aggregate_arguments(device, dtype, initial_state))


# opcheck compares with a float32 run, too strictly for bfloat16; the oracle rule covers the values.
def _direct_hdim(masked: bool) -> Direct:
    loose = {"hdim_attention": 1e-2}
    return Direct(("hdim_attention",), lambda device, dtype: hdim_arguments(device, dtype, masked), tolerance=loose)


def _direct_hyper(kind: str, packed: bool) -> Direct:
    def arguments(device: str, dtype: torch.dtype) -> Arguments:
        case = hyper_case(fresh_generator(), kind=kind, lead=(2, 3), n=2, d=5, device=device).to(dtype)
        return hyper_arguments(replace(case, streams=pack(case.streams)) if packed else case)

    loose = dict.fromkeys([*HYPER, *(f"{op}_backward" for op in HYPER)], 3e-2)
    return Direct(HYPER, arguments, tolerance=loose)


def _direct_quantize(bound: str) -> Direct:
    # fsq takes any rank, and one tensor alone may be on any device.
    alone = {"fsq": ("rank", "meta")}
    return Direct(QUANTIZE, lambda device, dtype: quantize_arguments(device, dtype, bound), accepts=alone)


DIRECT: dict[str, Direct] = {
    "masked_mean": _direct_masked_mean(False),
    "masked_mean, mask": _direct_masked_mean(True),
    "aggregate": _direct_aggregate(False),
    "aggregate, initial state": _direct_aggregate(True),
    "hdim": _direct_hdim(False),
    "hdim, masks": _direct_hdim(True),
    **{f"hyper, {kind}": _direct_hyper(kind, False) for kind in ("shc", "dhc", "mhc")},
    **{f"hyper, {kind}, packed": _direct_hyper(kind, True) for kind in ("shc", "dhc", "mhc")},
    **{f"quantize, {bound}": _direct_quantize(bound) for bound in ("tanh", "offset")},
}
