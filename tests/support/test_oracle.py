"""The oracle rule itself: what it lets pass, and what it does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from oracle import POOLED, Draw, check_oracle_rule, draw, fresh_generator, hdim_case, without_kinks
from xlayer_ext.reference.hdim import pair_features


def maker(times: float, numbers: int) -> Callable[[], Draw]:
    """Draws of an implementation whose errors are so many times those of plain PyTorch, which are 1e-4."""
    generator = fresh_generator()

    def make() -> Draw:
        exact = draw(generator, numbers)
        plain, actual = (exact + 1e-4 * gain * draw(generator, numbers) for gain in (1, times))
        return Draw(*({"result": side} for side in (actual.float(), exact, plain.float())))

    return make


@pytest.mark.parametrize("numbers", [4, 4000])
def test_smaller_errors_pass_and_three_times_the_error_does_not(numbers: int) -> None:
    check_oracle_rule(maker(0.6, numbers), torch.float32, draws=6)
    with pytest.raises(AssertionError, match="result: error"):
        check_oracle_rule(maker(3.0, numbers), torch.float32, draws=6)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float64, 3), (torch.float32, 3 * POOLED)])
def test_the_number_of_draws_is_fixed(dtype: torch.dtype, expected: int) -> None:
    calls = []

    def make() -> Draw:
        calls.append(1)
        return maker(3.0, 5)()

    with pytest.raises(AssertionError):
        check_oracle_rule(make, dtype, draws=3)
    assert len(calls) == expected


def test_not_a_number_does_not_pass() -> None:
    def make() -> Draw:
        return Draw({"x": torch.full((2,), torch.nan)}, {"x": torch.ones(2).double()}, {"x": torch.ones(2)})

    with pytest.raises(AssertionError, match="x: error nan"):
        check_oracle_rule(make, torch.float32, draws=1)


def test_no_pair_is_at_a_kink() -> None:
    case = without_kinks(hdim_case(fresh_generator(), dtype=torch.float32))
    floats = case.to(torch.float64).floats
    features = pair_features(floats["query"], floats["key"])
    hidden = features @ floats["weight1"].mT + floats["bias1"]
    assert hidden.abs().min() >= 2e-6
