"""The operators on the emulator: its instructions are right, every operator is there, and with --device emulated it is
the emulator that runs them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import emulation
from oracle import FLOATS, fresh_generator, hdim_case
from xlayer_ext import backend
from xlayer_ext import functional as XF


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
