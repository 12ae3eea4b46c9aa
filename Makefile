# `make` lists the targets. Every target sets up what it needs in .venv, from nothing;
# PYTHON names the interpreter it starts from (3.11 or newer).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
PEERS := --peers diffusers,diffusers-channels-last,diffusers-compiled,openvino,keras-cv,engine-openvino --xla on --repeats 3

.DEFAULT_GOAL := help
.PHONY: help install demo train test test-full test-gpu test-notebooks lint bench bench-peers notebooks docs package clean
# A half-written result (an interrupted installation) must not look finished.
.DELETE_ON_ERROR:

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: setup.cfg setup.py pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install --editable '.[standard]'
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --editable '.[test]'
	@touch $@

$(VENV)/installed-tpu-plan: $(VENV)/installed
	$(BIN)/python -m pip install --editable '.[tpu-plan]'
	@touch $@

$(VENV)/installed-notebooks: $(VENV)/installed
	$(BIN)/python -m pip install --editable '.[notebooks]'
	@touch $@

$(VENV)/installed-bench: $(VENV)/installed
	$(BIN)/python -m pip install --editable '.[bench]'
	@touch $@

$(VENV)/installed-bench-peers: $(VENV)/installed
	$(BIN)/python -m pip install --editable '.[bench-peers]'
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --editable '.[docs]'
	@touch $@

$(VENV)/installed-package: setup.cfg | $(BIN)/pip
	$(BIN)/python -m pip install --editable '.[package]'
	@touch $@

install: $(VENV)/installed  ## Install keras-sd and what it needs into .venv
	@echo 'Ready: $(BIN)/keras-sd --help'

demo: $(VENV)/installed  ## Generate with the bundled model, upscale, fine-tune it (2 minutes)
	$(BIN)/python -m keras_sd demo $(ARGS)

train: $(VENV)/installed  ## Train; ARGS="text-to-image --help" lists the options
	$(BIN)/python -m keras_sd.train $(ARGS)

test: $(VENV)/installed-test  ## Run the tests
	$(BIN)/python -m pytest -q -n 2 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder $(ARGS)

test-full: $(VENV)/installed-test $(VENV)/installed-tpu-plan  ## Compare full-size models with diffusers, train all methods (two hours, 24 GiB)
	$(if $(ARGS),,$(BIN)/python -m pytest -q -m slow -n 2 --max-worker-restart 0 --dist loadfile)
	ROBUSTNESS_INPUTS=5000 $(BIN)/python -m pytest -q -m 'not gpu' $(if $(findstring tests/,$(ARGS)),,tests/robustness tests/full_size) $(ARGS)

# With the interpreter as it is: where there is a GPU, it has JAX for it already.
test-gpu:  ## Fine-tune at full size on a GPU under JAX (12 minutes); ARGS="--parts lora"
	KERAS_BACKEND=jax $(PYTHON) -m pytest -q -m gpu tests/backend
	$(PYTHON) tools/test_gpu.py $(ARGS)

test-notebooks: $(VENV)/installed-test $(VENV)/installed-notebooks  ## Execute notebooks at their smallest setting
	$(BIN)/python -m pytest -q -n 2 --max-worker-restart 0 --maxschedchunk 1 tests/notebooks $(ARGS)

lint: $(VENV)/installed-test  ## Check style, formatting, types and spelling
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m codespell_lib

bench: $(VENV)/installed-bench  ## Time XLA on and off, on TensorFlow and JAX (15 minutes)
	$(BIN)/python tools/bench.py $(ARGS)

bench-peers: $(VENV)/installed-bench-peers  ## Time diffusers, OpenVINO and KerasCV beside (80 minutes)
	$(BIN)/python tools/bench.py $(PEERS) $(ARGS)
	$(BIN)/python tools/bench_start.py $(STARTS)

notebooks: $(VENV)/installed-notebooks  ## Execute the notebooks in place
	$(BIN)/python tools/run_notebooks.py $(ARGS)

docs: $(VENV)/installed-docs  ## Build the documentation as HTML in build/docs
	$(BIN)/python -m sphinx -q -E -W --keep-going -c docs -d build/doctrees . build/docs $(ARGS)
	@echo build/docs/index.html

package: $(VENV)/installed-package  ## Build the wheel and the source distribution in dist/, and check them
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean:  ## Remove builds and caches; .venv, runs/, demo/ and bench/ stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
