# Every target is complete in itself: it creates .venv, installs what it needs, and runs. A second call finds it done.
# `make test PYTHON=python3.12` chooses the Python to start from, `make test JOBS=1` runs the tests in one process.

PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
# without a worker anew: after a crash, xdist would wait for ever for what was left of the file
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --max-worker-restart=0

.PHONY: demo test test-all lint format docs clean
.SECONDARY:

demo: .venv/.installed-demo
	$(BIN)/ssprop-fx demo

test: .venv/.installed-test
	$(PYTEST) -m "not slow"

test-all: .venv/.installed-test
	$(PYTEST)

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: .venv/.installed-docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv site

# .venv/.installed-test: the package, editable, with the extra `test`
.venv/.installed-%: pyproject.toml setup.py $(wildcard ssprop_fx/kernels/*.[ch]) | .venv/bin/python
	$(BIN)/python -m pip install -e '.[$*]'
	@touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --upgrade pip
