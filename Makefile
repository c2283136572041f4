# `make demo` trains and compares two models; `make test` checks everything. Both make .venv, install into it what
# constraints.txt pins, build, and start from what is already there the next time.
#
#   PYTHON       the Python to make .venv from (3.10 or newer)
#   TORCH_INDEX  a package index to take torch from, for example PyTorch's own index of CPU builds, which spares a
#                machine without a GPU the CUDA build: make demo TORCH_INDEX=URL
#   XLAYER_CUDA=0, XLAYER_CUDA_ARCHS, MAX_JOBS   see setup.py

PYTHON ?= $(or $(shell command -v python3.11),python3)
TORCH_INDEX ?=
PYTEST_ARGS ?=
# A process per core; the tests of a file stay together, because they share what is slow to make.
PARALLEL ?= -n auto --dist loadfile

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := .venv/installed
CPP := $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh csrc/include/xlayer/*.h \
	tests/emulator/*.h tests/emulator/*.cpp tests/emulator/faults/*.h tests/emulator/faults/*.cu)
# The tests that call operators: they run on the CPU kernels, and on the CUDA kernels under the emulator.
OPERATOR_TESTS := $(addprefix tests/,test_aggregate.py test_aggregate_torch.py test_emulated.py test_hdim.py \
	test_hdim_modules.py test_hdim_torch.py test_hyper.py test_hyper_modules.py test_hyper_torch.py test_quantize.py \
	test_quantize_torch.py test_routing.py)

.PHONY: demo test lint format build emulator results clean

demo: build
	$(BIN)/xlayer sweep xlrb --presets plain,H9 --seeds 0 --quick --out runs/demo-$$(date +%Y%m%d-%H%M%S)

test: lint emulator
	$(BIN)/python -m pytest $(PARALLEL) --device emulated $(OPERATOR_TESTS)
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# Compiles what changed in csrc; the install below has configured the folder.
build: $(INSTALLED)
	@$(BIN)/cmake --build build/native

# Compiles the CUDA kernels as C++, with the emulator that the tests run them on (tests/emulator).
emulator: build
	@$(BIN)/cmake --build build/native --target emulator

$(INSTALLED): pyproject.toml constraints.txt setup.py | $(BIN)/python
	$(PIP) install --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) install --constraint constraints.txt cmake ninja pybind11 setuptools wheel
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv .venv

# Writes the README's numbers from benchmarks/results.
results: $(INSTALLED)
	$(BIN)/python -m benchmarks.readme

clean:
	rm -rf .venv build dist xlayer_ext/*.so *.egg-info
