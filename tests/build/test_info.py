"""python -m xlayer_ext.info"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import xlayer_ext
from xlayer_ext import _library, backend, info


def text(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    info.main(list(arguments))
    return capsys.readouterr().out


def test_json_has_the_facts(capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(text(capsys, "--json"))
    assert facts["version"] == xlayer_ext.__version__
    assert facts["torch"] == torch.__version__
    assert facts["library"]["loaded"] == _library.LOADED
    assert (facts["library"]["reason"] is None) == _library.LOADED
    assert len(facts["devices"]) == torch.cuda.device_count()


@pytest.mark.skipif(not _library.LOADED, reason=f"no native library: {_library.REASON}")
def test_native_build_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    from xlayer_ext import _native

    facts = json.loads(text(capsys, "--json"))
    library = facts["library"]
    assert library["version"] == xlayer_ext.__version__ == _native.__version__
    assert library["isa"] in library["compiled_isas"]
    assert "masked_mean (cpu)" in facts["kernels"]
    assert ("masked_mean (cuda)" in facts["kernels"]) == library["cuda_built"] == bool(facts["cuda_kernel_resources"])
    assert library["stream_symbol_resolved"] == (torch.version.cuda is not None)
    assert f"{library['isa']} in use" in text(capsys)


def test_type_checkers_read_both_packages() -> None:
    tomllib = pytest.importorskip("tomllib")
    root = Path(info.__file__).parents[1]
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package, folder in data["package-dir"].items():
        assert "py.typed" in data["package-data"][package] and (root / folder / "py.typed").is_file()


def test_kernels_are_listed_where_they_are_asked_for() -> None:
    row = {"arch": "sm_90a", "registers": 40, "register_ceiling": 48, "occupancy": 0.5, "occupancy_floor": 0.5,
           "shared_bytes": 1024}  # fmt: skip
    rows = [{**row, "kernel": name, "spill_store_bytes": spills} for name, spills in
            (("score<4>", 0), ("score<8>", 0), ("pack<4>", 8))]  # fmt: skip
    facts = {**info.collect(), "cuda_kernel_resources": rows}
    facts["library"] = {"loaded": True, "path": "lib", "isa": "avx2", "compiled_isas": [], "cuda_archs": [],
                        "version": "0", "built_with_torch": "2", "nvtx": False}  # fmt: skip
    short, full = (info._lines(facts, kernels) for kernels in (False, True))
    assert "  kernels     2 for CUDA, built for sm_90a; 1 of them spill registers (--kernels lists them)" in short
    operators = info._operator_summary(["a (cpu)", "a (cuda)", "a_backward (cpu)", "b (cpu)"])
    assert operators.splitlines() == ["  operators   a (cpu and cuda)", "  operators   b (cpu)"]
    listed = [line for line in full if line not in short]
    assert len(listed) == 3 and "40 registers (stated 48)" in listed[-1]


@pytest.mark.skipif(not _library.LOADED, reason=f"no native library: {_library.REASON}")
def test_says_why_a_backend_is_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with backend("auto"):
        assert "in use: native backend, because the library is loaded" in text(capsys)
    with backend("reference"):
        assert "in use: reference backend, because it was asked for" in text(capsys)


def test_says_what_is_missing_and_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_library, "LOADED", False)
    monkeypatch.setattr(
        _library, "REASON", f"the native library has not been built; build it: {_library.BUILD_COMMAND}"
    )
    assert f"missing: {_library.REASON}" in text(capsys)
    assert _library.REASON in json.loads(text(capsys, "--json"))["missing"]


def test_cpu_build_of_torch_with_cuda_kernels_is_named() -> None:
    library = {"loaded": True, "cuda_built": True, "stream_symbol_resolved": False}
    lines = info._missing({"library": library, "native_module": None, "devices": []})
    assert lines == ["CUDA kernels were built, but this torch is a CPU build; install torch's CUDA build to use them"]
    library["cuda_built"] = False
    (line,) = info._missing({"library": library, "native_module": None, "devices": []})
    assert "no nvcc, or XLAYER_CUDA=0" in line and "install the CUDA toolkit" in line
