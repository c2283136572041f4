"""Drives CMake, which alone knows what is built (CMakeLists.txt).

XLAYER_NATIVE=0 builds nothing and XLAYER_NATIVE=1 insists; by default a machine without a C++ compiler gets the package
without native code. XLAYER_CUDA=0 builds the CPU kernels only; XLAYER_CUDA_ARCHS names CUDA architectures in the form
80-real;90a-real; XLAYER_NVTX=1 marks kernel launches; MAX_JOBS bounds the parallel compilations.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def has_compiler() -> bool:
    """Tells whether CMake will find a C++ compiler: the one that CXX names, or one under a usual name."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    return any(shutil.which(name) for name in (chosen[:1] or ("c++", "g++", "clang++")))


def builds_native() -> bool:
    """Decides whether native code is built, by XLAYER_NATIVE and by what the machine has."""
    wanted = os.environ.get("XLAYER_NATIVE", "")
    if wanted == "0":
        return False
    if not has_compiler():
        if wanted == "1":
            raise SystemExit("xlayer-ext needs a C++ compiler for its kernels: install g++, or unset XLAYER_NATIVE")
        print(
            "xlayer-ext: no C++ compiler found, so the kernels are left out and plain PyTorch serves every call (the "
            "reference backend); install g++ and install xlayer-ext again to have them",
            file=sys.stderr,
        )
        return False
    return True


def run(step: str, command: list[str]) -> None:
    """Runs a step of the build; a failure ends the build with one line behind the step's own output."""
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"xlayer-ext: {step} failed, for the reason above; XLAYER_NATIVE=0 installs without kernels")


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
        if importlib.util.find_spec("torch") is None:
            raise SystemExit("xlayer-ext needs torch to build its kernels: pip install torch")
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
        run("configuring the kernels", configure)
        run("compiling the kernels", [tool("cmake"), "--build", str(folder), "--parallel", jobs])

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


EXTENSIONS = [Extension("xlayer_ext._native", sources=[])] if builds_native() else []
setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": CMakeBuild})
