"""Helpers of the tests: fresh random cases, both implementations of a case, and the oracle rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import emulation
import seeding
from xlayer_ext import _backend, backend, reference
from xlayer_ext import functional as XF
from xlayer_ext.testing import bias_without_kinks, oracle_bound, relative_error

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FLOATS = ("query", "key", "value", "weight1", "bias1", "weight2", "bias2")

Results = dict[str, Tensor]


class Draw(NamedTuple):
    """One draw's results: from the code under test, exact (float64), and from the plain formula at the same dtype."""

    actual: Results
    exact: Results
    plain: Results


def fresh_generator(seed: int | None = None) -> torch.Generator:
    """Makes a generator with this seed, or with the running test's next one (seeding.py)."""
    return torch.Generator().manual_seed(seeding.next_seed() if seed is None else seed)


def draw(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def draw_layers(
    generator: torch.Generator, width: int, device: str, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Draws target, source and masks of a module's call; the last element's first target token has no allowed
    source."""
    arguments = {
        "target": draw(generator, 2, 5, width, dtype=dtype),
        "source": draw(generator, 2, 7, width, dtype=dtype),
        "key_mask": torch.rand(2, 7, generator=generator) < 0.8,
        "attn_mask": torch.rand(2, 5, 7, generator=generator) < 0.8,
    }
    arguments["attn_mask"][-1, 0] = False
    return {name: tensor.to(device) for name, tensor in arguments.items()}


def need_native(op: str, device: str = "cpu") -> None:
    """Skips the test where the native library, or this operator for this device, is not there. With --device emulated
    it fails: there every operator has a kernel."""
    if emulation.active():
        assert op in emulation.operators(), f"{op} has no CUDA kernel for the emulator to run"
    if not any(name == op and kind == torch.device(device).type for name, kind in _backend._KERNELS):
        pytest.skip(f"no native {op} for {device} in this build")


@dataclass(frozen=True)
class HdimCase:
    """Arguments of one `hdim_attention` call and the gradients that come back to it."""

    floats: dict[str, Tensor]
    masks: dict[str, Tensor | None]
    grad_context: Tensor
    options: dict[str, Any] = field(default_factory=dict)
    grad_entropy: float | None = None  # None: the entropy is not asked for

    def to(self, dtype: torch.dtype) -> HdimCase:
        floats = {name: tensor.to(dtype) for name, tensor in self.floats.items()}
        return replace(self, floats=floats, grad_context=self.grad_context.to(dtype))

    def with_floats(self, **floats: Tensor) -> HdimCase:
        return replace(self, floats=self.floats | floats)


def hdim_case(
    generator: torch.Generator,
    *,
    sizes: tuple[int, int, int, int, int, int] = (2, 19, 37, 24, 33, 20),
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    key_mask: bool = False,
    attn_mask: bool = False,
    grad_entropy: float | None = None,
    scale: float = 1.0,
    sharpness: float = 1.0,
    **options: Any,
) -> HdimCase:
    """Draws normal inputs of sizes (B, Sq, Sk, D, M, H). Some dimensions of some queries equal those of a key (ties),
    and with masks the last batch element's first row has no allowed pair. ``sharpness`` multiplies the logits."""
    b, sq, sk, d, m, h = sizes

    def draw(*shape: int, gain: float = 1.0) -> Tensor:
        return (gain * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).to(device)

    def mask(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator) < 0.7).to(device)

    query, key = draw(b, sq, d, gain=scale), draw(b, sk, d, gain=scale)
    tied = min(sq, sk)
    query[:, :tied, ::2] = key[:, :tied, ::2]
    floats = {"query": query, "key": key, "value": draw(b, sk, h)}
    floats |= {"weight1": draw(m, 4 * d, gain=(4 * d) ** -0.5), "bias1": draw(m)}
    floats |= {"weight2": draw(m, gain=2 * sharpness * max(m, 1) ** -0.5), "bias2": draw(1)}
    masks: dict[str, Tensor | None] = {"key_mask": mask(b, sk) if key_mask else None, "attn_mask": None}
    if attn_mask:
        masks["attn_mask"] = mask(b, sq, sk)
        if b and sq:
            masks["attn_mask"][-1, 0] = False
    return HdimCase(floats, masks, draw(b, sq, h), options, grad_entropy)


def without_kinks(case: HdimCase) -> HdimCase:
    names = ("query", "key", "weight1", "bias1")
    return case.with_floats(bias1=bias_without_kinks(*(case.floats[name] for name in names)))


def evaluate(case: HdimCase, call: Callable[..., Any]) -> Results:
    """Returns the outputs of ``call(**floats, **masks, **options)`` → (context, entropy) and every gradient, by
    name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in case.floats.items()}
    context, entropy = call(**leaves, **case.masks, **case.options)
    outputs, cotangents = [context], [case.grad_context]
    if case.grad_entropy is not None:
        outputs.append(entropy)
        cotangents.append(torch.full_like(entropy, case.grad_entropy))
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents, materialize_grads=True)
    results = {"context": context.detach()} | {f"grad_{name}": g for name, g in zip(leaves, grads, strict=True)}
    return results if entropy is None else results | {"entropy": entropy.detach()}


def evaluate_functional(case: HdimCase, choice: str = "native") -> Results:
    """Evaluates the case through the functional API, on one backend."""
    wanted = case.grad_entropy is not None

    def call(**arguments: Any) -> Any:
        out = XF.hdim_attention(**arguments, return_entropy=wanted)
        return out if wanted else (out, None)

    with backend(choice):
        return evaluate(case, call)


def evaluate_formula(case: HdimCase) -> Results:
    """Evaluates the case through the plain formula, at the dtype that it has."""

    def call(*, bias2: Tensor, **arguments: Any) -> Any:
        context, entropy = reference.hdim_attention(**arguments)
        return context + 0 * bias2, entropy if case.grad_entropy is not None else None

    return evaluate(case, call)


POOLED = 5  # times as many draws where the bound is another error, and not a number


def check_oracle_rule(make: Callable[[], Draw], dtype: torch.dtype, draws: int) -> None:
    """Checks the oracle rule (xlayer_ext.testing) for every named result.

    The errors are taken over all draws at once: some results have few elements, and the ratio of two errors of a single
    draw says more about luck than about the implementations. Two errors of n independent elements each have a ratio of
    rms values that scatters by about 1/√n around its mean, so n of a thousand makes 1.1 three standard deviations.
    """
    drawn = [make() for _ in range(draws if dtype == torch.float64 else POOLED * draws)]
    broken = _broken_rules(drawn, dtype)
    assert not broken, "; ".join(broken)


def _broken_rules(draws: list[Draw], dtype: torch.dtype) -> list[str]:
    def joined(side: str, name: str) -> Tensor:
        return torch.cat([getattr(draw, side)[name].double().flatten() for draw in draws])

    broken = []
    for name, first in draws[0].actual.items():
        assert first.dtype == draws[0].plain[name].dtype and first.shape == draws[0].plain[name].shape, name
        error, plain_error = (relative_error(joined(side, name), joined("exact", name)) for side in ("actual", "plain"))
        bound = oracle_bound(plain_error, dtype)
        if not error <= bound:
            broken.append(f"{name}: error {error:.2e} exceeds {bound:.2e} ({dtype})")
    return broken


def assert_same_bits(actual: Results, expected: Results) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), f"{name} differs"


def assert_near(actual: Results, expected: Results, tolerance: float) -> None:
    """Asserts that every result is within ``tolerance`` of the expected one, relative to the largest magnitude (at
    least 1)."""
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        wanted = expected[name]
        room = tolerance * max(1.0, float(wanted.detach().abs().max()) if wanted.numel() else 0.0)
        torch.testing.assert_close(
            tensor, wanted.to(tensor.dtype), rtol=0, atol=room, msg=lambda m, n=name: f"{n}: {m}"
        )
