# `make demo` and `make test` do all the set-up that they need. `make help` lists the rest.

PYTHON    ?= python3
VENV      ?= .venv
SYSTEM    ?=
TORCH     ?= auto
OUT       ?= out
PIP_FLAGS ?=
DEMO_ARGS ?=

ifeq ($(SYSTEM),1)
PY    := $(PYTHON)
READY := build/system-environment-ready
else
PY    := $(VENV)/bin/python
READY := $(VENV)/.prfl-fast-ready
endif

# --no-compile: byte-compiling what is never imported takes longer than the rest of the installation.
PIP := $(PY) -m pip --disable-pip-version-check install --quiet --no-compile $(PIP_FLAGS)

.DEFAULT_GOAL := help
.PHONY: help demo test lint unit demo-tiny environment build other-torch clean

help:
	@echo 'make demo    set up, train the demo, write $(OUT)/index.html (install time is printed apart)'
	@echo 'make test    set up, ruff, mypy, pytest, the demo in its tiny setting'
	@echo 'make lint    set up, ruff and mypy alone'
	@echo 'make build   compile csrc/ again: seconds after a change'
	@echo 'make other-torch OTHER_TORCH=2.10.0   test the built ops library with another torch'
	@echo 'make clean   remove build outputs, caches and $(OUT)/; the environment stays'
	@echo
	@echo 'VENV=DIR     environment to make or to reuse (now: $(VENV))'
	@echo 'SYSTEM=1     use $(PYTHON) as it is and install there what is missing'
	@echo 'PYTHON=...   interpreter to make the environment with, 3.10 or newer'
	@echo 'TORCH=cpu    pin torch as on a machine without a GPU'
	@echo 'PRFL_CUDA=   on, off or auto: CUDA kernels (now: $${PRFL_CUDA:-auto}); PRFL_CUDA_ARCHS=80,90a picks architectures'
	@echo 'PIP_FLAGS=   more flags for pip install, --extra-index-url for example'
	@echo 'OUT=DIR      where make demo writes (now: $(OUT))'
	@echo 'DEMO_ARGS=   more flags for prfl-fast demo; prfl-fast demo --help lists them'

# ------------------------------------------------------------------------------------------------ environment

environment: $(READY)

# An environment is made when its interpreter is missing, and never removed.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo 'prfl_fast needs Python 3.10 or newer: make PYTHON=python3.x ...' >&2; exit 1; }
	@echo 'making the environment $(VENV)'
	@$(PYTHON) -m venv $(VENV)

ifneq ($(SYSTEM),1)
$(READY): | $(VENV)/bin/python
endif

# Which torch: an environment that has one keeps it; without a GPU (or with TORCH=cpu) one release is pinned, because
# the newest brings gigabytes of CUDA libraries; with a GPU the newest wheel is the right one.
$(READY): pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	@mkdir -p build
	@start=$$(date +%s); \
	have=$$($(PY) -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true); \
	if [ -n "$$have" ]; then \
	  echo "torch==$$have" > build/constraints.txt; echo "keeping torch $$have"; \
	elif [ '$(TORCH)' = cpu ] || ! command -v nvidia-smi >/dev/null 2>&1; then \
	  printf 'torch==2.13.0\ntriton==3.8.0\n' > build/constraints.txt; echo 'no GPU asked for: torch 2.13.0'; \
	else \
	  : > build/constraints.txt; echo 'GPU found: the newest torch'; \
	fi; \
	echo 'installing prfl_fast and what its demo and tests need'; \
	$(PIP) -c build/constraints.txt 'torch>=2.10' 'setuptools>=77' 'cmake>=3.24' 'ninja>=1.11' 'pybind11>=2.13' && \
	$(PIP) --no-build-isolation -c build/constraints.txt -e '.[test]' && \
	echo $$(( $$(date +%s) - start )) > $@ && \
	echo "installed in $$(cat $@) s"

# The ops library that is built now, in an environment of its own with another torch (gigabytes: not part of make test).
OTHER_TORCH ?= 2.10.0
other-torch: build
	$(PYTHON) -m venv build/torch-$(OTHER_TORCH)
	build/torch-$(OTHER_TORCH)/bin/python -m pip install --quiet --no-compile 'torch==$(OTHER_TORCH)' numpy tqdm \
	  safetensors pytest pytest-timeout $(PIP_FLAGS)
	OMP_NUM_THREADS=1 build/torch-$(OTHER_TORCH)/bin/python -m pytest -q tests/ops/test_solver_step.py \
	  tests/ops/test_solver_step_backends.py tests/ops/test_solver_step_binaries.py tests/test_triton_interpreter.py

build: $(READY)
	$(PY) setup.py --quiet build_ext --inplace

# ------------------------------------------------------------------------------------------------ what it is for

demo: $(READY)
	@start=$$(date +%s); \
	$(PY) -m prfl_fast.cli demo --output $(OUT) $(DEMO_ARGS) && \
	echo "install $$(cat $(READY)) s (once), demo $$(( $$(date +%s) - start )) s; open $(OUT)/index.html"

test: lint unit demo-tiny

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m mypy

# One thread a process: the tests are many small calls, which a pool of threads only slows down.
unit: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest

demo-tiny: $(READY)
	$(PY) -m prfl_fast.cli demo --tiny --output build/demo-tiny

clean:
	rm -rf prfl_fast/*.so build dist *.egg-info $(OUT) .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find prfl_fast tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
