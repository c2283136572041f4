"""The CUDA kernels of the aggregate operators, on the emulator, called directly: what test_aggregate.py does not
know of their teams, paths, blocks and vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Generator, Tensor

import emulation
from oracle import DTYPES, Draw, Results, check_oracle_rule, draw, fresh_generator
from xlayer_ext import reference

pytestmark = pytest.mark.cpu_kernels

Given = dict[str, Tensor | None]  # an operator's tensors, in its order


@pytest.fixture(autouse=True)
def loaded() -> Iterator[None]:
    emulation.library()
    yield
    emulation.set_seed(emulation.SEED)


def misaligned(tensor: Tensor) -> Tensor:
    """Copies the tensor to one element past a boundary of 16 bytes."""
    base = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    copy = base[1:].view(tensor.shape)
    copy.copy_(tensor)
    return copy


def padded(tensor: Tensor) -> Tensor:
    """Copies the tensor to rows that are 16 bytes apart, or a multiple of them, with NaN between them."""
    room = 16 // tensor.element_size() + -tensor.shape[-1] % (16 // tensor.element_size())
    return torch.nn.functional.pad(tensor, (0, room), value=math.nan)[..., : tensor.shape[-1]]


def layers_inside(tensor: Tensor) -> Tensor:
    """Copies the tensor so that every token's layers are adjacent, as [N, L, d] transposed."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


# ---- one call of an operator, forward and backward -------------------------------------------------------------------


class Call(NamedTuple):
    """An operator's tensors, the gradient of its output, and how the kernels and the reference are called on them."""

    given: Given
    grad: Tensor
    native: Callable[[Given, Tensor], Results]
    formula: Callable[..., Tensor]

    def draw(self) -> Draw:
        return Draw(self.native(self.given, self.grad), self.exact(torch.float64), self.exact(None))

    def exact(self, dtype: torch.dtype | None) -> Results:
        """Computes states and gradients by the plain formula, in its own dtype by default."""
        leaves = {
            name: None if tensor is None else tensor.to(dtype or tensor.dtype).detach().clone().requires_grad_()
            for name, tensor in self.given.items()
        }
        states = self.formula(*leaves.values())
        inputs = [leaf for leaf in leaves.values() if leaf is not None]
        options = {"allow_unused": True, "materialize_grads": True}
        grads = iter(torch.autograd.grad(states, inputs, self.grad.to(states.dtype), **options))
        named = {f"grad_{name}": next(grads) for name, leaf in leaves.items() if leaf is not None}
        return {"states": states.detach()} | named


def named_grads(given: Given, grads: tuple[Tensor, ...]) -> Results:
    """Names the gradients of the tensors that were given; asserts that those of the others are empty."""
    assert all(grad.numel() == 0 for grad, tensor in zip(grads, given.values(), strict=True) if tensor is None)
    return {f"grad_{name}": g for (name, tensor), g in zip(given.items(), grads, strict=True) if tensor is not None}


def ema_call(
    generator: Generator,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    initial_state: bool = True,
    norm: bool = True,
    bias: bool = True,
    last_only: bool = False,
    layout: Callable[[Tensor], Tensor] = torch.clone,
) -> Call:
    layers, tokens, width = sizes
    wide = torch.promote_types(dtype, torch.float32)
    given: Given = {
        "x": layout(2 + 3 * draw(generator, layers, tokens, width, dtype=dtype)),
        "gate_logits": draw(generator, layers, dtype=wide),
        "initial_state": draw(generator, tokens, width, dtype=dtype) if initial_state else None,
        "norm_weight": 1 + 0.3 * draw(generator, width, dtype=wide) if norm else None,
        "norm_bias": 1 + draw(generator, width, dtype=wide) if norm and bias else None,
    }

    def native(given: Given, grad: Tensor) -> Results:
        states = torch.ops.xlayer_emulated.ema_scan(*given.values(), 1e-5, last_only)
        grads = torch.ops.xlayer_emulated.ema_scan_backward(grad, *given.values(), 1e-5, last_only)
        return {"states": states} | named_grads(given, grads)

    def formula(x: Tensor, gates: Tensor, *rest: Any) -> Tensor:
        return reference.ema_scan(x, gates, *rest, eps=1e-5, last_only=last_only)

    # A gradient that has to do with the taps, so that the gates' sums over all numbers do not cancel to noise.
    x = given["x"]
    assert x is not None
    grad = torch.cat([x.new_zeros(1, tokens, width), x])[-1:] if last_only else x
    grad = layout(grad + draw(generator, *grad.shape, dtype=dtype))
    return Call(given, grad.squeeze(0) if last_only else grad, native, formula)


def gru_call(
    generator: Generator,
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    initial_state: bool = True,
    layout: Callable[[Tensor], Tensor] = torch.clone,
) -> Call:
    layers, tokens, inputs, width = sizes
    given: Given = {
        "x": layout(draw(generator, layers, tokens, inputs, dtype=dtype)),
        "weight_ih": draw(generator, 3 * width, inputs).div(max(inputs, 1) ** 0.5).to(dtype),
        "weight_hh": draw(generator, 3 * width, width).div(max(width, 1) ** 0.5).to(dtype),
        "bias_ih": draw(generator, 3 * width, dtype=dtype),
        "bias_hh": draw(generator, 3 * width, dtype=dtype),
        "initial_state": draw(generator, tokens, width, dtype=dtype) if initial_state else None,
    }

    def native(given: Given, grad: Tensor) -> Results:
        states, gates = torch.ops.xlayer_emulated.depth_gru(*given.values(), True)
        alone, nothing = torch.ops.xlayer_emulated.depth_gru(*given.values(), False)
        torch.testing.assert_close(alone, states, equal_nan=True)
        assert nothing.numel() == 0
        x, weight_ih, weight_hh, _, _, start = given.values()
        grads = torch.ops.xlayer_emulated.depth_gru_backward(grad, states, gates, x, weight_ih, weight_hh, start)
        return {"states": states} | named_grads(given, grads)

    return Call(given, layout(draw(generator, layers, tokens, width, dtype=dtype)), native, reference.depth_gru)


def attention_call(
    generator: Generator,
    sizes: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    *,
    window: int = 4,
    initial_state: bool = True,
    layout: Callable[[Tensor], Tensor] = torch.clone,
) -> Call:
    layers, tokens, width, num_heads, head_width = sizes
    inner = num_heads * head_width
    given: Given = {
        "keys": layout(draw(generator, layers, tokens, inner, dtype=dtype)),
        "values": layout(draw(generator, layers, tokens, inner, dtype=dtype)),
        "weight_query": draw(generator, inner, width).div(max(width, 1) ** 0.5).to(dtype),
        "weight_out": draw(generator, width, inner).div(max(inner, 1) ** 0.5).to(dtype),
        "initial_state": draw(generator, tokens, width, dtype=dtype) if initial_state else None,
    }
    scale = max(head_width, 1) ** -0.5

    def native(given: Given, grad: Tensor) -> Results:
        options = (num_heads, window, scale)
        states, attended = torch.ops.xlayer_emulated.depth_attention(*given.values(), *options, True)
        alone, nothing = torch.ops.xlayer_emulated.depth_attention(*given.values(), *options, False)
        torch.testing.assert_close(alone, states, equal_nan=True)
        assert nothing.numel() == 0
        grads = torch.ops.xlayer_emulated.depth_attention_backward(grad, states, attended, *given.values(), *options)
        return {"states": states} | named_grads(given, grads)

    def formula(*tensors: Tensor) -> Tensor:
        return reference.depth_attention(*tensors, num_heads=num_heads, window=window, scale=scale)

    return Call(given, layout(draw(generator, layers, tokens, width, dtype=dtype)), native, formula)


def check(make: Callable[[Generator], Call], dtype: torch.dtype, draws: int = 4) -> None:
    generator = fresh_generator()
    check_oracle_rule(lambda: make(generator).draw(), dtype, draws)


# ---- ema_scan --------------------------------------------------------------------------------------------------------


# Rows of one vector, of part of a team, of several warps, and such as take no vectors.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(5, 7, 8), (6, 19, 40), (3, 5, 33), (9, 3, 328), (1, 1, 9)], ids=str)
@pytest.mark.parametrize("last_only", [False, True])
def test_ema_scan(sizes: tuple[int, int, int], dtype: torch.dtype, last_only: bool) -> None:
    check(partial(ema_call, sizes=sizes, dtype=dtype, last_only=last_only), dtype)
    check(partial(ema_call, sizes=sizes, dtype=dtype, last_only=last_only, norm=False), dtype)
    check(partial(ema_call, sizes=sizes, dtype=dtype, last_only=last_only, initial_state=False, bias=False), dtype)


# On both sides of what a team's registers hold, 4096 forward and 2048 backward, and of what the emulator's 99 KB of
# shared memory hold with norm: rows of all layers at L = 11, or 5 in float64.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes", [(2, 3, 2048), (2, 3, 2056), (3, 2, 4104), (2, 2, 4099), (14, 5, 24), (14, 2, 25)], ids=str
)
def test_long_rows_and_many_layers_with_norm(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    for last_only in (False, True):
        check(partial(ema_call, sizes=sizes, dtype=dtype, last_only=last_only), dtype)


# Without norm a block's part of all layers fits up to L = 24 in half precision and 48 else; 190 where no vectors are.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(24, 3, 24), (26, 3, 24), (60, 3, 24), (200, 1, 5)], ids=str)
def test_many_layers_without_norm(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(partial(ema_call, sizes=sizes, dtype=dtype, norm=False), dtype)


@pytest.mark.parametrize("sizes", [(3, 70_000, 2), (2, 540, 2048), (2, 300, 2056)], ids=str)
def test_more_tokens_than_blocks_take_at_once(sizes: tuple[int, int, int]) -> None:
    norm = sizes[2] > 2
    check(partial(ema_call, sizes=sizes, dtype=torch.float32, norm=norm), torch.float32, draws=2)


@pytest.mark.parametrize("layout", [misaligned, padded, layers_inside], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ema_scan_of_any_layout(dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    for sizes in ((4, 5, 40), (4, 5, 13), (3, 3, 2056)):
        for norm in (False, True):
            check(partial(ema_call, sizes=sizes, dtype=dtype, norm=norm, layout=layout), dtype)
    check(partial(ema_call, sizes=(4, 5, 40), dtype=dtype, last_only=True, layout=layout), dtype)


def with_misaligned(generator: Generator, name: str, width: int) -> Call:
    call = ema_call(generator, (3, 4, width), torch.float32)
    tensor = call.given[name]
    assert tensor is not None
    return call._replace(given=call.given | {name: misaligned(tensor)})


def test_parameters_on_addresses_that_take_no_vectors() -> None:
    for width in (24, 2056):
        for name in ("initial_state", "norm_weight", "norm_bias"):
            check(partial(with_misaligned, name=name, width=width), torch.float32, draws=1)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("width", [16, 2056])
def test_what_is_not_finite_stays_with_its_token(width: int, norm: bool) -> None:
    """A NaN or infinity of one token changes no bit of another token's float32 results; sums over all tokens become
    NaN."""
    generator = fresh_generator()
    call = ema_call(generator, (4, 3, width), torch.float32, norm=norm)
    clean = call.native(call.given, call.grad)
    for poison in (math.nan, math.inf):
        x = call.given["x"]
        assert x is not None
        poisoned = x.clone()
        poisoned[1, 1, 3] = poison
        found = call.native(call.given | {"x": poisoned}, call.grad)
        for name in ("states", "grad_x"):
            assert torch.equal(found[name][:, ::2], clean[name][:, ::2])
        assert torch.equal(found["states"][0], clean["states"][0])
        assert not found["states"][1:, 1, 3].isfinite().any()
        assert not found["grad_gate_logits"][1:].isfinite().any()


def test_gates_that_are_shut_and_open() -> None:
    """1 − σ(a) does not cancel: an almost open gate still lets the right share of the state through."""
    generator = fresh_generator()
    call = ema_call(generator, (3, 4, 8), torch.float32, norm=False)
    gates = torch.tensor([20.0, -90.0, math.inf])
    first, second, third = call.native(call.given | {"gate_logits": gates}, call.grad)["states"]
    x, initial_state = call.given["x"], call.given["initial_state"]
    assert x is not None and initial_state is not None
    share = (initial_state.double() - x[0].double()) * math.exp(-20)
    torch.testing.assert_close(first.double(), x[0].double() + share, rtol=1e-7, atol=1e-7)
    assert torch.equal(second, first) and torch.equal(third, x[2])


def test_a_backward_of_more_layers_than_the_kernels_take_is_refused() -> None:
    call = ema_call(fresh_generator(), (513, 1, 2), torch.float32)
    with pytest.raises(RuntimeError, match="ema_scan's backward take at most 512 layers, got 513"):
        call.native(call.given, call.grad)


# ---- depth_gru and depth_attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("initial_state", [False, True])
@pytest.mark.parametrize("sizes", [(5, 7, 12, 16), (4, 3, 5, 7), (1, 3, 8, 8), (2, 1, 3, 5), (2, 90, 3, 40)], ids=str)
def test_depth_gru(sizes: tuple[int, int, int, int], initial_state: bool, dtype: torch.dtype) -> None:
    check(partial(gru_call, sizes=sizes, dtype=dtype, initial_state=initial_state), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("initial_state", [False, True])
@pytest.mark.parametrize("window", [1, 3, 9])
@pytest.mark.parametrize("sizes", [(6, 5, 12, 2, 16), (5, 3, 5, 3, 5), (1, 3, 8, 1, 8), (3, 7, 12, 1, 300)], ids=str)
def test_depth_attention(
    sizes: tuple[int, int, int, int, int], window: int, initial_state: bool, dtype: torch.dtype
) -> None:
    check(partial(attention_call, sizes=sizes, dtype=dtype, window=window, initial_state=initial_state), dtype)


@pytest.mark.parametrize("sizes", [(70, 3, 4, 2, 2), (70, 2, 4, 1, 24)], ids=str)
def test_attention_to_more_taps_than_lanes(sizes: tuple[int, int, int, int, int]) -> None:
    """Attention to more taps than a team of one lane holds in shared memory runs on fewer teams of more lanes. In
    float64, as rounding grows over so many layers."""
    check(partial(attention_call, sizes=sizes, dtype=torch.float64, window=65), torch.float64, draws=1)


@pytest.mark.parametrize("layout", [misaligned, padded, layers_inside], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_any_layout(dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    check(partial(gru_call, sizes=(3, 5, 8, 16), dtype=dtype, layout=layout), dtype)
    check(partial(attention_call, sizes=(3, 5, 8, 2, 8), dtype=dtype, layout=layout), dtype)


@pytest.mark.parametrize("make", [gru_call, attention_call])
def test_nan_stays_with_its_token(make: Callable[..., Call]) -> None:
    generator = fresh_generator()
    call = make(generator, (4, 3, 8, 16) if make is gru_call else (4, 3, 8, 2, 8), torch.float32)
    name, taps = next(iter(call.given.items()))
    assert taps is not None
    poisoned = taps.clone()
    poisoned[1, 1, 3] = math.nan
    clean, found = call.native(call.given, call.grad), call.native(call.given | {name: poisoned}, call.grad)
    for result in ("states", f"grad_{name}", "grad_initial_state"):
        torch.testing.assert_close(found[result][..., ::2, :], clean[result][..., ::2, :])
    assert torch.equal(found["states"][0], clean["states"][0]) and found["states"][1:, 1].isnan().all()


def test_attention_to_more_taps_than_the_kernels_take_is_refused() -> None:
    call = attention_call(fresh_generator(), (257, 1, 1, 1, 1), torch.float32, window=257)
    with pytest.raises(RuntimeError, match="depth_attention attend to at most 256 taps, got 257"):
        call.native(call.given, call.grad)


# ---- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_same_bits_in_every_order(dtype: torch.dtype) -> None:
    generator = fresh_generator()
    calls = [
        ema_call(generator, (4, 40, 40), dtype, norm=False),
        ema_call(generator, (30, 40, 24), dtype, norm=False),
        ema_call(generator, (4, 9, 600), dtype),
        ema_call(generator, (30, 9, 24), dtype),
        gru_call(generator, (3, 70, 8, 16), dtype),
        attention_call(generator, (5, 20, 8, 2, 8), dtype),
    ]
    found: list[list[Tensor]] = []
    for seed in (1, 2, 3):
        emulation.set_seed(seed)
        found.append([result for call in calls for result in call.native(call.given, call.grad).values()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("empty", [(0, 3, 8), (2, 0, 8), (2, 3, 0)], ids=str)
def test_nothing_in_nothing_out(empty: tuple[int, int, int]) -> None:
    """No layers, no tokens, no width: whatever has a size is zero, or the initial state and its gradient."""
    layers, tokens, width = empty
    generator = fresh_generator()
    for norm in (False, True):
        for last_only in (False, True):
            call = ema_call(generator, empty, torch.float32, norm=norm, last_only=last_only)
            found, exact = call.native(call.given, call.grad), call.exact(None) if layers else {}
            for name, tensor in exact.items():
                assert torch.equal(found[name], tensor), name
            if not layers and last_only:
                initial_state = call.given["initial_state"]
                assert initial_state is not None and torch.equal(found["states"], initial_state)
                assert torch.equal(found["grad_initial_state"], call.grad)
    calls = [
        gru_call(generator, (layers, tokens, 5, width), torch.float32),
        attention_call(generator, (layers, tokens, width, 2, 4), torch.float32),
    ]
    for call in calls:
        found = call.native(call.given, call.grad)
        assert not any(grad.any() for name, grad in found.items() if name != "states")


def test_no_inputs_and_no_keys() -> None:
    generator = fresh_generator()
    calls = [
        gru_call(generator, (2, 3, 0, 8), torch.float32),
        attention_call(generator, (2, 3, 8, 1, 0), torch.float32),
    ]
    for call in calls:
        found, exact = call.native(call.given, call.grad), call.exact(torch.float64)
        for name, tensor in exact.items():
            torch.testing.assert_close(found[name], tensor.float(), msg=name)
