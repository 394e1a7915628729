# make demo: from nothing to answers from a live endpoint.   make test: everything.   make help: the rest.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install dev demo check test lint format docs build clean

VENV := .venv
BIN := $(VENV)/bin
# `PYTHON=/path/to/python3.12 make install` chooses another.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))
ARGS ?=

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18

install: $(VENV)/.installed  ## make .venv with the `orchestrator` command in it

dev: $(VENV)/.installed-dev  ## install, and what the tests need

demo: install  ## fine-tune, score, register and deploy a real model on real reviews
	@$(BIN)/orchestrator run jobs/recipes/text-classification/reviews.yaml $(ARGS)

check: lint  ## style, types, imports, unit and contract tests
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/unit tests/contract -n 2 $(ARGS)

test: lint  ## all tests
	@mkdir -p build
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/unit tests/contract tests/docs -n 2 --junitxml=build/unit.xml $(ARGS)
	$(BIN)/pytest tests/ray tests/e2e --durations 25 --junitxml=build/tests.xml $(ARGS)

lint: dev  ## style, types and imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: dev  ## put the sources in their style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: dev  ## write the reference pages again
	$(BIN)/python docs/generate.py

build: dev  ## build the wheel into dist/
	$(BIN)/pip wheel --no-deps --wheel-dir dist .

clean:  ## remove what make made; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/bin/python:
	@if [ -z '$(PYTHON)' ]; then \
		echo 'This needs Python 3.11 or later, and there is none on the PATH: install it, or name it as in: make install PYTHON=/path/to/python3.11' >&2; \
		exit 2; \
	fi
	$(PYTHON) -m venv $(VENV)
