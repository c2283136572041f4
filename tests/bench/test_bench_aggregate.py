"""The benchmark of aggregation: the least work by hand, the checks before the clock, and one run of everything."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks.cases import aggregate as aggregate_cases
from benchmarks.harness import measure
from xlayer_ext import functional as XF
from xlayer_ext._backend import use_native

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
SIZE = (3, 10, 16)


def test_least_work_by_hand() -> None:
    row = 4 * 10 * 16  # one layer's rows in float32
    assert aggregate_cases.least_bytes("ema", "fwd", SIZE, 4) == 6 * row
    assert aggregate_cases.least_bytes("ema", "bwd", SIZE, 4) == 9 * row
    assert aggregate_cases.least_bytes("ema-last", "fwd", SIZE, 4) == 4 * row
    assert aggregate_cases.least_bytes("ema-last", "bwd", SIZE, 2) == 7 * row // 2
    assert aggregate_cases.least_bytes("gru", "fwd", SIZE, 4) == 6 * row + 4 * 6 * 16 * 16
    assert aggregate_cases.least_flops("ema", "fwd", SIZE) == 0
    assert aggregate_cases.least_flops("gru", "fwd", SIZE) == 3 * 10 * 2 * (16 * 48 + 16 * 48)
    assert aggregate_cases.least_flops("attention", "bwd", SIZE) == 2 * 3 * 10 * 2 * 4 * 16 * 16


@pytest.mark.parametrize("op", aggregate_cases.KERNELS)
def test_passes_return_states_and_gradients(op: str) -> None:
    forward, backward, both = (
        aggregate_cases.build("eager", op, pass_, list(SIZE), "float32", "cpu")() for pass_ in measure.PASSES
    )
    for actual, expected in zip([forward, *backward], both, strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_stepped_cell_is_the_gru() -> None:
    given = aggregate_cases.make_inputs("gru", SIZE, "float64", "cpu")
    torch.testing.assert_close(aggregate_cases.cell(*given), XF.depth_gru(*given))
    assert aggregate_cases.gemm(*given).shape == (10, 48)


@pytest.mark.parametrize("op", aggregate_cases.KERNELS)
def test_wrong_results_never_reach_the_clock(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, plain = aggregate_cases.OPERATORS[op], aggregate_cases.with_backend
    arguments = (op, SIZE, "float32", "cpu")
    check = aggregate_cases._check.__wrapped__
    monkeypatch.setattr(aggregate_cases, "with_backend", lambda choice, *rest: plain("auto", *rest))
    check(*arguments)

    def wrong(choice: str, operator: object, *given: torch.Tensor) -> torch.Tensor:
        return right(*given) * (1.001 if choice == "native" else 1)

    monkeypatch.setattr(aggregate_cases, "with_backend", wrong)
    with pytest.raises(AssertionError, match=op):
        check(*arguments)


@linux
def test_script_prints_its_implementations(tmp_path, capsys) -> None:
    path = tmp_path / "rows.jsonl"
    assert aggregate_cases.main(["--quick", "--no-compile", "--no-memory", "--json", "--out", str(path)]) == 0
    rows = [measure.Row.from_json(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == measure.read_rows(path)
    native = {"native"} if use_native("ema_scan", torch.empty(1)) else set()
    for op in aggregate_cases.KERNELS:
        found = {row.impl for row in rows if row.op == op and row.pass_ == "fwd"}
        assert found == {"eager"} | native | ({"cell", "gemm"} if op == "gru" else set())
