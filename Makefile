# Everything runs in an environment that the first call makes: Python 3.10 to 3.13 and make are all it takes.
#   make demo    the main job on real data: build, fine-tune, merge, evaluate, report
#   make test    lint, types, docs and the test suite
# Variables: PYTHON (the interpreter), VENV (where the environment is), JOBS (test workers).

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo demo-minilm test lint types docs serve-docs schema format clean

help:
	@echo "make demo | demo-minilm | test | lint | types | docs | serve-docs | schema | format | setup | clean"

# torch comes first and alone, so that an index with CPU builds (PIP_EXTRA_INDEX_URL) decides which build it is
# before any other package can ask for one.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
	  || { echo "regraft needs Python 3.10 to 3.13; name one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "this Python lacks venv or ensurepip: install it (Debian, Ubuntu: apt install python3-venv)" \
	            "or name another: make PYTHON=/path/to/python3 ..." >&2; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

setup: $(VENV)/.installed

demo: setup
	$(BIN)/python examples/digits/demo.py --out demo

demo-minilm: setup
	$(BIN)/python examples/minilm/demo.py --out demo/minilm

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

docs: setup
	$(BIN)/mkdocs build --strict --quiet

serve-docs: setup
	$(BIN)/mkdocs serve

# The summary of pytest stays the last thing on the screen.
test: lint types docs
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: setup
	$(BIN)/regraft schema > recipe.schema.json

clean:
	rm -rf $(VENV) build dist site demo recipe.schema.json .pytest_cache .mypy_cache .ruff_cache .hypothesis
