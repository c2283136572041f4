# `make demo` trains and compares two models; `make test` checks everything. Both make .venv, install into it what
# constraints.txt pins, build, and start from what is already there the next time. Both end with the minutes of each part.
#
#   PYTHON       the Python to make .venv from (3.10 or newer)
#   TORCH_INDEX  a package index to take torch from, for example PyTorch's own index of CPU builds, which spares a
#                machine without a GPU the CUDA build: make demo TORCH_INDEX=URL
#   SEEDS, CALLS how many fresh seeds and fuzzed calls `make soak` takes
#   XLAYER_CUDA=0, XLAYER_CUDA_ARCHS, MAX_JOBS   see setup.py

PYTHON ?= $(or $(shell command -v python3.11),python3)
TORCH_INDEX ?=
SEEDS ?= 30
CALLS ?= 1000000
PYTEST_ARGS ?=
# A process per core; the tests of a file stay together, because they share what is slow to make. Files in their order:
# those with the most tests first, as it would be otherwise, leave the few long ones to the end, on one core.
PARALLEL ?= -n auto --dist loadfile --no-loadscope-reorder

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest $(PARALLEL)
SOAK = $(BIN)/python -m pytest -n auto --dist worksteal --seeds $(SEEDS) -m 'operators and not slow and not traced'
TIMED := MAKE='$(MAKE)' tools/timed.sh
INSTALLED := .venv/installed
CPP = $(shell find csrc tests/emulator -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
.PHONY: demo test soak soak-cpu soak-emulated soak-fuzz soak-sanitized nightly wheel-with-kernels packages build quick-build emulator \
	sanitized train-demo lint test-emulated test-cpu format results docs docs-serve clean

demo:
	@$(TIMED) packages quick-build train-demo

test:
	@$(TIMED) packages build emulator sanitized lint test-emulated test-cpu

# Looks for new faults: the tests that draw inputs, with fresh seeds, on the emulator without its checker, to which other
# numbers are nothing new, as they are to compilers; a million wild calls of operators and functions, and some under
# sanitizers.
soak:
	@$(TIMED) packages build emulator sanitized soak-cpu soak-emulated soak-fuzz soak-sanitized

soak-cpu: build
	$(SOAK)

soak-emulated: emulator
	@$(BIN)/cmake --build build/native --target emulator_unchecked
	XLAYER_EMULATOR_LIBRARY=$(CURDIR)/build/emulator/libxlayer_emulated_unchecked.so \
		$(SOAK) --device emulated

soak-fuzz: build
	$(BIN)/python tests/fuzz --calls $(CALLS) --workers 2 --seed $$(date +%s)

soak-sanitized: sanitized
	$(BIN)/python tests/fuzz --sanitized --calls $$(($(CALLS) / 20)) --workers 2 --seed $$(date +%s)

# The wheel with its kernels, compiled as for an installation.
wheel-with-kernels: $(INSTALLED)
	XLAYER_WHOLE_WHEEL=1 $(BIN)/python -m pytest tests/build/test_package.py

# All that takes too long for every commit.
nightly: test wheel-with-kernels soak

packages: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) install --constraint constraints.txt cmake ninja pybind11 setuptools wheel
	XLAYER_NATIVE=0 $(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv .venv

# Compiles what changed in csrc, for the CPU, and for CUDA if nvcc is there.
build: $(INSTALLED)
	@$(BIN)/python setup.py --quiet build_ext --inplace

# The same, but a first build on a machine without a GPU leaves out the CUDA kernels, which take minutes to compile.
quick-build: $(INSTALLED)
	@if [ -f build/native/build.ninja ]; then $(BIN)/cmake --build build/native; \
	elif nvidia-smi -L >/dev/null 2>&1; then $(MAKE) --no-print-directory build; \
	else XLAYER_CUDA=$${XLAYER_CUDA:-0} $(MAKE) --no-print-directory build; fi

# Compiles the CUDA kernels as C++, with the emulator that the tests run them on (tests/emulator).
emulator: build
	@$(BIN)/cmake --build build/native --target emulator

# The CPU operators under AddressSanitizer and UndefinedBehaviorSanitizer, for the fuzzers (tests/fuzz).
sanitized: build
	@$(BIN)/cmake --build build/native --target sanitized

train-demo: quick-build
	$(BIN)/xlayer sweep xlrb --presets plain,H9 --seeds 0 --quick --out runs/demo-$$(date +%Y%m%d-%H%M%S)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

test-emulated: emulator
	$(PYTEST) -m operators --device emulated

test-cpu: emulator
	$(PYTEST) $(PYTEST_ARGS)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# Writes docs/performance.md, docs/studies.md and their figures from benchmarks/results.
results: $(INSTALLED)
	$(BIN)/python -m benchmarks.pages

# Builds the documentation, without a network. A warning is an error.
docs: $(INSTALLED)
	$(BIN)/python -m sphinx -q -W --keep-going -b html -d build/docs-trees docs build/docs
	@echo "documentation: $(CURDIR)/build/docs/index.html"

docs-serve: docs
	$(BIN)/python -m http.server --directory build/docs --bind 127.0.0.1 8000

clean:
	rm -rf .venv build dist xlayer_ext/*.so *.egg-info
