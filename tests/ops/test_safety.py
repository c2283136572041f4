"""Direct calls of the operators that no caller should make: none may leave its memory or run for ever, and each error
is one line that tells what was wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from oracle import draw, fresh_generator, need_native
from xlayer_ext import _library
from xlayer_ext import functional as XF

pytestmark = pytest.mark.operators

HUGE = 2**62


def op(name: str) -> Callable[..., object]:
    return getattr(torch.ops.xlayer, name)  # type: ignore[no-any-return]


def expanded(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Makes a tensor of any shape in the memory of one element."""
    return torch.ones((), dtype=dtype, device=device).expand(shape)


# --- Sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [0, -1, 2, 2**31, HUGE])
def test_heads_of_no_width_are_one(heads: int, device: str) -> None:
    need_native("depth_attention", device)
    taps, query = torch.ones(2, 3, 0, device=device), torch.ones(0, 4, device=device)
    with pytest.raises(RuntimeError, match=f"num_heads must divide the width of the keys, 0, got {heads}"):
        op("depth_attention")(taps, taps, query, query.T, None, heads, 1, 1.0, True)
    with pytest.raises(ValueError, match=f"num_heads must divide e = 0, got {heads}"):
        XF.depth_attention(taps, query, taps[0, :0], taps[0, :0], query.T, num_heads=heads)


@pytest.mark.parametrize("shape", [(1, HUGE, 1), (1, 2**51, 1), (HUGE, 1, 1), (1, HUGE, 0), (2**31, 2**31, 0)])
def test_shapes_beyond_any_memory_are_refused(shape: tuple[int, ...], device: str) -> None:
    need_native("vq_nearest", device)
    rows = expanded(*shape, device=device)
    few = torch.ones(shape[0] if shape[0] < 9 else 1, 1, shape[2], device=device)
    calls: list[Callable[[], object]] = [
        lambda: op("masked_mean")(rows, None),
        lambda: op("ema_scan")(rows, torch.zeros(1, device=device), None, None, None, 1e-5, True),
        lambda: op("fsq")(rows, [5], [], [], [], False, False),
        lambda: op("vq_statistics")(rows, expanded(*shape[:2], device=device, dtype=torch.int64), 4),
    ]
    if shape[0] == 1 and shape[2] == 1:
        calls.append(lambda: op("vq_nearest")(few, rows, False, False))
    for call in calls:
        with pytest.raises(RuntimeError, match=r"must have at most 2\^50 elements|must have a column") as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: op("vq_statistics")(x, torch.zeros(1, 2, dtype=torch.int64, device=x.device), HUGE),
        lambda x: op("masked_mean_backward")(x[0], None, HUGE),
    ],
    ids=["vq_statistics", "masked_mean_backward"],
)
def test_numbers_beyond_any_memory_are_refused(call: Callable[[Tensor], object], device: str) -> None:
    need_native("vq_nearest", device)
    for width in (0, 3):
        with pytest.raises(RuntimeError, match=r"must have at most 2\^50 elements"):
            call(torch.ones(1, 2, width, device=device))


def test_scratch_beyond_any_memory_is_refused(device: str) -> None:
    """Sizes that are fine each, whose product no workspace can have."""
    need_native("hdim_attention", device)
    query, key = expanded(1, 2**40, 1, device=device), expanded(1, 2**20, 1, device=device)
    weight1, bias1 = torch.ones(64, 4, device=device), torch.ones(64, device=device)
    with pytest.raises(RuntimeError, match=r"2\^61|2\^50|memory"):
        op("hdim_attention")(query, key, key, weight1, bias1, bias1, None, None, 1.0, False, False)


@pytest.mark.parametrize("sinkhorn_iters", [0, -1, 1001, 2**32])
def test_iterations_are_bounded(sinkhorn_iters: int, device: str) -> None:
    need_native("hyper_pre", device)
    streams = torch.ones(1, 3, 2, 4, device=device)
    base, weight, scale = (torch.zeros(n, m, device=device) for n, m in ((2, 4), (4, 4), (1, 4)))
    with pytest.raises(RuntimeError, match=f"sinkhorn_iters must be 1 to 1000, got {sinkhorn_iters}"):
        op("hyper_pre")(streams, base, weight, None, scale[0], 2, 2, sinkhorn_iters, 1e-5)


# --- Nothing to do -------------------------------------------------------------------------------------------------

MANY = 2**40


def test_many_empty_rows_take_no_time(device: str) -> None:
    need_native("ema_scan", device)
    empty, logits = torch.ones(1, MANY, 0, device=device), torch.zeros(1, device=device)
    assert op("masked_mean")(torch.ones(MANY, 3, 0, device=device), None).shape == (MANY, 0)  # type: ignore[attr-defined]
    assert op("masked_mean_backward")(empty[:, 0], None, MANY).shape == (1, MANY, 0)  # type: ignore[attr-defined]
    assert op("ema_scan")(empty, logits, None, None, None, 1e-5, False).shape == (1, MANY, 0)  # type: ignore[attr-defined]
    grads = op("ema_scan_backward")(empty, empty, logits, empty[0], None, None, 1e-5, False)
    assert [g.numel() for g in grads] == [0, 1, 0, 0, 0]  # type: ignore[attr-defined]
    none = torch.ones(0, 0, device=device)
    op("depth_gru")(empty, none, none, none[0:0, 0:0].reshape(0), none.reshape(0), None, True)
    gates = torch.ones(1, MANY, 4, 0, device=device)
    op("depth_gru_backward")(empty, empty, gates, empty, none, none, None)
    op("depth_attention")(empty, empty, none, none, None, 1, 1, 1.0, True)
    op("depth_attention_backward")(empty, empty, empty, empty, empty, none, none, None, 1, 1, 1.0)


def test_states_without_width_attend_to_all_taps_alike(device: str) -> None:
    need_native("depth_attention", device)
    generator = fresh_generator()
    keys, values = (draw(generator, 3, 5, 4, dtype=torch.float32).to(device) for _ in range(2))
    query, out = torch.ones(4, 0, device=device), torch.ones(0, 4, device=device)
    states, attended = op("depth_attention")(keys, values, query, out, None, 2, 2, 1.0, True)  # type: ignore[misc]
    assert states.shape == (3, 5, 0)
    expected = torch.stack([values[0], values[:2].mean(0), values[1:].mean(0)])
    torch.testing.assert_close(attended, expected)
    grads = op("depth_attention_backward")(states, states, attended, keys, values, query, out, None, 2, 2, 1.0)
    assert all(g.count_nonzero() == 0 for g in grads)  # type: ignore[attr-defined]


def dirtied(device: str) -> None:
    """Leaves memory full of NaN for the next allocations."""
    for size in (8, 16, 64, 256, 1024):
        blocks = [torch.full((size,), torch.nan, device=device) for _ in range(16)]
        del blocks


@pytest.mark.parametrize("layers", [0, 2])
def test_gradients_of_nothing_are_zeros(layers: int, device: str) -> None:
    """Without layers or without tokens, gradients that have elements are 0, not uninitialized memory."""
    need_native("ema_scan", device)
    tokens = 3 if layers == 0 else 0
    x, e = torch.ones(layers, tokens, 8, device=device), torch.ones(8, 8, device=device)
    start, three, bias = (
        torch.ones(tokens, 8, device=device),
        torch.ones(24, 8, device=device),
        torch.ones(8, device=device),
    )
    for _ in range(3):
        dirtied(device)
        logits = torch.ones(layers, device=device)
        grads = [*op("ema_scan_backward")(x, x, logits, start, bias, bias, 1e-5, False)]  # type: ignore[misc]
        last = op("ema_scan_backward")(start, x, logits, start, bias, bias, 1e-5, True)
        torch.testing.assert_close(last[2], start)  # type: ignore[index]
        grads += [last[k] for k in (0, 1, 3, 4)]  # type: ignore[index]
        gates = torch.ones(layers, tokens, 4, 8, device=device)
        grads += op("depth_gru_backward")(x, x, gates, x, three, three, start)  # type: ignore[arg-type,operator]
        grads += op("depth_attention_backward")(x, x, x, x, x, e, e, start, 2, 2, 1.0)  # type: ignore[arg-type,operator]
        assert all(g.count_nonzero() == 0 for g in grads)


# --- Masks ---------------------------------------------------------------------------------------------------------


def byte_mask(generator: torch.Generator, *shape: int, device: str) -> tuple[Tensor, Tensor]:
    """Returns a mask whose true bytes are anything but 0, and the same mask of 0 and 1."""
    kinds = torch.tensor([0, 1, 2, 4, 128, 254, 255], dtype=torch.uint8)
    bytes_ = kinds[torch.randint(len(kinds), shape, generator=generator)]
    return bytes_.view(torch.bool).to(device), (bytes_ != 0).to(device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_byte_but_zero_is_true_to_masked_mean(dtype: torch.dtype, device: str) -> None:
    need_native("masked_mean", device)
    generator = fresh_generator()
    for tokens, width in ((7, 5), (70, 130)):
        x, grad = draw(generator, 3, tokens, width, dtype=dtype), draw(generator, 3, width, dtype=dtype)
        odd, plain = byte_mask(generator, 3, tokens, device=device)
        x, grad = x.to(device), grad.to(device)
        assert torch.equal(op("masked_mean")(x, odd), op("masked_mean")(x, plain))  # type: ignore[arg-type]
        backward = op("masked_mean_backward")
        assert torch.equal(backward(grad, odd, tokens), backward(grad, plain, tokens))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["key", "pair", "both"])
def test_any_byte_but_zero_is_true_to_hdim(which: str, dtype: torch.dtype, device: str) -> None:
    need_native("hdim_attention", device)
    generator = fresh_generator()
    query, key, value = (draw(generator, 2, n, 8, dtype=dtype).to(device) for n in (5, 19, 19))
    weight1, bias1, weight2 = (draw(generator, *s, dtype=dtype).to(device) for s in ((16, 32), (16,), (16,)))
    key_masks, pair_masks = byte_mask(generator, 2, 19, device=device), byte_mask(generator, 2, 5, 19, device=device)
    results = []
    for k in range(2):
        masks = (key_masks[k] if which != "pair" else None, pair_masks[k] if which != "key" else None)
        saved = op("hdim_attention")(query, key, value, weight1, bias1, weight2, *masks, 1.0, False, False)
        grads = op("hdim_attention_backward")(
            query, None, query, key, value, weight1, bias1, weight2, *masks, *saved[:2], 1.0, False, False
        )  # type: ignore[misc]
        results.append([*saved, *grads])  # type: ignore[misc]
    for odd, plain in zip(*results, strict=True):
        assert torch.equal(odd, plain)


# --- Writers in other threads --------------------------------------------------------------------------------------

RACE = """
import threading, torch, xlayer_ext
rows, codes = 400_000, 5000
x, stop = torch.ones(1, rows, 1), threading.Event()
indices = torch.zeros(1, rows, dtype=torch.int64)
def write():
    while not stop.is_set():
        indices.fill_(codes - 1), indices.fill_(0), indices.fill_(-1), indices.fill_(codes // 2)
writer = threading.Thread(target=write)
writer.start()
try:
    for _ in range(60):
        counts, sums = torch.ops.xlayer.vq_statistics(x, indices, codes)
        # Every row is counted once or nowhere, and added where it is counted.
        assert counts.min() >= 0 and counts.sum() <= rows and torch.equal(counts, sums[..., 0]), counts
finally:
    stop.set(), writer.join()
"""


@pytest.mark.cpu_kernels
def test_indices_that_change_meanwhile_break_nothing() -> None:
    need_native("vq_statistics")
    done = subprocess.run([sys.executable, "-c", RACE], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


# --- Memory that is not there --------------------------------------------------------------------------------------


def test_torchs_own_message_when_memory_is_full(device: str) -> None:
    need_native("vq_nearest", device)
    x, codes = expanded(1, 2**48, 2, device=device), torch.ones(1, 3, 2, device=device)
    calls: list[Callable[[], object]] = [
        lambda: op("vq_nearest")(x, codes, False, False),  # results
        lambda: op("ema_scan")(x.mT, torch.zeros(1, device=device), None, None, None, 1e-5, False),  # a copy
        lambda: XF.vq_nearest(x[0], codes[0]),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"can't allocate memory|not enough memory|out of memory") as error:
            call()
        assert "\n" not in str(error.value) and "API call failed" not in str(error.value)


def test_a_full_device_is_an_out_of_memory_error(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The wrapper that CUDA builds of torch put around the operators raises OutOfMemoryError, called and compiled."""
    need_native("masked_mean", device)

    def full(*_: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        _library._raising_out_of_memory(full)()
    packet = torch.ops.xlayer.masked_mean
    for op_ in (packet, packet.default):
        monkeypatch.setattr(op_, "_op", op_._op)  # what is put back
    _library._translate_out_of_memory([packet])
    x = torch.ones(2, 3, 4, device=device, requires_grad=True)
    compiled = torch.compile(XF.masked_mean, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), XF.masked_mean(x))
    compiled(x).sum().backward()
    with pytest.raises(RuntimeError, match="x must have shape"):
        packet(x[0], None)


@pytest.mark.parametrize("name", ["hyper_pre", "hyper_post", "vq_nearest", "ema_scan", "hdim_attention"])
def test_no_tensor_and_a_tensor_without_dimensions_are_named(name: str, device: str) -> None:
    need_native(name, device)
    schema = op(name).default._schema  # type: ignore[attr-defined]
    one = torch.ones((), device=device)
    kinds = {"Tensor": one, "int": 1, "float": 1.0, "bool": False, "SymInt": 1}
    given = [kinds.get(str(a.type)) for a in schema.arguments]
    first = schema.arguments[0].name
    with pytest.raises(RuntimeError, match=f"{first} must have shape"):
        op(name)(*given)
    with pytest.raises(RuntimeError, match=f"{first} must be a tensor, got None"):
        op(name)(None, *given[1:])
