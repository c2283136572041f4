"""The native build: what was linked, what is exported, and what happens where it does not fit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import xlayer_ext
from xlayer_ext import _library
from xlayer_ext._backend import native_available

PACKAGE = Path(xlayer_ext.__file__).parent
ROOT = Path(__file__).parents[2]

needs_library = pytest.mark.skipif(not _library.LOADED, reason=f"no native library: {_library.REASON}")


def test_the_suite_has_its_native_library() -> None:
    """Tests of kernels skip where there is no kernel; this one fails instead, so that they cannot all skip unseen."""
    assert _library.LOADED, _library.REASON
    for op in ("hdim_attention", "hdim_attention_backward", "masked_mean", "masked_mean_backward"):
        assert native_available(op), op


def test_the_suite_has_its_cuda_kernels() -> None:
    """Tests of machine code skip where there is none; where it can be built, they must not."""
    if shutil.which("nvcc") is None or os.environ.get("XLAYER_CUDA") == "0":
        pytest.skip("no nvcc, or a build that leaves the CUDA kernels out")
    from xlayer_ext import _native

    assert _native.cuda_built(), "built without CUDA, though nvcc is there: make build"


def run_python(code: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter, with `path` first on its path."""
    variables = {**os.environ, **environment}
    if path is not None:
        variables["PYTHONPATH"] = str(path)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, cwd="/")


def package_without_library(folder: Path) -> Path:
    """Copies the Python files of the package alone."""
    copy = folder / "xlayer_ext"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


# Imports the package, prints where from, its backend, its warnings, and a result.
REPORT = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import xlayer_ext, torch
    from xlayer_ext import _backend, _library
    _library.load()
    mean = xlayer_ext.functional.masked_mean(torch.ones(1, 2, 3))
ours = [w for w in caught if "xlayer" in str(w.message)]
print(xlayer_ext.__file__, _backend.current_backend(), len(ours), mean.tolist(), sep="\\n")
print(*(f"{w.category.__name__}: {w.message}" for w in ours), sep="\\n")
"""


def report(folder: Path) -> list[str]:
    result = run_python(REPORT, folder, XLAYER_BACKEND="")
    assert result.returncode == 0, result.stderr
    file, *lines = result.stdout.splitlines()
    assert Path(file).is_relative_to(folder)
    return lines


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_kernels_are_added_to_a_build_without_them(tmp_path: Path) -> None:
    """`make demo` leaves them out on a machine without a GPU; `make build` adds them in the same folder."""
    tool = Path(sys.executable).with_name
    configure = [str(tool("cmake")), "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}"]
    has_cuda = []
    for switch in ("-DXLAYER_CUDA=0", "-UXLAYER_CUDA"):
        subprocess.run([*configure, f"-DXLAYER_OUTPUT_DIR={tmp_path}/out", switch], check=True, capture_output=True)
        has_cuda.append("xlayer_cuda.dir" in (tmp_path / "build.ninja").read_text())
    assert has_cuda == [False, True]


@needs_library
def test_loads_without_a_warning() -> None:
    result = run_python("import xlayer_ext, torch; print(torch.ops.xlayer.masked_mean.default)", PACKAGE.parent)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "xlayer.masked_mean.default", "")


def test_without_library_the_reference_serves_after_one_warning(tmp_path: Path) -> None:
    package_without_library(tmp_path)
    backend, count, mean, warning = report(tmp_path)
    assert (backend, count, mean) == ("reference", "1", "[[1.0, 1.0, 1.0]]")
    assert warning.startswith(
        "RuntimeWarning: xlayer_ext uses its reference backend (plain PyTorch): the native library"
    )
    assert "libxlayer.so is missing" in warning and "pip install" in warning


def test_a_file_that_is_no_library_is_named(tmp_path: Path) -> None:
    (package_without_library(tmp_path) / "libxlayer.so").write_text("not a library")
    backend, count, _, warning = report(tmp_path)
    assert (backend, count) == ("reference", "1")
    assert "not a library that this machine can load" in warning and "build it again" in warning


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_library_for_another_torch_is_explained(tmp_path: Path) -> None:
    source = tmp_path / "other.cpp"
    source.write_text('extern "C" void torch_of_the_future();\nvoid* use = (void*)&torch_of_the_future;\n')
    library = package_without_library(tmp_path) / "libxlayer.so"
    subprocess.run(["c++", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    backend, count, _, warning = report(tmp_path)
    assert (backend, count) == ("reference", "1")
    assert f"does not fit this torch {torch.__version__}" in warning
    assert "torch lacks `torch_of_the_future`" in warning and "build it again" in warning


def test_an_old_torch_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_library, "PATH", tmp_path / "libxlayer.so")
    (tmp_path / "libxlayer.so").touch()
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert _library._try_load() == (
        "the native library needs torch >= 2.10, and this is torch 2.9.1+cpu; upgrade torch"
    )


@needs_library
@pytest.mark.parametrize(
    "schema",
    [
        "masked_mean(Tensor x, Tensor? mask) -> Tensor",
        "masked_mean_backward(Tensor grad, Tensor? mask, SymInt tokens) -> Tensor",
        "hdim_attention(Tensor query, Tensor key, Tensor value, Tensor weight1, Tensor bias1, Tensor weight2, "
        "Tensor? key_mask, Tensor? attn_mask, float temperature, bool gelu, bool tf32) "
        "-> (Tensor context, Tensor statistics, Tensor row_entropy)",
        "hdim_attention_backward(Tensor grad_context, Tensor? grad_row_entropy, Tensor query, Tensor key, "
        "Tensor value, Tensor weight1, Tensor bias1, Tensor weight2, Tensor? key_mask, Tensor? attn_mask, "
        "Tensor context, Tensor statistics, float temperature, bool gelu, bool tf32) "
        "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_weight1, Tensor grad_bias1, "
        "Tensor grad_weight2)",
    ],
    ids=lambda schema: schema.split("(")[0],
)
def test_schema(schema: str) -> None:
    name = schema.split("(")[0]
    found = str(getattr(torch.ops.xlayer, name).default._schema)
    assert found.removeprefix("xlayer::") == schema


def dynamic_section() -> str:
    return subprocess.run(["readelf", "-d", str(_library.PATH)], capture_output=True, text=True, check=True).stdout


@needs_library
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs binutils")
def test_needs_libtorch_and_no_cuda_library() -> None:
    """The library needs libtorch, through which the linker finds the CUDA half of torch; it contains the CUDA runtime,
    and no paths."""
    section = dynamic_section()
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", section)
    assert "libtorch.so" in needed
    assert not [name for name in needed if "cuda" in name or "python" in name]
    assert "RPATH" not in section and "RUNPATH" not in section


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
def test_only_the_stable_abi_is_used() -> None:
    def names(*flags: str) -> list[str]:
        command = ["nm", "--dynamic", "--demangle", *flags, str(_library.PATH)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        return [re.sub(r"^[0-9a-f]*\s+\w ", "", line) for line in lines]

    assert not [name for name in names("--undefined-only") if re.search(r"\b(at|c10|torch)::", name)]
    exported = {name for name in names("--defined-only") if "xlayer" in name}
    assert exported and all(re.fullmatch(r"xlayer_\w+", name) for name in exported)


@needs_library
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs binutils")
def test_wide_instructions_stay_in_their_own_functions() -> None:
    """An inline function shared by two instruction sets must be the baseline's copy, or old processors crash in it."""
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", str(_library.PATH)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = re.split(r"\n(?=[0-9a-f]{16} <)", text)
    wide = {body.split("\n", 1)[0] for body in functions if "%zmm" in body or "%ymm" in body}
    if not wide:
        pytest.skip("this build has no wide instructions")
    assert not [header for header in wide if "avx2" not in header and "avx512" not in header]


@needs_library
def test_instruction_set_can_be_chosen() -> None:
    code = "import xlayer_ext; from xlayer_ext import _native; print(_native.isa())"
    result = run_python(code, PACKAGE.parent, XLAYER_CPU_ISA="baseline")
    assert result.stdout.strip() == "baseline", result.stderr
