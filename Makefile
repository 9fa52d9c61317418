# Two commands do all the set-up: `make demo` runs the main job on the embedded model,
# `make test` passes the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Threads that wait for each other sleep instead of spinning: on cores that others use too, spinning costs more time than
# the second thread saves (docs/performance.md).
export OMP_WAIT_POLICY ?= passive

.PHONY: setup demo test lint clean
setup: $(STAMP)

# On Linux PyPI's torch brings gigabytes of CUDA. For the CPU alone:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/bitfold demo

test: setup lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
