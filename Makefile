# Two commands do everything on a fresh machine:
#   make quickstart   installs and trains a small model on real text
#   make test         installs and passes the tests
# Others: make check (lint and types), make clean.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Arguments for every pip install, such as an index with CPU builds of torch.
PIP_ARGS ?=
PYTEST_ARGS ?=

.PHONY: install install-dev browser quickstart test check clean

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "thimble needs Python 3.11 or later; choose one with: make PYTHON=python3.12"; exit 6; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "This Python has no venv module. On Debian: apt-get install python3-venv"; exit 6; }

# A stamp per set of packages: nothing is installed twice, and a changed pyproject installs again.
$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing thimble and its packages into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what the tests need ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

# The report is tested in a real browser where there is one, or where one can be installed.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	  { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && echo "Installing chromium ..." && \
	    apt-get update -qq >/dev/null && \
	    apt-get install -y -qq --no-install-recommends chromium >/dev/null 2>&1; } || \
	  echo "No chromium: the test that looks at the report will be skipped."

quickstart: install
	@$(BIN)/thimble quickstart

check: install-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# One process per core; each of them computes with one thread, which is faster for tiny models than
# two threads that wait for each other.
test: install-dev check browser
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
