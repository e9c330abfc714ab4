# Everything runs in .venv, which the targets make on their own. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Bytecode is kept even where the environment says otherwise: without it pytest rewrites 600 files in each process.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest
# Processes that share the tests, a file at a time, in the order of the files. Sorted by their number of tests, as pytest-xdist
# does by default, those that start a Ray would run last, two at a time.
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help venv demo serve test test-all quality

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP)  ## create .venv with the package, its tests and tools

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "sam3lora needs Python 3.11 or newer, $(PYTHON) is %d.%d: make PYTHON=python3.11 ..." % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## train and compare an adapter on a tiny SAM 3 (a few minutes on two CPU cores)
	$(BIN)/sam3lora demo

serve: $(STAMP)  ## answer prompts over HTTP on port 8000: a tiny SAM 3 with two sample adapters
	$(BIN)/sam3lora serve

test: $(STAMP)  ## run the tests that are not marked slow
	$(PYTEST) -m "not slow" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-all: $(STAMP)  ## run every test, one after the other
	$(PYTEST)

quality: $(STAMP)  ## lint, format check, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
