# One command is all a fresh machine needs: `make demo` or `make test` makes the virtual
# environment, installs into it, and goes on. Nothing is installed twice: a stamp in .venv is
# compared with pyproject.toml and constraints.txt.

# PYTHON=... chooses the interpreter. (It is *run*, not looked up: a name can be on the path and
# still not start.)
PYTHON ?= $(shell python3.11 -c "" 2>/dev/null && echo python3.11 || echo python3)

VENV := .venv
RUN  := $(VENV)/bin/python
PIP  := $(RUN) -m pip --disable-pip-version-check install -qq -c constraints.txt
# What builds a release, apart from .venv: no torch for a wheel.
TOOLS := build/tools
# A process for each core, and one more (tests/conftest.py). A file's tests stay together, until one process runs out of its own.
TEST := $(RUN) -m pytest -n auto --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format docs gallery bench dist check-dist clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed-dev  ## an energy in a minute: trained, sampled, log Z, as a prior; a picture
	$(RUN) examples/quickstart.py

test: $(VENV)/.installed-dev  ## the tests and the doctests, on all cores
	$(TEST)

test-slow: $(VENV)/.installed-dev  ## the long statistical checks
	$(TEST) -m slow

lint: $(VENV)/.installed-dev  ## ruff (rules and format) and pyright
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m pyright

format: $(VENV)/.installed-dev  ## let ruff put right what it can
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

docs: $(VENV)/.installed-docs  ## the documentation, to docs/_build/html
	$(RUN) -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

gallery: $(VENV)/.installed-dev  ## run the examples that changed, for their pages; NAMES="ising ..."
	$(RUN) docs/_ext/gallery.py $(NAMES)

bench: $(VENV)/.installed-bench  ## ours against the peers, a table for each question; BENCH=--quick
	$(RUN) -m tests.benchmarks $(BENCH)

dist: $(TOOLS)/.installed  ## the wheel and the source distribution, to dist/
	rm -rf dist
	$(TOOLS)/bin/python -m build

check-dist: dist  ## dist/, looked into, installed into a new environment, and used; INSTEAD="arviz==0.23.*"
	$(TOOLS)/bin/python -m twine check --strict dist/*
	$(TOOLS)/bin/python -m tests.packaging $(if $(INSTEAD),--instead "$(INSTEAD)")

clean:  ## remove the virtual environment and everything built
	rm -rf $(VENV) dist build docs/_build docs/jupyter_execute examples/output
	rm -rf .pytest_cache .ruff_cache .hypothesis *.egg-info
	find pyro_ebm tests examples docs -name __pycache__ -prune -exec rm -rf {} +

# An environment whose interpreter no longer starts is made anew.
$(VENV)/.installed-dev: pyproject.toml constraints.txt
	@$(RUN) -c "" 2>/dev/null || { \
	  $(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
	    || { echo "pyro_ebm needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..."; exit 1; }; \
	  echo "making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "installing pyro_ebm and what its tests and examples need (once; a few minutes)"
	@$(PIP) -e ".[dev]"
	@touch $@

$(VENV)/.installed-docs $(VENV)/.installed-bench: $(VENV)/.installed-%: $(VENV)/.installed-dev
	@echo "installing what \`make $*\` needs"
	@$(PIP) -e ".[$*]"
	@touch $@

$(TOOLS)/.installed: constraints.txt
	@$(PYTHON) -m venv --clear $(TOOLS)
	@$(TOOLS)/bin/python -m pip --disable-pip-version-check install -qq -c constraints.txt \
	  build twine "readme-renderer[md]"
	@touch $@
