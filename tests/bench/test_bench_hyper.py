"""The benchmarks of hyper-connections: least work by hand, checks before the clock, one run of everything."""

import argparse
import importlib.util
import sys

import pytest
import torch
from test_bench import linux, make_row

from benchmarks.cases import hyper as hyper_cases
from benchmarks.cases import hyper_model as hyper_model_cases
from benchmarks.harness import cases as harness_cases
from benchmarks.harness import measure
from xlayer_ext import reference
from xlayer_ext._backend import use_native

UNIT = 4 * 512 * 1024 * 4  # bytes of one width-1024 float32 row for each of 4 × 512 tokens


@pytest.mark.parametrize("kind", ["shc", "dhc"])
@pytest.mark.parametrize(
    ("op", "forward", "backward"), [("pre", 5, 9), ("post", 9, 14), ("pre+post", 14, 35), ("boundary", 10, 15)]
)
def test_hyper_counts_the_units_of_the_paper_and_pencil(op, forward, backward, kind):
    """n = 4 streams; coefficients and weights come on top, and are next to nothing."""
    assert round(UNIT / 1e6, 2) == 8.39
    moved = {pass_: hyper_cases.least_bytes(op, pass_, kind, (4, 512, 1024, 4), 4) for pass_ in measure.PASSES}
    assert forward <= moved["fwd"] / UNIT < forward + 0.1
    assert backward <= moved["bwd"] / UNIT < backward + 0.2
    assert moved["fwd+bwd"] == moved["fwd"] + moved["bwd"]


def test_hyper_counts_the_bytes_of_its_tensors():
    """The counted bytes equal the sizes of the tensors: inputs once and outputs once, and again with gradients."""
    size = (2, 24, 32, 4)
    for kind in hyper_cases.KINDS:
        given = hyper_cases.make_inputs(kind, size, False, "float32", "cpu")
        for op in ("pre", "post", "boundary"):
            inputs = sum(tensor.nbytes for tensor in hyper_cases.leaves_of(op, given).values())
            outputs = sum(tensor.nbytes for tensor in hyper_cases.OPERATORS[op](reference, given))
            assert hyper_cases.least_bytes(op, "fwd", kind, size, 4) == inputs + outputs
            assert hyper_cases.least_bytes(op, "bwd", kind, size, 4) == 2 * inputs + outputs


def test_hyper_counts_multiply_adds():
    size = (2, 3, 8, 4)
    mixing, logits = 2 * 6 * 4 * 8, 2 * 6 * 4 * 6 * 8
    assert hyper_cases.least_flops("pre", "fwd", "shc", size) == mixing
    assert hyper_cases.least_flops("pre", "fwd", "dhc", size) == mixing + logits
    assert hyper_cases.least_flops("pre", "fwd", "mhc", size) == mixing + 4 * logits
    assert hyper_cases.least_flops("post", "fwd+bwd", "dhc", size) == 3 * 5 * mixing
    assert hyper_cases.least_flops("boundary", "bwd", "dhc", size) == 2 * (6 * mixing + logits) + 5 * mixing


def test_hyper_peers_are_timed_where_they_do_the_same():
    cases = hyper_cases.make_cases(argparse.Namespace(dtype=["float32"], device="cpu"))
    peers = {(case.op, case.name): case.peers for case in cases}
    assert peers["boundary", "dhc"] == ("native separate",)
    assert peers["pre+post", "dhc-rms"] == ("hyper-connections", "hyper-connections compile")
    assert peers["pre+post", "dhc"] == peers["pre", "dhc-rms"] == ()  # its norm is another, and it has no pre alone
    assert {case.dtype for case in cases if case.name == "dhc-bf16"} == {"bfloat16"}


@pytest.mark.parametrize("kind", [kind for kind in hyper_cases.KINDS if hyper_cases.KINDS[kind].peer])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hyper_peer_agrees_and_a_wrong_one_is_caught(kind, dtype):
    pytest.importorskip("hyper_connections")
    given = hyper_cases.make_inputs(kind, (2, 24, 32, 4), True, dtype, "cpu").map(torch.Tensor.requires_grad_)
    module = hyper_cases.peer_module(kind, given)
    hyper_cases.check_peer(kind, given, module)
    with torch.no_grad():
        module.static_alpha.copy_(module.static_alpha.flip(0))
    with pytest.raises(AssertionError, match=f"hyper-connections {kind} output 0: differs"):
        hyper_cases.check_peer(kind, given, module)


def test_a_package_that_is_missing_is_no_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "hyper_connections", None)
    with pytest.raises(measure.Unavailable, match="pip install hyper-connections"):
        hyper_cases.build("hyper-connections", "pre+post", "fwd", "dhc-rms", [2, 24, 32, 4], True, "float32", "cpu")


@pytest.mark.parametrize("op", hyper_cases.OPERATORS)
def test_hyper_check_catches_a_wrong_kernel(op, monkeypatch):
    class Wrong:
        hyper_pre = staticmethod(lambda h, connection: reference.hyper_pre(1.001 * h, connection))
        hyper_post = staticmethod(lambda h, y, c: reference.hyper_post(h, 1.001 * y, c))
        hyper_post_pre = staticmethod(lambda h, y, c, connection: reference.hyper_post_pre(h, 1.001 * y, c, connection))

    arguments = (op, "dhc", (2, 24, 32, 4), False, "float32", "cpu")
    check = hyper_cases._check.__wrapped__
    monkeypatch.setattr(hyper_cases, "functional", reference)
    check(*arguments)
    monkeypatch.setattr(hyper_cases, "functional", Wrong)
    with pytest.raises(AssertionError, match="exceeds"):
        check(*arguments)


def test_hyper_passes_return_outputs_and_gradients():
    arguments = ("boundary", "dhc", [2, 24, 32, 4], False, "float32", "cpu")
    op, *rest = arguments
    forward, backward, both = (hyper_cases.build("eager", op, pass_, *rest)() for pass_ in measure.PASSES)
    assert (len(forward), len(backward), len(both)) == (3, 7, 10)
    for actual, expected in zip([*forward, *backward], both, strict=True):
        torch.testing.assert_close(actual, expected)
    again = hyper_cases.build("eager", op, "bwd", *rest)
    for first, second in zip(again(), again(), strict=True):  # its graph is kept
        assert torch.equal(first, second)


@linux
def test_hyper_script_prints_its_implementations(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    chosen = ["--op", "boundary", "pre+post", "--pass", "fwd", "bwd"]
    assert hyper_cases.main(["--quick", "--no-compile", "--no-memory", "--json", "--out", str(path), *chosen]) == 0
    rows = [measure.Row.from_json(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == measure.read_rows(path)
    expected = {"boundary": {"eager"}, "pre+post": {"eager"}}
    if use_native("hyper_post_pre", torch.empty(1)):
        expected["boundary"] |= {"native", "native separate"}
        expected["pre+post"].add("native")
    if importlib.util.find_spec("hyper_connections"):
        expected["pre+post"].add("hyper-connections")
    for op, impls in expected.items():
        for pass_ in ("fwd", "bwd"):
            assert {row.impl for row in rows if (row.op, row.pass_) == (op, pass_)} == impls
    assert {row.op for row in rows} == expected.keys()
    assert "native separate" in harness_cases.format_table(rows) or "native separate" not in expected["boundary"]


@linux
def test_hyper_model_script_compares_with_plain(capsys):
    pytest.importorskip("xlayer_systems.hyper_lm.model")
    arguments = ["--quick", "--no-compile", "--no-memory"]
    assert hyper_model_cases.main([*arguments, "--json"]) == 0
    rows = [measure.Row.from_json(line) for line in capsys.readouterr().out.splitlines()]
    hows = ["reference"] + ["native"] * use_native("hyper_post_pre", torch.empty(1))
    assert {row.impl for row in rows} == {"plain"} | {f"{kind} {how}" for kind in ("shc", "dhc", "mhc") for how in hows}
    table = hyper_model_cases.format_table(
        [make_row(impl="plain", extra=EXTRA), make_row(impl="dhc native", extra=EXTRA)]
    )
    assert table.splitlines()[-1].split()[-2:] == ["-", "0.500"] and " 1.000 " in table


EXTRA = {"spread": 0.1, "threads": 2}


def test_hyper_model_counts_what_the_model_has():
    model = pytest.importorskip("xlayer_systems.hyper_lm.model")
    size = (2, 16, 32, 2, 2, 64)
    plain = model.HyperTransformer(64, 32, 2, 2, residual="plain")
    parameters = sum(parameter.numel() for parameter in plain.parameters())
    matrices = sum(parameter.numel() for parameter in plain.parameters() if parameter.dim() == 2)
    assert hyper_model_cases.matrix_elements(size) == (parameters, matrices)
    assert hyper_model_cases.least_bytes(size, 4, optimizer=False) == 3 * 4 * parameters
    assert hyper_model_cases.least_flops(size) == 6 * 32 * matrices + 3 * 2 * 2 * 2 * 16 * 16 * 32


def test_an_optimizer_step_changes_the_parameters():
    pytest.importorskip("xlayer_systems.hyper_lm.model")
    arguments = {"size": [2, 16, 32, 2, 2, 64], "optimizer": True, "dtype": "float32", "device": "cpu"}
    step = hyper_model_cases.build("dhc reference", **arguments)
    first, second = step()[0], step()[0]
    assert second < first


def test_script_names_the_operators_it_knows(capsys):
    with pytest.raises(SystemExit):
        hyper_cases.main(["--op", "prepost"])
    assert "unknown op prepost; there are pre+post, pre, post, boundary" in capsys.readouterr().err
