# Every target is complete in itself: it creates .venv, installs what it needs, and runs. A second call finds it done.
# `make test PYTHON=python3.12` chooses the Python to start from.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all lint format docs clean
.SECONDARY:

demo: .venv/.installed-demo
	$(BIN)/ssprop-fx demo

test: .venv/.installed-test
	$(BIN)/python -m pytest -m "not slow"

test-all: .venv/.installed-test
	$(BIN)/python -m pytest

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
.venv/.installed-%: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -e '.[$*]'
	@touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --upgrade pip
