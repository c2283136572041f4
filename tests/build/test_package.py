"""Source distribution and wheel: made, installed into fresh environments, and used from another directory."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "python" / "xlayer_systems" / "assets"
MADE = {".git", ".venv", "build", "dist", "runs", ".hypothesis"}  # folders of a checkout that are no part of it
NAME = re.compile(r"[A-Za-z0-9._-]+")
pytestmark = pytest.mark.slow


def run(command: list[str | Path], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a folder, with no variables that lead to this checkout."""
    dropped = ("PYTHONPATH", "XLAYER_NATIVE", "XLAYER_CUDA", "XLAYER_BACKEND", "CXX")
    variables = {name: value for name, value in os.environ.items() if name not in dropped} | environment
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=variables)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes the source distribution of a copy of the checkout."""
    folder = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__", ".*_cache")

    def ignore(at: str, names: list[str]) -> set[str]:
        return ignored(at, names) | (MADE if Path(at) == ROOT else set())

    shutil.copytree(ROOT, folder / "copy", ignore=ignore)
    code = "import setuptools.build_meta as backend; print(backend.build_sdist('../made'))"
    made = run([sys.executable, "-c", code], folder / "copy")
    assert made.returncode == 0, made.stderr
    return folder / "made" / made.stdout.splitlines()[-1]


def make_wheel(sdist: Path, folder: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[Path]]:
    """Lets pip make a wheel of the source distribution; returns what it said, and the wheel if there is one."""
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "-v", "-w", folder]
    made = run([sys.executable, "-m", "pip", "wheel", *options, sdist], folder, **environment)
    return made, list(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes the wheel without native code."""
    made, found = make_wheel(sdist, tmp_path_factory.mktemp("wheel"), XLAYER_NATIVE="0")
    assert made.returncode == 0, made.stdout + made.stderr
    return found[0]


def required(name: str, found: set[str]) -> set[str]:
    """Collects a distribution that is installed here and what it requires."""
    key = name.lower().replace("_", "-")
    if key not in found:
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # not needed on this platform
            return found
        found.add(key)
        for line in needed:
            if "extra ==" not in line:
                match = NAME.match(line)
                assert match is not None
                required(match.group(), found)
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """Makes a virtual environment with the wheel and either all packages of this one or torch's alone, linked."""

    def make(extras: bool) -> Path:
        folder = tmp_path_factory.mktemp("environment")
        venv.create(folder, with_pip=False)
        python = folder / "bin" / "python"
        linked = folder / "packages"
        linked.mkdir()
        packages = Path(site.getsitepackages()[0])
        if extras:
            entries = {path.name for path in packages.iterdir() if "xlayer" not in path.name and path.suffix != ".pth"}
        else:
            files = (file for name in required("torch", set()) for file in importlib.metadata.files(name) or [])
            entries = {file.parts[0] for file in files} - {"..", "__pycache__"}
        for entry in entries:
            (linked / entry).symlink_to(packages / entry)
        own = Path(run([python, "-c", "import site; print(site.getsitepackages()[0])"], folder).stdout.strip())
        (own / "linked.pth").write_text(f"{linked}\n")
        options = ["--no-deps", "--no-index", "--disable-pip-version-check"]
        install = [sys.executable, "-m", "pip", "--python", python, "install", *options, wheel]
        installed = run(install, folder)
        assert installed.returncode == 0, installed.stderr
        return folder / "bin"

    return make


def test_a_wheel_holds_what_runs_and_each_asset_once(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"xlayer_ext", "xlayer_systems"}
    assets = {path.relative_to(ASSETS.parents[1]).as_posix() for path in ASSETS.rglob("*") if path.is_file()}
    assert {name for name in names if "/assets/" in name} == assets and assets
    assert {"xlayer_ext/py.typed", "xlayer_systems/py.typed"} <= set(names)
    others = [name for name in names if not name.endswith((".py", "/py.typed")) and "/assets/" not in name]
    assert all(".dist-info/" in name for name in others), others
    packages = (ROOT / "xlayer_ext", ROOT / "python" / "xlayer_systems")
    python = {path.relative_to(folder.parent).as_posix() for folder in packages for path in folder.rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == python


def test_an_installed_wheel_works_from_anywhere(environment: Callable[[bool], Path], tmp_path: Path) -> None:
    binaries = environment(True)
    code = (
        "import torch, xlayer_ext, xlayer_systems\n"
        "from xlayer_ext import nn\n"
        "print(xlayer_ext.__file__, xlayer_systems.__file__)\n"
        "print(nn.HDIMMessage(32)(torch.randn(1, 3, 32), torch.randn(1, 4, 32)).shape)\n"
    )
    ran = run([binaries / "python", "-c", code], tmp_path)
    assert ran.returncode == 0, ran.stderr
    files, shape = ran.stdout.splitlines()
    assert files.count(str(binaries.parent)) == 2 and shape == "torch.Size([1, 3, 32])"
    (warning,) = (line for line in ran.stderr.splitlines() if "RuntimeWarning" in line)
    assert "reference backend" in warning and "pip install -e" not in warning

    listed = run([binaries / "xlayer", "options", "xlrb", "--json"], tmp_path)
    assert listed.returncode == 0 and '"proj_dim"' in listed.stdout, listed.stderr

    program = ROOT / "tests" / "typed" / "downstream.py"
    options = ["--strict", "--config-file=", f"--cache-dir={tmp_path}", f"--python-executable={binaries / 'python'}"]
    checked = run([sys.executable, "-m", "mypy", *options, "--no-error-summary", program], tmp_path)
    errors = {int(line.split(":")[1]) for line in checked.stdout.splitlines() if ": error: " in line}
    lines = program.read_text().splitlines()
    assert errors == {at for at, line in enumerate(lines, 1) if line.endswith("# wrong")}, checked.stdout


def test_without_its_extra_the_command_says_what_to_install(
    environment: Callable[[bool], Path], tmp_path: Path
) -> None:
    binaries = environment(False)
    ran = run([binaries / "xlayer", "train", "xlrb"], tmp_path)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.splitlines() == ["xlayer needs the package typer: pip install 'xlayer-ext[systems]'"]
    code = "import torch; from xlayer_ext import nn; print(nn.EMAAggregator(2, 8)(torch.randn(2, 3, 8)).shape)"
    ran = run([binaries / "python", "-c", code], tmp_path)
    assert ran.stdout == "torch.Size([2, 3, 8])\n", ran.stderr


def test_without_a_compiler_the_reference_is_installed(sdist: Path, tmp_path: Path) -> None:
    made, found = make_wheel(sdist, tmp_path, PATH=str(tmp_path))
    assert made.returncode == 0, made.stdout + made.stderr
    lines = [line.strip() for line in (made.stdout + made.stderr).splitlines() if "no C++ compiler" in line]
    assert lines and all("install g++ and install xlayer-ext again" in line for line in lines)
    assert [path.name.endswith("-py3-none-any.whl") for path in found] == [True]


def test_a_compiler_that_is_insisted_on_and_missing_is_named(sdist: Path, tmp_path: Path) -> None:
    made, found = make_wheel(sdist, tmp_path, PATH=str(tmp_path), XLAYER_NATIVE="1")
    said = made.stdout + made.stderr
    assert made.returncode != 0 and not found
    assert "xlayer-ext needs a C++ compiler for its kernels: install g++, or unset XLAYER_NATIVE" in said
    assert "Traceback" not in said


@pytest.mark.skipif(os.environ.get("XLAYER_WHOLE_WHEEL") != "1", reason="compiles for minutes: make nightly")
def test_a_wheel_with_kernels_has_each_library_once(sdist: Path, tmp_path: Path) -> None:
    made, found = make_wheel(sdist, tmp_path, XLAYER_CUDA="0")
    assert made.returncode == 0, made.stdout + made.stderr
    libraries = [name for name in zipfile.ZipFile(found[0]).namelist() if name.endswith(".so")]
    assert len(libraries) == 2 and "xlayer_ext/libxlayer.so" in libraries
    assert all(name.startswith("xlayer_ext/") for name in libraries)
