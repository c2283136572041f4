"""Drives CMake, which alone knows what is built (CMakeLists.txt).

XLAYER_NATIVE=0 builds nothing; XLAYER_CUDA=0 builds the CPU kernels only; XLAYER_CUDA_ARCHS names CUDA architectures in
the form 80-real;90a-real; XLAYER_NVTX=1 marks kernel launches; MAX_JOBS bounds the parallel compilations.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def tool(name: str) -> str:
    """Returns the path of a program in this environment (a PyPI wheel), else the machine's."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"xlayer-ext needs {name} to build: pip install {name}")
    return found


class CMakeBuild(build_ext):
    """Builds every native file in one go: into the source tree for an editable install, else into the wheel."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        output = (ROOT if in_place else Path(self.build_lib).resolve()) / "xlayer_ext"
        # In place, the folder stays the same, so that a second build has little to do and one can call ninja there.
        folder = ROOT / "build" / "native" if in_place else Path(self.build_temp).resolve() / "native"
        switches = {key: os.environ.get(key) for key in ("XLAYER_CUDA", "XLAYER_CUDA_ARCHS", "XLAYER_NVTX")}
        configure = [tool("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-DXLAYER_OUTPUT_DIR={output}"]
        configure += [f"-D{key}={value}" if value is not None else f"-U{key}" for key, value in switches.items()]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        subprocess.run([tool("cmake"), "--build", str(folder), "--parallel", jobs], check=True)

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


native = os.environ.get("XLAYER_NATIVE") != "0"
setup(ext_modules=[Extension("xlayer_ext._native", sources=[])] if native else [], cmdclass={"build_ext": CMakeBuild})
