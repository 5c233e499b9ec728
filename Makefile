# `make quickstart` and `make test` do all the set-up themselves, in one virtual environment. Both may
# be run again at any time, in any order.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --disable-pip-version-check -c constraints.txt
INSTALLED := $(VENV)/.installed
# On top of it: what only the tests need.
TESTABLE := $(VENV)/.installed-test

PODS := .venv-pods

.PHONY: quickstart test lint pods clean

quickstart: $(INSTALLED)
	$(BIN)/python -m experiments.quickstart --config=experiments/configs/quickstart.py

test: $(TESTABLE)
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(TESTABLE)
	$(PIP) --progress-bar off -e '.[dev]'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Compilers for devices that are not here: docs/pods.md.
pods: $(PODS)/.installed
	$(PODS)/bin/python -m pytest -m pods

$(PODS)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(PODS)
	$(PODS)/bin/pip install --disable-pip-version-check -c constraints.txt -e '.[pods]'
	touch $@

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[corpus]'
	touch $@

$(TESTABLE): $(INSTALLED)
	$(PIP) -e '.[corpus,test]'
	touch $@

clean:
	rm -rf $(VENV) $(PODS) build *.egg-info
