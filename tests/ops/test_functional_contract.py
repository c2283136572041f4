"""The contract of every public function: bad arguments are named, absurd ones end at once, empty ones have
gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from oracle import draw, fresh_generator, need_native
from xlayer_ext import backend
from xlayer_ext import functional as XF
from xlayer_ext.functional import Connection

NAN, INF = float("nan"), float("inf")
HUGE, TOO_BIG = 2**62, 2**64  # the second is no int64


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def ids(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def mask(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


TEMPERATURES = [0.0, -1.0, NAN, INF, 10**400, "1", None]
COUNTS = [0, -1, TOO_BIG, 1.5, "4", None]
LEVELS = [[], 5, None, [8, 5, 1], [8, 5, HUGE], [8, 5, TOO_BIG], [8, 5, 2.0], "855", [8, 5]]
ATTENTION = {"query": ones(2, 3, 4), "key": ones(2, 5, 4), "value": ones(2, 5, 6)}
MASKS = {"key_mask": mask(2, 5), "attn_mask": mask(2, 3, 5)}
SCORER = {"weight1": ones(7, 16), "bias1": ones(7), "weight2": ones(7), "bias2": ones(1)}
POST = {"streams": ones(2, 3, 4, 8), "branch_output": ones(2, 3, 8), "coefficients": ones(2, 3, 4, 6)}
CONNECTION = Connection(ones(4, 6), ones(6, 8), ones(6), ones(6))
MANIFOLD = CONNECTION._replace(form="sinkhorn_rows", bias=None)
CONNECTIONS = [None, (1, 2), "identity"]

# Of each function: a call that is right, and values of its other arguments that are not.
CALLS: dict[str, tuple[dict[str, Any], dict[str, list[Any]]]] = {
    "bag_of_words_loss": ({"logits": ones(2, 9), "input_ids": ids(2, 3), "mask": mask(2, 3)},
                          {"input_ids": [ids(2, 3) + 9, ids(2, 3) - 1]}),
    "batch_diversity_loss": ({"soft": ones(3, 2, 4)}, {}),
    "bilinear_attention": (ATTENTION | MASKS | {"weight": ones(4, 4)}, {"temperature": TEMPERATURES}),
    "cosine_anchor_loss": ({"soft": ones(3, 2, 4), "anchor": ones(3, 5, 4), "anchor_mask": mask(3, 5)}, {}),
    "cosine_attention": (ATTENTION | MASKS, {"temperature": TEMPERATURES}),
    "depth_attention": ({"x": ones(3, 2, 5), "weight_query": ones(6, 8), "weight_key": ones(6, 5),
                         "weight_value": ones(6, 5), "weight_out": ones(8, 6), "initial_state": ones(2, 8)},
                        {"num_heads": [*COUNTS, 4, HUGE], "window": COUNTS}),
    "depth_gru": ({"x": ones(3, 2, 5), "weight_ih": ones(24, 5), "weight_hh": ones(24, 8), "bias_ih": ones(24),
                   "bias_hh": ones(24), "initial_state": ones(2, 8)}, {}),
    "ema_scan": ({"x": ones(3, 2, 8), "gate_logits": ones(3), "initial_state": ones(2, 8), "norm_weight": ones(8),
                  "norm_bias": ones(8)}, {"eps": [NAN, INF, -1.0, "x", None], "last_only": ["yes", None]}),
    "first_k_weights": ({"labels": ids(2, 3), "k": 1, "weight": 2.0},
                        {"k": [-1, TOO_BIG, 1.0, None], "weight": [NAN, INF, -1.0, "2", None]}),
    "fsq": ({"z": ones(2, 3), "levels": [8, 5, 4]}, {"levels": LEVELS, "bound": ["sine", None], "variant": ["old"]}),
    "fsq_codes_to_indices": ({"codes": ones(2, 3), "levels": [8, 5, 4]}, {"levels": LEVELS, "bound": ["sine", 1]}),
    "fsq_indices_to_codes": ({"indices": ids(2), "levels": [8, 5, 4]},
                             {"levels": LEVELS[:-1], "bound": ["sine"], "dtype": [torch.int64, None, "float32"]}),
    "hdim_attention": (ATTENTION | MASKS | SCORER, {"temperature": TEMPERATURES, "activation": ["tanh", None]}),
    "hyper_post": (POST, {}),
    "hyper_post_pre": (POST | {"connection": CONNECTION}, {"connection": CONNECTIONS}),
    "hyper_pre": ({"streams": POST["streams"], "connection": CONNECTION}, {"connection": CONNECTIONS}),
    "info_nce_loss": ({"soft": ones(3, 2, 4), "positives": ones(3, 4)}, {"temperature": TEMPERATURES}),
    "language_modeling_loss": ({"logits": ones(2, 3, 9), "labels": ids(2, 3)},
                               {"labels": [ids(2, 3) + 9, ids(2, 3) - 1, ids(2, 4)],
                                "first_k": [-1, TOO_BIG, 1.0, "1"], "first_weight": [NAN, INF, -1.0, None]}),
    "masked_mean": ({"x": ones(2, 3, 4), "mask": mask(2, 3)}, {}),
    "reconstruction_loss": ({"projected": ones(3, 2, 4), "source": ones(3, 5, 4), "mask": mask(3, 5)}, {}),
    "value_fusion": ({"context": ones(2, 3), "hidden": ones(2, 3), "weight": ones(5, 9), "bias": ones(5),
                      "mode": "concat_hadam"}, {"mode": ["sum", None, 3]}),
    "variance_diversity_loss": ({"z": ones(4, 3, 2)}, {"eps": [0.0, -1.0, NAN, INF, "x"]}),
    "vq_nearest": ({"x": ones(4, 3), "codebook": ones(5, 3)},
                   {"metric": ["dot", None], "codebook": [ones(5, 2), ones(0, 3), ones(1, 3).expand(2**40, 3)]}),
    "vq_statistics": ({"x": ones(4, 3), "indices": ids(4), "codebook_size": 5}, {"codebook_size": [*COUNTS, HUGE]}),
}  # fmt: skip
RIGHT_SCALARS = {
    ("hdim_attention", "bias2"),
    ("fsq_indices_to_codes", "indices"),
}  # arguments that may be a tensor without dimensions


def bad_tensors(function: str, name: str, good: Tensor, alone: bool) -> dict[str, Any]:
    bad: dict[str, Any] = {"text": "x", "list": [1.0], "None": None, "complex": good.to(torch.complex64)}
    bad |= {"int32": good.int(), "bool": good != 0} if good.dtype != torch.bool else {"int64": good.long()}
    if good.is_floating_point():
        bad |= {"float8": good.to(torch.float8_e4m3fn), "sparse": good.to_sparse()}
    else:
        bad["float"] = good.float()
    if (function, name) not in RIGHT_SCALARS:
        bad["scalar"] = good.flatten()[0]
    if not alone:
        bad["meta"] = good.to("meta")
    return bad


def bad_calls() -> list[Any]:
    cases = []
    for function, (right, others) in CALLS.items():
        given = [value for value in right.values() if isinstance(value, Tensor)]
        for name, value in right.items():
            if isinstance(value, Tensor):
                bad = bad_tensors(function, name, value, alone=len(given) == 1 and "connection" not in right)
                optional = {
                    "mask",
                    "key_mask",
                    "attn_mask",
                    "anchor_mask",
                    "initial_state",
                    "positives",
                    "bias",
                    "norm_bias",
                }
                if name in optional | {"bias_ih", "bias_hh", "norm_weight"}:
                    del bad["None"]
                cases += [(function, name, wrong, f"{function}-{name}-{kind}") for kind, wrong in bad.items()]
        for name, values in others.items():
            cases += [(function, name, wrong, f"{function}-{name}-{i}") for i, wrong in enumerate(values)]
    return [pytest.param(*case, id=id) for *case, id in cases]


BAD_CALLS = bad_calls()


def test_every_function_is_in_the_table() -> None:
    assert set(CALLS) == set(XF.__all__) - {"Connection"}
    for function in CALLS:
        assert sum(case.values[0] == function for case in BAD_CALLS) >= 5, function


@pytest.mark.parametrize("function", CALLS)
def test_the_calls_of_the_table_are_right(function: str) -> None:
    getattr(XF, function)(**CALLS[function][0])


@pytest.mark.parametrize(("function", "name", "value"), BAD_CALLS)
def test_bad_arguments_are_named(function: str, name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b") as raised:
        getattr(XF, function)(**(CALLS[function][0] | {name: value}))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, wrong) for name in ("base", "weight", "bias", "scale") for wrong in ("x", [1.0], ids(4, 6), ones(3))),
        *((name, getattr(CONNECTION, name).to("meta")) for name in ("base", "weight", "bias", "scale")),
        ("base", None), ("scale", None), ("norm", None), ("norm", "batch"), ("form", 3),
        *(("eps", wrong) for wrong in (NAN, INF, -1.0, "x", None)),
        *(("sinkhorn_iters", wrong) for wrong in (-1, 1001, 2**32, TOO_BIG, 1.5, None)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("function", ["hyper_pre", "hyper_post_pre"])
def test_parts_of_a_connection_are_named(function: str, name: str, value: Any) -> None:
    right = CALLS[function][0]
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
        getattr(XF, function)(**(right | {"connection": CONNECTION._replace(**{name: value})}))


def test_sinkhorn_iterations_end() -> None:
    streams = POST["streams"]
    XF.hyper_pre(streams, MANIFOLD._replace(sinkhorn_iters=1000))
    for sinkhorn_iters in (0, 1001, 2**32):
        with pytest.raises(ValueError, match="sinkhorn_iters must be at"):
            XF.hyper_pre(streams, MANIFOLD._replace(sinkhorn_iters=sinkhorn_iters))


@pytest.mark.parametrize("window", [3, 4, HUGE, 2**63 - 1])
def test_more_memory_than_layers_is_as_much_as_there_are(window: int) -> None:
    given = CALLS["depth_attention"][0]
    assert torch.equal(XF.depth_attention(**given, window=window), XF.depth_attention(**given, window=3))


# ---- nothing to compute ----------------------------------------------------------------------------------------------

MANY = 2**40  # tokens, each of width 0: they take no memory, and a loop over them would not end


def gradients(out: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(given, torch.autograd.grad(out.sum(), list(given.values())), strict=True))


NOTHING: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "masked_mean": lambda t: XF.masked_mean(t["x"], mask(1, 1).expand(2, MANY)),
    "ema_scan": lambda t: XF.ema_scan(t["x"], t["gate_logits"]),
    "ema_scan_last": lambda t: XF.ema_scan(t["x"], t["gate_logits"], last_only=True),
    "depth_gru": lambda t: XF.depth_gru(t["x"], t["weight_ih"], t["weight_hh"]),
    "depth_attention": lambda t: XF.depth_attention(**t, window=HUGE),
    "hdim_attention": lambda t: XF.hdim_attention(**t),
    "bilinear_attention": lambda t: XF.bilinear_attention(**t),
    "cosine_attention": lambda t: XF.cosine_attention(**t),
    "value_fusion": lambda t: XF.value_fusion(**t, bias=None, mode="concat_hadam"),
}
WIDTH_0 = {"query": (1, MANY, 0), "key": (1, MANY, 0), "value": (1, MANY, 0)}
EMPTY_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "masked_mean": {"x": (2, MANY, 0)},
    "ema_scan": {"x": (2, MANY, 0), "gate_logits": (2,)},
    "ema_scan_last": {"x": (2, MANY, 0), "gate_logits": (2,)},
    "depth_gru": {"x": (2, MANY, 0), "weight_ih": (0, 0), "weight_hh": (0, 0)},
    "depth_attention": {"x": (2, MANY, 0), "weight_query": (6, 0), "weight_key": (6, 0), "weight_value": (6, 0),
                        "weight_out": (0, 6)},
    "hdim_attention": {**WIDTH_0, "weight1": (7, 0), "bias1": (7,), "weight2": (7,), "bias2": (1,)},
    "bilinear_attention": {**WIDTH_0, "weight": (0, 0)},
    "cosine_attention": WIDTH_0,
    "value_fusion": {"context": (MANY, 0), "hidden": (MANY, 0), "weight": (0, 0)},
}  # fmt: skip


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("name", NOTHING)
def test_tokens_of_width_0_are_not_counted(name: str, choice: str) -> None:
    given = {key: torch.ones(shape).requires_grad_() for key, shape in EMPTY_SHAPES[name].items()}
    with backend(choice):
        out = NOTHING[name](given)
        assert out.numel() == 0
        for key, grad in gradients(out, given).items():
            assert grad.shape == given[key].shape and not grad.any(), key


def test_searches_and_statistics_of_nothing() -> None:
    indices, distance = XF.vq_nearest(ones(0, 3), ones(1, 3).expand(2**31 - 1, 3))
    assert indices.shape == distance.shape == (0,) and indices.dtype == torch.int64
    indices, distance = XF.vq_nearest(ones(2, 0, 3).bfloat16(), ones(2, 5, 3).bfloat16())
    assert indices.shape == distance.shape == (2, 0) and distance.dtype == torch.float32
    counts, sums = XF.vq_statistics(ones(0, 3), ids(0), 5)
    assert not counts.any() and sums.shape == (5, 3)


def depth_inputs(op: str, layers: int, tokens: int, d: int, dtype: torch.dtype) -> dict[str, Tensor]:
    i, e = 5, 6
    shapes: dict[str, tuple[int, ...]] = {
        "ema_scan": {"x": (layers, tokens, d), "gate_logits": (layers,), "norm_weight": (d,), "norm_bias": (d,)},
        "depth_gru": {"x": (layers, tokens, i), "weight_ih": (3 * d, i), "weight_hh": (3 * d, d),
                      "bias_ih": (3 * d,), "bias_hh": (3 * d,)},
        "depth_attention": {"x": (layers, tokens, i), "weight_query": (e, d), "weight_key": (e, i),
                            "weight_value": (e, i), "weight_out": (d, e)},
    }[op] | {"initial_state": (tokens, d)}  # fmt: skip
    generator = fresh_generator()
    return {name: draw(generator, *shape, dtype=dtype).requires_grad_() for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("sizes", [(0, 3, 8), (0, 0, 8), (0, 3, 0), (3, 0, 8), (3, 4, 0)])
@pytest.mark.parametrize("op", ["ema_scan", "depth_gru", "depth_attention"])
def test_no_layers_no_tokens_no_width(op: str, sizes: tuple[int, ...], choice: str, dtype: torch.dtype) -> None:
    given = depth_inputs(op, *sizes, dtype)
    with backend(choice):
        out = getattr(XF, op)(**given)
        assert out.shape == sizes and out.dtype == dtype
        for name, grad in gradients(out, given).items():
            assert grad.shape == given[name].shape and grad.dtype == dtype and not grad.any(), name


@pytest.mark.parametrize("sizes", [(0, 3, 8), (3, 0, 8), (0, 0, 8)])
@pytest.mark.parametrize("op", ["ema_scan", "depth_gru", "depth_attention"])
def test_the_operators_themselves_take_nothing(op: str, sizes: tuple[int, ...], device: str) -> None:
    need_native(op, device)
    given = {name: t.detach().to(device) for name, t in depth_inputs(op, *sizes, torch.float64).items()}
    start = given.pop("initial_state")
    if op == "depth_attention":
        taps, keys, values = given.pop("x"), given.pop("weight_key"), given.pop("weight_value")
        given = {"keys": taps @ keys.T, "values": taps @ values.T} | given
    leaves = {name: t.requires_grad_() for name, t in (given | {"initial_state": start}).items()}
    x, *rest = leaves.values()
    if op == "ema_scan":
        gates, norm_weight, norm_bias, start = rest
        out = torch.ops.xlayer.ema_scan(x, gates, start, norm_weight, norm_bias, 1e-5, False)
    elif op == "depth_gru":
        out, _ = torch.ops.xlayer.depth_gru(x, *rest, True)
    else:
        out, _ = torch.ops.xlayer.depth_attention(x, *rest, 2, 3, 1.0, True)
    assert out.shape == sizes
    for name, grad in gradients(out, leaves).items():
        assert grad.shape == leaves[name].shape and not grad.any(), name


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_the_last_state_of_no_layers_is_the_initial_one(choice: str) -> None:
    given = depth_inputs("ema_scan", 0, 3, 8, torch.float64)
    with backend(choice):
        out = XF.ema_scan(**given, last_only=True)
        assert torch.equal(out, given["initial_state"])
        for name, grad in gradients(out, given).items():
            assert torch.equal(grad, torch.ones_like(grad) if name == "initial_state" else torch.zeros_like(grad)), name
        del given["initial_state"]
        assert torch.equal(XF.ema_scan(**given, last_only=True), torch.zeros(3, 8, dtype=torch.float64))


# ---- one token -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["concat_only", "concat_hadam", "concat_diff_hadam"])
def test_value_fusion_of_one_token(mode: str) -> None:
    generator = fresh_generator()
    blocks = {"concat_only": 2, "concat_hadam": 3, "concat_diff_hadam": 4}[mode]
    context, hidden = draw(generator, 6), draw(generator, 6)
    weight, bias = draw(generator, 5, blocks * 6), draw(generator, 5)
    out = XF.value_fusion(context, hidden, weight, bias, mode)
    assert out.shape == (5,)
    torch.testing.assert_close(out, XF.value_fusion(context[None], hidden[None], weight, bias, mode)[0])
    torch.testing.assert_close(out, XF.value_fusion(context[None], hidden[None], weight, None, mode)[0] + bias)


def test_value_fusion_of_width_0_is_the_bias() -> None:
    out = XF.value_fusion(ones(2, 3, 0), ones(2, 3, 0), ones(5, 0), torch.arange(5.0), "concat_diff_hadam")
    assert torch.equal(out, torch.arange(5.0).expand(2, 3, 5))
