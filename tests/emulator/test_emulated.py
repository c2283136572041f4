"""The operators on the emulator: its instructions are right, every operator is there, with --device emulated it is the
emulator that runs them, and the blocks that they launch are as the kernels' sources state (test_kernel_resources.py).
"""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kernel_resources import promises_of, resources
from torch import Tensor

import emulation
from emulation import LaunchedBlock
from oracle import DTYPES, FLOATS, fresh_generator, hdim_case
from xlayer_ext import backend
from xlayer_ext import functional as XF

pytestmark = pytest.mark.operators


def masked_mean() -> Tensor:
    return XF.masked_mean(torch.ones(2, 5, 3, requires_grad=True))


def hdim_attention() -> Tensor:
    case = hdim_case(fresh_generator(), sizes=(1, 3, 5, 4, 6, 2), dtype=torch.float32)
    return XF.hdim_attention(**{name: case.floats[name].requires_grad_() for name in FLOATS})


def test_instructions_and_launches() -> None:
    child = subprocess.run([emulation.FOLDER / "emulator_selftest"], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout + child.stderr


def test_every_native_operator_has_a_kernel_there() -> None:
    assert emulation.operators() == emulation.kernels_of("xlayer") != frozenset()


def test_both_libraries_serve_one_process() -> None:
    x = torch.randn(3, 7, 5, generator=fresh_generator(), dtype=torch.float64)
    launched = emulation.launches()
    actual = torch.ops.xlayer_emulated.masked_mean(x, None)
    assert emulation.launches() == launched + 1
    torch.testing.assert_close(actual, torch.ops.xlayer.masked_mean(x, None))


@pytest.mark.emulated_kernels
@pytest.mark.parametrize("call", [masked_mean, hdim_attention])
def test_the_emulator_serves(call: Callable[[], Tensor]) -> None:
    """Counts launches: a suite that had fallen back to the CPU kernels would pass unseen."""
    with backend("native"):
        before = emulation.launches()
        out = call()
        between = emulation.launches()
        out.sum().backward()
    assert before < between < emulation.launches()


# --- The blocks of launches ------------------------------------------------------------------------------------------


def launch_masked_mean(dtype: torch.dtype, width: int) -> None:
    out = torch.ops.xlayer_emulated.masked_mean(torch.zeros(1, 2, width, dtype=dtype), None)
    torch.ops.xlayer_emulated.masked_mean_backward(out, None, 2)


def launch_hdim(
    dtype: torch.dtype, gelu: bool, tf32: bool, keys: int, columns: int, hidden: int, value_columns: int
) -> None:
    tokens = [(1, 1, columns), (1, keys, columns), (1, keys, value_columns)]
    shapes = [*tokens, (hidden, 4 * columns), (hidden,), (hidden,)]
    floats = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    masks = [torch.ones(1, keys, dtype=torch.bool), None]
    outputs = torch.ops.xlayer_emulated.hdim_attention(*floats, *masks, 1.0, gelu, tf32)
    torch.ops.xlayer_emulated.hdim_attention_backward(outputs[0], None, *floats, *masks, *outputs[:2], 1.0, gelu, tf32)


def launch_hyper(dtype: torch.dtype, n: int, width: int, norm: int, shared: bool) -> None:
    """Launches the boundary and its backward; norm 0, 1 and 3 are static, of each stream and of all together."""
    wide = torch.promote_types(dtype, torch.float32)
    streams, rows = torch.zeros(1, 2, n, width, dtype=dtype), torch.zeros(1, 2, width, dtype=dtype)
    coefficients = torch.zeros((n, n + 2) if shared else (1, 2, n, n + 2), dtype=wide)
    weights = (n * (n + 2), n * width) if norm == 3 else (n + 2, width)
    dynamic = [torch.zeros(weights, dtype=wide), None, torch.zeros(n + 2, dtype=wide)] if norm else [None] * 3
    connection = (torch.zeros(n, n + 2, dtype=wide), *dynamic, norm, 2 if norm == 3 else 1, 20, 1.0)
    post = (streams, rows, coefficients)
    out, x, *made = torch.ops.xlayer_emulated.hyper_post_pre(*post, *connection)
    torch.ops.xlayer_emulated.hyper_post_pre_backward(out, x, None, *post, *made, *connection)


def launch_quantize(dtype: torch.dtype, width: int, tf32: bool) -> None:
    """Launches the search and the statistics of rows of `width` numbers, and finite scalar quantization of `width` or
    64."""
    x, codebook = torch.zeros(1, 2, width, dtype=dtype), torch.zeros(1, 3, width, dtype=dtype)
    indices, _ = torch.ops.xlayer_emulated.vq_nearest(x, codebook, False, tf32)
    torch.ops.xlayer_emulated.vq_statistics(x, indices, 3)
    levels = [3] * min(width, 64)
    for aligned, offset, keep in itertools.product((True, False), repeat=3):
        z = torch.zeros(3 * len(levels) + 1, dtype=dtype)[0 if aligned else 1 :][: 3 * len(levels)].view(3, -1)
        bound = [[column] * len(levels) if offset else [] for column in (0.0, 1.0, 0.0)]
        torch.ops.xlayer_emulated.fsq(z, levels, *bound, offset, keep)


def launch_ema_scan(dtype: torch.dtype, layers: int, width: int, norm: bool) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    x, gates = torch.zeros(layers, 1, width, dtype=dtype), torch.zeros(layers, dtype=wide)
    parameters = [torch.zeros(width, dtype=wide)] * 2 if norm else [None, None]
    states = torch.ops.xlayer_emulated.ema_scan(x, gates, None, *parameters, 1e-5, False)
    torch.ops.xlayer_emulated.ema_scan_backward(states, x, gates, None, *parameters, 1e-5, False)


def launch_depth(dtype: torch.dtype, width: int) -> None:
    """Launches the recurrent unit, and attention to 32 taps by a head of `width`."""
    weights = [torch.zeros(3 * width, width, dtype=dtype)] * 2
    x, bias, initial_state = (torch.zeros(shape, dtype=dtype) for shape in ((2, 1, width), (3 * width,), (1, width)))
    states, gates = torch.ops.xlayer_emulated.depth_gru(x, *weights, bias, bias, initial_state, True)
    torch.ops.xlayer_emulated.depth_gru_backward(states, states, gates, x, *weights, initial_state)
    taps, square = torch.zeros(32, 1, width, dtype=dtype), torch.zeros(width, width, dtype=dtype)
    given = (taps, taps, square, square, initial_state, 1, 32, 1.0)
    states, attended = torch.ops.xlayer_emulated.depth_attention(*given, True)
    torch.ops.xlayer_emulated.depth_attention_backward(states, states, attended, *given)


def launch_aggregate(dtype: torch.dtype) -> None:
    """Launches rows loaded as vectors and element by element; rows that just fit, in layers that do, and rows that do
    not."""
    layers = 4 if dtype == torch.float64 else 9
    for width in (2048, 2047):
        launch_ema_scan(dtype, layers, width, norm=True)
    for width in (4096, 4095, 4104, 4097):
        launch_ema_scan(dtype, 1, width, norm=True)
    for width in (8, 9):
        launch_ema_scan(dtype, 24, width, norm=False)
        launch_depth(dtype, width)
    launch_depth(dtype, 1)
    launch_ema_scan(dtype, 512, 2, norm=True)


def launch_every_kernel() -> None:
    """Launches every kernel, each also with the most shared memory that it ever asks for."""
    for dtype, n, width in ((torch.float32, 4, 2200), (torch.float32, 8, 2200), (torch.float64, 4, 1000)):
        launch_hyper(dtype, n, width, 1, False)
    for dtype, n, norm, shared in itertools.product(DTYPES, (2, 4, 8, 16), (0, 1, 3), (False, True)):
        launch_hyper(dtype, n, 40, norm, shared)
    for dtype in DTYPES:
        launch_aggregate(dtype)
        for width in (32, 33):  # loaded as vectors, and element by element
            launch_masked_mean(dtype, width)
        tf32 = (False, True) if dtype == torch.float32 else (False,)
        for rounds, width in itertools.product(tf32, (33, 80)):  # element by element, and rows that just fit
            launch_quantize(dtype, width, rounds)
        for gelu, rounds, columns in itertools.product((False, True), tf32, (16, 24, 32, 64)):
            # More keys and more hidden units than fit at a time; not both at once, which would take long.
            launch_hdim(dtype, gelu, rounds, 700, columns, 16, 3)
            launch_hdim(dtype, gelu, rounds, 5, columns, 432, 8)


def every_kernel() -> set[str]:
    names = {resources.without_parameters(name) for name in emulation.functions().values()}
    return {name for name in names if re.fullmatch(r"\w+_kernel(<.*>)?", name)}


def wrong_blocks(blocks: Iterable[LaunchedBlock], promises: Iterable[Any]) -> list[str]:
    """Lists blocks with other threads or more shared memory than stated, and statements that no launch comes near."""
    wrong = []
    most = {promise: 0 for promise in promises if isinstance(promise, resources.Ceiling)}
    for kernel, threads, shared_bytes in blocks:
        ceiling = resources.ceiling_of(kernel, most)
        if ceiling is None:
            wrong.append(f"{kernel} has no `// resources:` above it")
            continue
        if threads != ceiling.threads:
            wrong.append(f"{kernel} is launched with {threads} threads, {ceiling.where} states {ceiling.threads}")
        if shared_bytes > ceiling.shared:
            asks = f"{kernel} asks for {shared_bytes} bytes of shared memory"
            wrong.append(f"{asks}, {ceiling.where} states {ceiling.shared}")
        most[ceiling] = max(most[ceiling], shared_bytes)
    for ceiling, asked in most.items():
        if asked < 0.75 * ceiling.shared:
            states = f"{ceiling.where} states {ceiling.shared} bytes of shared memory"
            wrong.append(f"{states}, its kernels ask for {asked} at most")
    return wrong


def test_blocks_are_as_the_sources_state() -> None:
    emulation.forget_launched_blocks()
    launch_every_kernel()
    blocks = [
        block._replace(kernel=resources.without_parameters(block.kernel)) for block in emulation.launched_blocks()
    ]
    assert {block.kernel for block in blocks} == every_kernel()
    assert wrong_blocks(blocks, resources.promises()) == []


STATED = "kernels.cu:1 states 1024 bytes of shared memory"
FULL = ("k<float, 4>", 256, 1024)


@pytest.mark.parametrize(
    ("blocks", "complaints"),
    [
        ([FULL], []),
        ([FULL, ("k<float, 8>", 256, 0)], []),
        ([("k<float, 4>", 256, 768)], []),
        ([("k<float, 4>", 256, 767)], [f"{STATED}, its kernels ask for 767 at most"]),
        ([("k<float, 4>", 256, 1025)], ["k<float, 4> asks for 1025 bytes of shared memory, kernels.cu:1 states 1024"]),
        ([("k<float, 4>", 128, 1024)], ["k<float, 4> is launched with 128 threads, kernels.cu:1 states 256"]),
        ([FULL, ("other", 256, 0)], ["other has no `// resources:` above it"]),
    ],
)
def test_a_block_that_is_not_as_stated_is_named(
    tmp_path: Path, blocks: list[tuple[str, int, int]], complaints: list[str]
) -> None:
    promises = promises_of(tmp_path, "resources: k threads 256, registers 64, shared 1024, occupancy 0.5")
    assert wrong_blocks([LaunchedBlock(*block) for block in blocks], promises) == complaints
