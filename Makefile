# Every target sets up what it needs: a virtual environment in .venv, with the versions that constraints.txt pins.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
PYTEST_ARGS ?=
# Tests run in so many processes. 0: in one, where --pdb and the like work.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c $(CONSTRAINTS)
INPUTS := pyproject.toml setup.py $(CONSTRAINTS)

# The environment notes what it was made for. After a move, with another Python or other constraints, or without a
# working interpreter, it is made anew; after an edit of INPUTS it is brought up to date.
MADE_FOR := $(CURDIR) $(PYTHON) $(CONSTRAINTS)
FOUND := $(shell cat $(VENV)/made-for 2>/dev/null && { $(BIN)/python -c '' 2>/dev/null || echo broken; })
ifneq ($(FOUND),$(MADE_FOR))
$(VENV)/made-for: FORCE
endif

.PHONY: help demo test test-all bench lint docs clean FORCE
.DEFAULT_GOAL := help

help:
	@echo "make demo      rank a real model, and check every value against an exact SVD"
	@echo "make test      lint, type-check, and run the tests that take seconds"
	@echo "make test-all  the same with the slow tests"
	@echo "make bench     compare the speed with other ways to the same numbers"
	@echo "make lint      ruff and mypy only"
	@echo "make docs      build the documentation as a site, build/site/index.html; warnings are errors"
	@echo "make clean     remove .venv and everything that was built"

$(VENV)/made-for:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kappa_fast needs Python 3.11 or newer, but $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv --clear $(VENV)
	@echo "$(MADE_FOR)" > $@

$(VENV)/has-demo: $(VENV)/made-for $(INPUTS)
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/has-test: $(VENV)/made-for $(INPUTS)
	$(PIP) -e '.[test]'
	@touch $(VENV)/has-demo $(VENV)/has-docs $@

$(VENV)/has-bench: $(VENV)/made-for $(INPUTS)
	$(PIP) -e '.[bench,test]'
	@touch $(VENV)/has-demo $(VENV)/has-docs $(VENV)/has-test $@

$(VENV)/has-docs: $(VENV)/made-for $(INPUTS)
	$(PIP) -e '.[docs]'
	@touch $@

demo: $(VENV)/has-demo
	$(BIN)/kappa-fast demo

lint: $(VENV)/has-test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-all: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "" $(PYTEST_ARGS)

# Material for MkDocs announces its successor at every start.
docs: $(VENV)/has-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(VENV)/has-bench
	$(BIN)/python -m benchmarks cpu --to build/benchmarks $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find kappa_fast kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
