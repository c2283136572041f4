"""The benchmark of quantize: the least work by hand, the checks before the clock, and one run of everything."""

import importlib.util
import sys

import pytest
import torch

from benchmarks.cases import quantize as quantize_cases
from benchmarks.harness import measure
from xlayer_ext import reference
from xlayer_ext._backend import use_native

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_least_work_by_hand():
    size = (10, 6, 4)  # N, K, D
    assert quantize_cases.least_flops("nearest", size) == 2 * 10 * 6 * 4
    assert quantize_cases.least_bytes("nearest", "fwd", size, 4) == 4 * (40 + 24) + 10 * 12
    assert quantize_cases.least_bytes("nearest", "fwd", size, 2) == 2 * (40 + 24) + 10 * 12
    assert quantize_cases.least_bytes("statistics", "fwd", size, 4) == 4 * 40 + 80 + 4 * 6 * 5
    forward, backward, both = (quantize_cases.least_bytes("fsq", pass_, size, 4) for pass_ in measure.PASSES)
    assert (forward, backward, both) == (2 * 160 + 80, 3 * 160, 5 * 160 + 80)


def test_fsq_passes_return_codes_and_gradients():
    arguments = ("eager", "fsq"), ("tanh", [40, 5, 4], "float32", "cpu")
    forward, backward, both = (quantize_cases.build(*arguments[0], pass_, *arguments[1])() for pass_ in measure.PASSES)
    for actual, expected in zip([*forward, *backward], both, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("op", "how"), [("nearest", "euclidean"), ("nearest", "cosine"), ("statistics", "euclidean"), ("fsq", "offset")]
)
def test_wrong_results_never_reach_the_clock(op, how, monkeypatch):
    class Wrong:
        @staticmethod
        def vq_nearest(x, codebook, metric):
            indices, distance = reference.vq_nearest(x, codebook, metric)
            return (indices + 1) % len(codebook), distance

        @staticmethod
        def vq_statistics(x, indices, codes):
            return reference.vq_statistics(1.001 * x, indices, codes)

        @staticmethod
        def fsq(z, levels, bound):
            return reference.fsq(1.1 * z, levels, bound=bound)

    arguments = (op, how, (40, 30, 16), "float32", "cpu")
    check = quantize_cases._check.__wrapped__
    monkeypatch.setattr(quantize_cases, "functional", reference)
    check(*arguments)
    monkeypatch.setattr(quantize_cases, "functional", Wrong)
    with pytest.raises(AssertionError):
        check(*arguments)


def test_a_package_with_other_codes_is_refused():
    generator = torch.Generator().manual_seed(0)
    x, codebook = torch.randn(20, 4, generator=generator), torch.randn(9, 4, generator=generator)
    indices, _ = reference.vq_nearest(x, codebook)
    ours = codebook[indices], indices
    quantize_cases.check_peer("nearest", "euclidean", ours, ours, x, codebook)
    other = (indices + 1) % 9
    with pytest.raises(AssertionError, match="not the nearest"):
        quantize_cases.check_peer("nearest", "euclidean", (codebook[other], other), ours, x, codebook)
    with pytest.raises(AssertionError, match="differ"):
        quantize_cases.check_peer("fsq", "tanh", (x + 1, indices), (x, indices), x, None)


def test_scores_that_fit_nowhere_are_not_tried():
    large = torch.empty(1, 64).expand(65536, 64)
    for impl in ("eager", "gemm"):
        with pytest.raises(measure.Unavailable, match="16 GiB"):
            quantize_cases.implementation(impl, "nearest", "euclidean", 65536, (large, large))


@linux
def test_script_prints_its_implementations(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    assert quantize_cases.main(["--quick", "--no-compile", "--no-memory", "--json", "--out", str(path)]) == 0
    rows = [measure.Row.from_json(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == measure.read_rows(path)
    package = {"vector-quantize-pytorch"} if importlib.util.find_spec("vector_quantize_pytorch") else set()
    native = {"native"} if use_native("vq_nearest", torch.empty(1)) else set()
    expected = {"nearest": {"gemm"} | package, "statistics": set(), "train": package, "fsq": package}
    for op, impls in expected.items():
        assert {row.impl for row in rows if row.op == op} == {"eager"} | native | impls
