"""The benchmark of whole training steps: both backends agree, work is counted as it is done, rows say what was run."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

pytest.importorskip("transformers")

from test_bench import linux, make_row

from benchmarks.cases import hyper_model as hyper_model_cases
from benchmarks.cases import system_steps
from benchmarks.cases import systems as systems_cases
from benchmarks.harness import measure, training
from benchmarks.pages import performance
from benchmarks.report import page, suite
from xlayer_ext import functional
from xlayer_ext._backend import current_backend, native_available
from xlayer_ext.testing import relative_error

native = pytest.mark.skipif(not native_available(), reason="needs the native library")


def arguments(system: str, dtype: str = "float32") -> dict[str, Any]:
    return {"system": system, "size": system_steps.TOY[system], "dtype": dtype, "device": "cpu"}


def case(system: str, suite: str = "toy", device: str = "cpu", dtype: str = "float32") -> Any:
    cases = systems_cases.make_cases(argparse.Namespace(device=device, dtype=[dtype]))
    (found,) = (case for case in cases if (case.op, case.suite) == (system, suite))
    return found


# ---- the steps -----------------------------------------------------------------------------------------------------


@native
@pytest.mark.parametrize("system", system_steps.SYSTEMS)
def test_both_backends_take_the_same_step(system: str) -> None:
    """The same loss, and a gradient for every trained parameter; dropout draws the same numbers."""
    results = []
    for impl in systems_cases.BACKENDS:
        step: Any = systems_cases.build(impl, **arguments(system))
        torch.manual_seed(1)
        results.append(step())
    trained = systems_cases.shared(**arguments(system)).trained()
    assert [grad.shape for grad in results[0][1:]] == [parameter.shape for parameter in trained]
    assert relative_error(results[0][0], results[1][0]) < 1e-5
    flat = [torch.cat([grad.flatten() for grad in grads]) for _, *grads in results]
    assert relative_error(*flat) < 1e-3
    assert float(flat[0].norm()) > 0


@native
@pytest.mark.parametrize("system", system_steps.SYSTEMS)
def test_16_bits_run_under_autocast_on_frozen_models_of_16_bits(system: str) -> None:
    loss, *grads = systems_cases.build("native", **arguments(system, "bfloat16"))()  # type: ignore[misc]
    assert loss.isfinite() and {grad.dtype for grad in grads} == {torch.float32}
    step = systems_cases.shared(**arguments(system, "bfloat16"))
    frozen = {p.dtype for model in getattr(step.model, "frozen", ()) for p in model.parameters()}
    assert frozen <= {torch.bfloat16, torch.float32} and bool(frozen) == (system in ("bypass", "telepathy"))


@native
@pytest.mark.parametrize(
    ("system", "name"), [("xlrb", "hdim_attention"), ("lformer", "ema_scan"), ("telepathy", "vq_nearest")]
)
def test_a_wrong_kernel_is_caught(system: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(functional, name)

    def wrong(*given: Any, **options: Any) -> Any:
        found = right(*given, **options)
        if current_backend() == "reference":
            return found
        return (found[0].flip(-1), found[1]) if isinstance(found, tuple) else found.flip(-1)

    monkeypatch.setattr(functional, name, wrong)
    with pytest.raises(AssertionError, match=f"{system}: the loss differs from the reference's by"):
        systems_cases.build("native", **arguments(system))


def test_the_case_before_is_let_go() -> None:
    first = systems_cases.shared(**arguments("lformer"))
    assert systems_cases.shared(**arguments("lformer")) is first
    systems_cases.shared(**arguments("bypass"))
    assert first not in systems_cases._LAST.values()


# ---- the least work ------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Flops of the matrix products that torch runs; not those of our kernels, nor of its fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None and "attention" not in str(func):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out


def executed(step: system_steps.Step) -> int:
    with Products() as products:
        torch.autograd.grad(step.model(**step.batch).loss, step.trained())
    return products.flops


def beside_the_least(system: str, step: system_steps.Step) -> int:
    """Counts the flops of the products that run and are not among the parts."""
    size = system_steps.TOY[system]
    if system == "telepathy":  # the sender's upper layers, whose states are not used
        model = step.model
        return 2 * size["B"] * size["S"] * system_steps.matrices(*model.sender.model.layers[model.layer :])
    if system in ("xlrb", "lformer"):  # with dropout, attention is products of matrices, causal or not
        return 3 * system_steps.attention(size["layers"], size["B"], size["S"], size["S"], size["d"])
    return 0


@native
@pytest.mark.parametrize("system", system_steps.SYSTEMS)
def test_least_flops_are_those_of_the_products_that_run(system: str) -> None:
    step = system_steps.make(system, system_steps.TOY[system], "float32", "cpu")
    done = executed(step) - beside_the_least(system, step)
    counted = step.least_flops() - step.products
    if system in ("bypass", "telepathy"):
        assert done == counted
    else:  # left out is what meets a row per example: router, heads, the side path behind its projections
        assert counted <= done < 1.03 * counted


def test_least_work_by_hand() -> None:
    parts = [system_steps.Part(100, 7, 3), system_steps.Part(10, 5, 1, is_frozen=True)]
    step = system_steps.Step(None, {}, parts, 50)
    assert step.least_bytes(2) == 3 * 100 * 4 + 10 * 2
    assert step.least_flops() == 50 + 2 * 3 * 7 * 100 + 2 * 5 * 10


def test_the_shapes_of_the_papers_are_those_of_their_models() -> None:
    """The counted parameters are those that the models are known to have; no memory is allocated for them."""
    steps = {name: system_steps.make(name, size, "bfloat16", "meta") for name, size in system_steps.PAPER.items()}
    assert sum(p.numel() for p in steps["xlrb"].model.encoder.parameters()) == 354_310_144  # without its pooler
    llama, mistral = 8_030_261_248, 7_248_023_552
    assert [sum(p.numel() for p in model.parameters()) for model in steps["telepathy"].model.frozen] == [llama, mistral]
    own = 2 * 32 * 4096 * 256  # encoder and projectors
    assert (steps["bypass"].parameters(), sum(p.numel() for p in steps["bypass"].trained())) == (llama + own, own // 2)


# ---- cases, rows, tables -------------------------------------------------------------------------------------------


def test_scale_is_what_differs_from_the_paper() -> None:
    assert training.scale({"layers": 24, "d": 8, "S": 2}, {"layers": 4, "d": 8, "S": 1}) == "layers 24→4, S 2→1"
    assert training.scale({"d": [4, 3]}, {"d": [2, 3]}) == "d 4/3→2/3"
    for system, size in system_steps.PAPER.items():
        assert case(system, "main", "cuda").facts["scale"] == ""
        assert size.keys() == system_steps.CPU[system].keys() == system_steps.TOY[system].keys()
    assert hyper_model_cases.scale(hyper_model_cases.PAPER) == ""
    assert "layers 24→12, " in hyper_model_cases.scale(hyper_model_cases.settings(cuda=False)["L12-d768"].size)


def test_without_the_packages_of_the_systems_there_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*given: Any) -> system_steps.Step:
        raise ImportError("No module named 'transformers'")

    monkeypatch.setattr(system_steps, "make", missing)
    assert case("bypass").bytes == 0
    systems_cases._LAST.clear()
    with pytest.raises(measure.Unavailable, match="transformers"):
        systems_cases.build("eager", **arguments("bypass"))


@linux
def test_script_prints_a_row_for_each_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert systems_cases.main(["--quick", "--no-memory", "--json", "--op", "xlrb", "bypass"]) == 0
    rows = [measure.Row.from_json(line) for line in capsys.readouterr().out.splitlines()]
    impls = ["native", "eager"] if native_available() else ["eager"]
    found = [(row.family, row.op, row.pass_, row.impl) for row in rows if row.op == "xlrb"]
    assert found == [("systems", "xlrb", "fwd+bwd", impl) for impl in impls]
    for row in rows:
        size = system_steps.TOY[row.op]
        assert row.extra["tokens"] == size["B"] * size["S"]
        assert row.extra["tokens_per_second"] == pytest.approx(1e3 * row.extra["tokens"] / row.ms_median)
        assert row.extra["scale"] == training.scale(system_steps.PAPER[row.op], size)
        trained, parameters = row.extra["trained_parameters"], row.extra["parameters"]
        assert (0 < trained < parameters) if row.op == "bypass" else trained == parameters


@linux
@pytest.mark.slow
def test_peak_memory_is_measured_in_a_process_of_its_own() -> None:
    assert measure.peak_memory(systems_cases.build, {"impl": "eager", **arguments("xlrb")}) > 0


EXTRA = {"spread": 0.1, "threads": 2, "scale": "layers 24→4", "tokens": 512, "tokens_per_second": 256.0}
EXTRA |= {"parameters": 1000, "trained_parameters": 10}
ROWS = [
    make_row(family="systems", op="xlrb", impl=impl, ms_median=ms, peak_bytes=3_000_000, extra=EXTRA)
    for impl, ms in (("native", 2000.0), ("eager", 3000.0))
]


def test_table_compares_with_the_reference() -> None:
    text = systems_cases.format_table(ROWS)
    native_line, eager_line = (line.split() for line in text.splitlines()[2:4])
    assert native_line[-4:] == ["256", "3.0", "1.50", "0.500"] and eager_line[-2] == "1.00"
    assert text.endswith("xlrb S128: layers 24→4")


def test_rows_of_hyper_connections_are_compared_kind_by_kind() -> None:
    rows = [
        make_row(impl=impl, ms_median=ms) for impl, ms in (("plain", 5.0), ("dhc native", 2.0), ("shc native", 2.0))
    ]
    rows.append(make_row(impl="dhc reference", ms_median=8.0))
    found = [training.times_reference(row, rows) for row in rows]
    assert found == [None, 4.0, None, 1.0]


def test_report_shows_the_steps() -> None:
    table = page.steps([make_row(), *ROWS])
    assert table.title == "One training step of each system"
    shown = ["xlrb", "S128", "layers 24→4", "float32", "native", "2000", "256", "3.0", "1.50", "1,000", "10"]
    assert table.rows[0] == shown and len(table.rows) == 2


def test_suite_has_the_family_in_full_alone() -> None:
    assert systems_cases in suite.load([], suite.PLANS["full"])
    assert systems_cases not in suite.load([], suite.PLANS["quick"])
    options = suite.parser().parse_args(["systems", "--suite", "full"])
    chosen = suite.chosen(systems_cases, options, suite.PLANS["full"])
    assert [case.op for case in chosen] == list(system_steps.SYSTEMS)


def test_the_page_has_a_line_for_every_system() -> None:
    assert list(performance.SYSTEMS) == list(system_steps.SYSTEMS)
    lines = [line for line in performance.systems(performance.Rows()).splitlines() if line.startswith("| ")][1:]
    assert len(lines) == len(system_steps.SYSTEMS) + 1
    assert "layers 24→6" in lines[0] and "layers 24→12" in lines[-1]
