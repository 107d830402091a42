# `make train` and `make test` start from a bare clone: they make .venv, install into it once, and run.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train test test-lowest faults lint peer package clean

train: $(VENV)/installed
	$(BIN)/countdown train $(ARGS)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(ARGS)

faults: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m faults $(ARGS)

# The whole suite with the oldest versions that pyproject.toml allows. LOWEST: options of `uv pip install`, such as
# `--torch-backend cpu`.
test-lowest: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python -m uv venv --quiet --clear --python $(BIN)/python $(VENV)-lowest
	$(BIN)/python -m uv pip install --quiet --python $(VENV)-lowest --resolution lowest-direct $(LOWEST) --editable ".[dev]"
	$(VENV)-lowest/bin/python -m pytest $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

peer: $(VENV)/installed-peer
	$(BIN)/python -m pytest -m peer $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-lowest

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@ $(VENV)/installed

$(VENV)/installed-peer: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[dev,peer]"
	touch $@ $(VENV)/installed-dev $(VENV)/installed

package: $(VENV)/installed-dev
	.ci/package
