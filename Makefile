# `make quickstart` and `make test` do all the set-up themselves; both may be run again at any time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

PODS := .venv-pods

.PHONY: quickstart test lint pods clean

quickstart: $(INSTALLED)
	$(BIN)/python -m experiments.quickstart --config=experiments/configs/quickstart.py

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(INSTALLED)
	$(BIN)/pip install --progress-bar off -c constraints.txt -e '.[dev]'
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
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[corpus,test]'
	touch $@

clean:
	rm -rf $(VENV) $(PODS) build *.egg-info
