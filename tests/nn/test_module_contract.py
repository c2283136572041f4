"""The contract of every module: its start, which `reset_parameters` makes again, its options, its errors, its types."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import os
import pickle
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._pytree import tree_leaves

import xlayer_ext.nn as xnn
from oracle import draw, fresh_generator
from xlayer_systems.telepathy.diffusion import DiffusionBridge
from xlayer_systems.telepathy.resampler import PerceiverResampler, RMSScale, StatisticalNormalizer, TanhScale

Make = Callable[[], Any]
INF, NAN = float("inf"), float("nan")
RECIPES: dict[str, list[Make]] = {
    "DepthAttentionAggregator": [lambda: xnn.DepthAttentionAggregator(3, 8, num_heads=2)],
    "DiffusionBridge": [
        lambda: DiffusionBridge(
            6, 8, 3, hidden_size=8, num_layers=2, num_heads=2, conditioning="hybrid", target_scale=0.3
        ),
        lambda: DiffusionBridge(6, 8, 3, hidden_size=8, num_layers=1, num_heads=2, conditioning="cross"),
        lambda: DiffusionBridge(6, 8, 3, hidden_size=8, num_layers=1, num_heads=2, conditioning="pooled"),
    ],
    "EMAAggregator": [lambda: xnn.EMAAggregator(4, 8), lambda: xnn.EMAAggregator(5, 8, tree_checkpoint=2)],
    "FSQ": [lambda: xnn.FSQ([8, 5, 3]), lambda: xnn.FSQ([8, 5, 3], hidden_size=6)],
    "GRUAggregator": [lambda: xnn.GRUAggregator(3, 8)],
    "HDIMMessage": [
        lambda: xnn.HDIMMessage(16, proj_dim=4, mlp_dim=6, value_residual=True, alpha_init=0.1, norm_projections=True),
        lambda: xnn.HDIMMessage(16, proj_dim=4, scorer="bilinear", share_projections=True),
        lambda: xnn.HDIMMessage(16, proj_dim=4, scorer="cosine"),
    ],
    "HyperConnection": [
        lambda: xnn.HyperConnection(8, layer_index=2),
        lambda: xnn.HyperConnection(8, norm="rms"),
        lambda: xnn.HyperConnection(8, expansion_rate=2, static_weights=True),
        lambda: xnn.HyperConnection(8, disable=True),
    ],
    "LayerRouter": [lambda: xnn.LayerRouter(16, route_dim=4), lambda: xnn.LayerRouter(16, route_dim=4, query_mlp=True)],
    "ManifoldHyperConnection": [
        lambda: xnn.ManifoldHyperConnection(8, layer_index=1),
        lambda: xnn.ManifoldHyperConnection(8, coefficients="per_stream"),
        lambda: xnn.ManifoldHyperConnection(8, expansion_rate=1),
        lambda: xnn.ManifoldHyperConnection(8, disable=True),
    ],
    "PerceiverResampler": [lambda: PerceiverResampler(6, 8, 3, num_layers=2, num_heads=2)],
    "QKVMessage": [lambda: xnn.QKVMessage(2, 4), lambda: xnn.QKVMessage(2, 4, extra_value_projection=True)],
    "RMSScale": [lambda: RMSScale(0.3)],
    "StatisticalNormalizer": [
        lambda: StatisticalNormalizer(4, 4),
        lambda: StatisticalNormalizer(4, 6, learnable=True),
    ],
    "TanhScale": [lambda: TanhScale(0.3)],
    "TapProjector": [lambda: xnn.TapProjector(3, 8, 4), lambda: xnn.TapProjector(3, 8, 4, pooling="attention")],
    "VectorQuantizer": [
        lambda: xnn.VectorQuantizer(8, 5),
        lambda: xnn.VectorQuantizer(8, 5, ema=False),
        lambda: xnn.VectorQuantizer(8, 5, codebook_dim=3, num_codebooks=2, metric="cosine", kmeans_init=True, seed=3),
    ],
}
CASES = [pytest.param(make, id=f"{name}-{i}") for name, makes in RECIPES.items() for i, make in enumerate(makes)]


def after_seed(seed: int, make: Callable[[], Any]) -> Any:
    torch.manual_seed(seed)
    return make()


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and buffers, persistent or not."""
    return {name: t.detach() for name, t in [*module.named_parameters(), *module.named_buffers()]}


def spoil(module: nn.Module, flag: bool) -> None:
    """Fills every tensor as uninitialized memory might be: NaN, −77 or ``flag``. None of it may remain after a
    reset."""
    for tensor in tensors(module).values():
        tensor.fill_(flag if tensor.dtype == torch.bool else NAN if tensor.is_floating_point() else -77)


def on_meta(make: Make) -> Any:
    with torch.device("meta"):
        module = make()
    assert all(tensor.is_meta for tensor in tensors(module).values())
    return module


def assert_same(actual: nn.Module, expected: nn.Module) -> None:
    found, wanted = tensors(actual), tensors(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype and torch.equal(tensor, wanted[name]), name


def fixed(make: Make) -> dict[str, Tensor]:
    """Returns the parameters and buffers that do not depend on the seed."""
    one, other = tensors(after_seed(1, make)), tensors(after_seed(2, make))
    return {name: tensor for name, tensor in one.items() if torch.equal(tensor, other[name])}


def test_every_class_has_a_recipe() -> None:
    public = [getattr(xnn, name) for name in xnn.__all__]
    public += [DiffusionBridge, PerceiverResampler, RMSScale, StatisticalNormalizer, TanhScale]
    assert {c.__name__ for c in public if isinstance(c, type) and issubclass(c, nn.Module)} == set(RECIPES)


@pytest.mark.parametrize("name", [name for name in RECIPES if name in xnn.__all__])
def test_forward_has_a_docstring_of_its_own(name: str) -> None:
    told = inspect.getdoc(getattr(xnn, name).forward)
    assert told and told != inspect.getdoc(nn.Module.forward)
    assert "Raises:" in told


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("make", CASES)
def test_one_call_makes_an_emptied_module_a_new_one(make: Make, flag: bool) -> None:
    module = on_meta(make).to_empty(device="cpu")
    spoil(module, flag)
    after_seed(5, module.reset_parameters)
    assert_same(module, after_seed(5, make))
    assert type(module).reset_parameters.__doc__


@pytest.mark.parametrize("make", CASES)
def test_a_call_on_every_submodule_serves_too(make: Make) -> None:
    module = on_meta(make).to_empty(device="cpu")
    spoil(module, False)
    for part in module.modules():  # outermost first, as FSDP goes
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    found = tensors(module)
    for name, tensor in found.items():
        assert tensor.isfinite().all() and not (tensor == -77).any(), name
    for name, tensor in fixed(make).items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("make", CASES)
def test_numbers_are_parameters_or_buffers(make: Make) -> None:
    """No tensor of a module is a plain attribute, which would stay on the meta device."""
    for part in make().modules():
        assert not [name for name, value in vars(part).items() if isinstance(value, Tensor)]


def test_a_used_quantizer_is_new_again() -> None:
    for make in RECIPES["VectorQuantizer"]:
        module = make().train()
        for _ in range(3):
            module(draw(fresh_generator(), 40, 8, dtype=torch.float32))
        after_seed(5, module.reset_parameters)
        assert_same(module, after_seed(5, make))


def test_a_branch_is_the_callers() -> None:
    for kind in (xnn.HyperConnection, xnn.ManifoldHyperConnection):
        branch = nn.Linear(8, 8)
        before = branch.weight.detach().clone()
        kind(8, branch=branch).reset_parameters()
        assert torch.equal(branch.weight, before)


def test_seeds_give_the_messages_that_they_gave() -> None:
    """Seeds of published results still give the same initial weights: layers are drawn twice, in their order."""
    module = after_seed(3, lambda: xnn.HDIMMessage(16, proj_dim=4, mlp_dim=6))
    torch.manual_seed(3)
    sizes = [(16, 4, False), (16, 4, False), (16, 6, True), (6, 1, True), (48, 256, True), (256, 16, True)]
    layers = [nn.Linear(i, o, bias=bias) for i, o, bias in sizes]
    for layer in layers:
        layer.reset_parameters()
    wanted = [parameter for layer in layers for parameter in layer.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), wanted, strict=True))


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    if dist.is_initialized():
        pytest.skip("this process has a group already")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:DTensor random operators")
@pytest.mark.parametrize("make", [case for case in CASES if list(case.values[0]().parameters())])
def test_sharded_on_meta_and_then_reset(mesh: Any, make: Make) -> None:
    module = on_meta(make)
    fully_shard(module, mesh=mesh)
    module.to_empty(device="cpu")
    for tensor in tensors(module).values():
        tensor.zero_() if tensor.dtype == torch.bool else tensor.fill_(-77)
    module.reset_parameters()
    found = {name: getattr(t, "full_tensor", lambda t=t: t)() for name, t in tensors(module).items()}
    assert not any((tensor == -77).any() for tensor in found.values())
    for name, tensor in fixed(make).items():
        assert torch.equal(found[name], tensor), name


# ---- options ---------------------------------------------------------------------------------------------------------

HUGE = 2**62
BAD: list[tuple[str, Callable[..., Any], dict[str, list[Any]]]] = [
    ("TapProjector", lambda **o: xnn.TapProjector(**{"num_layers": 3, "hidden_size": 8, "side_size": 4, **o}),
     {"num_layers": [0, 2**64, "3", None, 1.5], "hidden_size": [-1], "eps": [NAN, -1.0, "x"], "pooling": ["cls"]}),
    ("EMAAggregator", lambda **o: xnn.EMAAggregator(3, 8, **o),
     {"tree_checkpoint": [-1, 4, 1.0, 2**64], "expansion": [0, None], "eps": [INF, -1e-5, None]}),
    ("GRUAggregator", lambda **o: xnn.GRUAggregator(**{"num_layers": 3, "hidden_size": 8, **o}),
     {"num_layers": [0, 3.0, 2**64], "hidden_size": [0, True]}),
    ("DepthAttentionAggregator", lambda **o: xnn.DepthAttentionAggregator(3, 8, **o),
     {"num_heads": [0, 3, HUGE, 2**64, "2"], "window": [0, 2**64, None]}),
    ("DiffusionBridge",
     lambda **o: DiffusionBridge(6, 8, **{"soft_tokens": 3, "hidden_size": 8, "num_layers": 1, "num_heads": 2, **o}),
     {"num_heads": [0, 3, 2**64], "hidden_size": [7, 0], "soft_tokens": [0, "3"], "conditioning": ["x"],
      "target_scale": [0.0, NAN]}),
    ("FSQ", xnn.FSQ, {"levels": [[], 5, [1], ["8"], [2**62], None]}),
    ("HDIMMessage", lambda **o: xnn.HDIMMessage(16, **o),
     {"proj_dim": [0, 2**64, "4"], "mlp_dim": [0], "temperature": [NAN, INF, -1.0, 10**400, "x"], "alpha_init": [NAN],
      "residual_beta": [None]}),
    ("HyperConnection", lambda **o: xnn.HyperConnection(8, **o),
     {"expansion_rate": [0, 2**64, 2.0], "eps": [NAN, -1.0], "layer_index": [None, 2**64], "norm": ["batch"],
      "disable": [None, 1]}),
    ("LayerRouter", lambda **o: xnn.LayerRouter(16, **o),
     {"top_k": [0, 2**64, "1"], "temperature": [NAN, 0.0, None], "route_dim": [0]}),
    ("ManifoldHyperConnection", lambda **o: xnn.ManifoldHyperConnection(8, **o),
     {"sinkhorn_iters": [0, 1001, 2**32, 2**64, None], "eps": [NAN, -1.0], "layer_index": ["0"]}),
    ("PerceiverResampler",
     lambda **o: PerceiverResampler(**{"source_dim": 6, "target_dim": 8, "soft_tokens": 3, "num_heads": 2, **o}),
     {"num_heads": [0, 3, HUGE], "hidden_size": [0], "soft_tokens": [0, None], "mlp_ratio": [NAN, 0.0]}),
    ("QKVMessage", lambda **o: xnn.QKVMessage(**{"num_heads": 2, "head_dim": 4, **o}),
     {"num_heads": [0, "2"], "head_dim": [0, 2**64], "dropout": [NAN, 2.0]}),
    ("RMSScale", lambda **o: RMSScale(**{"target_rms": 1.0, **o}), {"target_rms": [NAN, None], "eps": [-1.0, NAN]}),
    ("StatisticalNormalizer", lambda **o: StatisticalNormalizer(**{"source_dim": 4, "target_dim": 4, **o}),
     {"source_dim": [0, "4"], "target_dim": [0, 2**64], "eps": [-1.0, NAN]}),
    ("TanhScale", TanhScale, {"target_rms": [NAN, "x", None]}),
    ("VectorQuantizer", lambda **o: xnn.VectorQuantizer(**{"hidden_size": 8, "codebook_size": 4, **o}),
     {"codebook_size": [0, HUGE, 2**64, 4.0], "num_codebooks": [0, 3], "codebook_dim": [0], "decay": [NAN, 1.0, "x"],
      "eps": [0.0, NAN], "entropy_temperature": [0.0, NAN], "commitment_weight": [NAN, -1.0],
      "threshold_ema_dead_code": [-1.0, NAN], "kmeans_iters": [-1, 2**32], "seed": [2**64, 0.5]}),
]  # fmt: skip


def test_every_class_has_bad_options() -> None:
    assert {name for name, _, _ in BAD} == set(RECIPES)


@pytest.mark.parametrize(
    ("make", "option", "value"),
    [
        pytest.param(make, option, value, id=f"{name}-{option}-{str(value)[:20]}")
        for name, make, options in BAD
        for option, values in options.items()
        for value in values
    ],
)
def test_bad_options_are_named(make: Callable[..., Any], option: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=option) as raised:
        make(**{option: value})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("steps", [0, -1, 2**32, 2**64, 1.5])
def test_sampling_takes_a_number_of_steps_that_ends(steps: Any) -> None:
    bridge = RECIPES["DiffusionBridge"][0]()
    with pytest.raises((TypeError, ValueError), match="steps must be"):
        bridge.sample(torch.ones(1, 2, 6), steps=steps)


# ---- calls -----------------------------------------------------------------------------------------------------------

X, MASK = torch.ones(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
NOT_FLOATS: list[Any] = ["x", None, X.long(), X.to(torch.complex64)]
NOT_MASKS: list[Any] = ["x", MASK.int(), MASK.float(), MASK[:, :3], MASK.to("meta")]
STATES, SOFT, TIME = torch.ones(2, 5, 6), torch.ones(2, 3, 8), torch.ones(2)
TAPS = torch.ones(3, 2, 5, 8)

# A module, a call of it that is right, and values of its arguments that are not.
MODULE_CALLS: dict[str, tuple[Make, dict[str, Any], dict[str, list[Any]]]] = {
    "TapProjector": (lambda: xnn.TapProjector(3, 8, 4), {"taps": TAPS, "mask": MASK},
                     {"taps": [*NOT_FLOATS, TAPS[0], [X, X], [X, X, X[:1]], [X, X, "x"], TAPS[..., :7]],
                      "mask": NOT_MASKS}),
    "EMAAggregator": (lambda: xnn.EMAAggregator(3, 8), {"taps": TAPS},
                      {"taps": [*NOT_FLOATS, X[0], TAPS[:2], [X, X], [X, X, X[:1]], [X, X, "x"], [],
                                [X, X, X.double()]]}),
    "GRUAggregator": (lambda: xnn.GRUAggregator(3, 8), {"taps": TAPS}, {"taps": [*NOT_FLOATS, X[0]]}),
    "DepthAttentionAggregator": (lambda: xnn.DepthAttentionAggregator(3, 8), {"taps": TAPS}, {"taps": NOT_FLOATS}),
    "FSQ": (lambda: xnn.FSQ([4] * 8), {"z": X}, {"z": [*NOT_FLOATS, X[..., :7], X[0, 0, 0]]}),
    "HDIMMessage": (lambda: xnn.HDIMMessage(8), {"target": X, "source": X, "key_mask": MASK},
                    {"target": [*NOT_FLOATS, X[0]], "source": [*NOT_FLOATS, X[:1]], "key_mask": NOT_MASKS,
                     "attn_mask": ["x", MASK]}),
    "HyperConnection": (lambda: xnn.HyperConnection(8, expansion_rate=5), {"streams": X},
                        {"streams": [*NOT_FLOATS, X[:, :4], X[..., :7], X[0, 0]]}),
    "LayerRouter": (lambda: xnn.LayerRouter(8), {"target_summary": X[0], "source_summaries": X},
                    {"target_summary": [*NOT_FLOATS, X], "source_summaries": [*NOT_FLOATS, X[0]]}),
    "ManifoldHyperConnection": (lambda: xnn.ManifoldHyperConnection(8, expansion_rate=5), {"streams": X},
                                {"streams": NOT_FLOATS}),
    "PerceiverResampler": (RECIPES["PerceiverResampler"][0], {"x": STATES, "mask": MASK},
                           {"x": [*NOT_FLOATS, X, STATES[0]], "mask": NOT_MASKS}),
    "DiffusionBridge": (RECIPES["DiffusionBridge"][0], {"x": STATES, "mask": MASK, "x_t": SOFT, "t": TIME},
                        {"x": [*NOT_FLOATS, X], "mask": NOT_MASKS, "x_t": [*NOT_FLOATS, X, SOFT[:1]],
                         "t": [*NOT_FLOATS, TIME[:1], 0.5]}),
    "QKVMessage": (lambda: xnn.QKVMessage(2, 4), {"query": X, "key": X, "value": X, "key_mask": MASK},
                   {"query": [*NOT_FLOATS, X[..., :7], X[0]], "key": [*NOT_FLOATS, X[0]], "value": [*NOT_FLOATS, X[:1]],
                    "key_mask": NOT_MASKS}),
    "RMSScale": (lambda: RMSScale(1.0), {"x": X}, {"x": NOT_FLOATS}),
    "StatisticalNormalizer": (lambda: StatisticalNormalizer(8, 8), {"x": X}, {"x": [*NOT_FLOATS, X[..., :7]]}),
    "TanhScale": (lambda: TanhScale(1.0), {"x": X}, {"x": NOT_FLOATS}),
    "VectorQuantizer": (lambda: xnn.VectorQuantizer(8, 5), {"x": X, "mask": MASK},
                        {"x": [*NOT_FLOATS, X[..., :7]], "mask": NOT_MASKS}),
}  # fmt: skip


def test_every_class_has_a_call() -> None:
    assert set(MODULE_CALLS) == set(RECIPES)
    for make, right, _ in MODULE_CALLS.values():
        make()(**right)


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        pytest.param(module, name, value, id=f"{module}-{name}-{i}")
        for module, (_, _, wrong) in MODULE_CALLS.items()
        for name, values in wrong.items()
        for i, value in enumerate(values)
    ],
)
def test_bad_calls_are_named(module: str, name: str, value: Any) -> None:
    make, right, _ = MODULE_CALLS[module]
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b") as raised:
        make()(**(right | {name: value}))
    assert "\n" not in str(raised.value)


def test_codes_that_are_not_there_are_named() -> None:
    quantizer = xnn.VectorQuantizer(8, 5, num_codebooks=2)
    wrong = [torch.tensor([[0, 5]]), torch.tensor([[0, -2]]), torch.zeros(3, dtype=torch.int64), torch.zeros(1, 2), "x"]
    for indices in wrong:
        with pytest.raises((TypeError, ValueError), match="indices must"):
            quantizer.indices_to_codes(indices)
    for codebook in (torch.ones(5, 8), torch.ones(5, 4), torch.ones(2, 5, 4).long(), None):
        with pytest.raises((TypeError, ValueError), match="codebook must"):
            quantizer.set_codebook(codebook)
    quantizer.set_codebook(torch.ones(2, 5, 4))
    xnn.VectorQuantizer(8, 5).set_codebook(torch.ones(5, 8))


# ---- what PyTorch users expect of a module ---------------------------------------------------------------------------

PUBLIC = {name: getattr(xnn, name) for name in xnn.__all__}
MODULES: dict[str, Any] = {
    name: kind for name, kind in PUBLIC.items() if isinstance(kind, type) and issubclass(kind, nn.Module)
}
SMALL = {name: partial(make, levels=[8, 5, 3], hidden_size=6) if name == "FSQ" else make for name, make, _ in BAD}
OWN_CASES = [pytest.param(name, make, id=f"{name}-{i}") for name in MODULES for i, make in enumerate(RECIPES[name])]


def call(name: str, module: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Calls a module of MODULE_CALLS with its right arguments; returns the tensors that it gives."""
    arguments = {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in MODULE_CALLS[name][1].items()
    }
    torch.manual_seed(0)
    return [leaf for leaf in tree_leaves(module.eval()(**arguments)) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", MODULES)
def test_device_and_dtype_are_arguments(name: str) -> None:
    for device, dtype in itertools.product(("cpu", "meta"), (torch.bfloat16, torch.float64)):
        module = SMALL[name](device=device, dtype=dtype)
        assert all(tensor.device.type == device for tensor in tensors(module).values())
        assert all(parameter.dtype == dtype for parameter in module.parameters())
        kept = torch.promote_types(dtype, torch.float32)  # moving averages
        assert all(buffer.dtype == kept for buffer in module.buffers() if buffer.is_floating_point())
        if device == "meta":
            module.to_empty(device="cpu")
            spoil(module, False)
        after_seed(5, module.reset_parameters)
        assert_same(module, after_seed(5, partial(SMALL[name], dtype=dtype)))


@pytest.mark.parametrize(("name", "make"), OWN_CASES)
def test_repr_tells_the_sizes(name: str, make: Make) -> None:
    module = make()
    text = module.extra_repr()
    assert text and "\n" not in text and repr(module).startswith(f"{name}(")
    required = [p for p in parameters_of(MODULES[name].__init__) if p.default is p.empty]
    assert all(str(getattr(module, parameter.name)) in text for parameter in required)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize(("name", "make"), OWN_CASES)
def test_copies_are_equal_and_apart(name: str, make: Make, copied: Callable[[Any], Any]) -> None:
    module = make()
    twin = copied(module)
    assert_same(twin, module)
    assert twin.extra_repr() == module.extra_repr()
    for tensor in tensors(twin).values():
        tensor.zero_()
    assert_same(module, copied(module))
    assert all(mine is not other for mine, other in zip(module.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(("name", "make"), OWN_CASES)
def test_a_state_dict_is_the_whole_state(name: str, make: Make) -> None:
    module, other = after_seed(1, make), after_seed(2, make)
    other.load_state_dict(pickle.loads(pickle.dumps(module.state_dict())), strict=True)
    assert_same(other, module)


def test_state_dicts_keep_their_keys() -> None:
    """What was saved must load: names and shapes are those that state_dict_keys.json has kept."""
    kept = json.loads((Path(__file__).parent / "state_dict_keys.json").read_text())
    found = {
        f"{name}-{i}": {key: list(tensor.shape) for key, tensor in make().state_dict().items()}
        for name, makes in RECIPES.items()
        for i, make in enumerate(makes)
    }
    assert found == kept


@pytest.mark.parametrize("name", MODULES)
def test_copies_compute_the_same(name: str) -> None:
    module = MODULE_CALLS[name][0]()
    expected = call(name, module)
    loaded = MODULE_CALLS[name][0]()
    loaded.load_state_dict(module.state_dict())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert all(torch.equal(a, b) for a, b in zip(call(name, twin), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", MODULES)
def test_half_bfloat16_and_double_convert_and_compute(name: str, dtype: torch.dtype) -> None:
    convert = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float64: "double"}[dtype]
    module = getattr(MODULE_CALLS[name][0](), convert)()
    assert all(parameter.dtype == dtype for parameter in module.parameters())
    results = [tensor for tensor in call(name, module, dtype) if tensor.is_floating_point()]
    assert all(tensor.isfinite().all() for tensor in results)
    assert all(tensor.dtype in (dtype, torch.promote_types(dtype, torch.float32)) for tensor in results) or (
        name == "VectorQuantizer"  # whose loss and perplexity are float32
    )


def parameters_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]


def constructors() -> Iterator[tuple[str, Callable[..., Any]]]:
    for name, kind in MODULES.items():
        yield name, kind.__init__
        made = (key for key, value in vars(kind).items() if isinstance(value, classmethod))
        yield from ((f"{name}.{key}", getattr(kind, key)) for key in made)
    yield from ((name, value) for name, value in PUBLIC.items() if inspect.isfunction(value))


CONSTRUCTORS = [pytest.param(function, id=name) for name, function in constructors()]


@pytest.mark.parametrize("function", CONSTRUCTORS)
def test_options_are_given_by_keyword_alone(function: Callable[..., Any]) -> None:
    wrong = [p.name for p in parameters_of(function) if p.default is not p.empty and p.kind is not p.KEYWORD_ONLY]
    assert not wrong


@pytest.mark.parametrize("function", CONSTRUCTORS)
def test_choices_are_literals(function: Callable[..., Any]) -> None:
    hints = {key: hint for key, hint in typing.get_type_hints(function).items() if key != "return"}
    text = {key for key, hint in hints.items() if str in (hint, *typing.get_args(hint))}
    assert text <= {"device"}


@pytest.mark.slow
def test_wrong_choices_fail_a_strict_type_check() -> None:
    """`mypy --strict` on a program that uses the package finds errors in exactly the lines that are marked."""
    pytest.importorskip("mypy")
    program = Path(__file__).parents[1] / "typed" / "downstream.py"
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--no-error-summary"]
    command += ["--config-file=", f"--cache-dir={root / '.mypy_cache' / 'downstream'}", str(program)]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, env=os.environ | {"MYPYPATH": str(root)})
    errors = {int(line.split(":")[1]): line for line in run.stdout.splitlines() if ": error: " in line}
    lines = program.read_text().splitlines()
    assert set(errors) == {at for at, line in enumerate(lines, 1) if line.endswith("# wrong")}, run.stdout + run.stderr
    assert all("[arg-type]" in line for line in errors.values())
