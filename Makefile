# `make demo` and `make test` need nothing but python3 (3.10 or newer): they set up .venv on first use.
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-gpu fuzz lint format docs clean distclean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

venv: $(STAMP)  ## set up .venv

# Again only when pyproject.toml changes; an install that was cut short leaves no stamp and is run again.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fxprune needs Python 3.10 or newer; $(PYTHON) is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12 ...")'
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "$(PYTHON) cannot make a virtual environment: install its venv module (Debian: python3-venv)" >&2; exit 1; }
	@echo "Setting up $(VENV) (PyTorch and the rest take some GB and some minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --upgrade pip
	@$(BIN)/python -m pip install -qq --editable '.[demo,dev,plot]'
	@touch $@

demo: $(STAMP)  ## prune a small CNN 2:4, compare it with the dense one and export it
	$(BIN)/python examples/demo.py $(ARGS)

# A process for each core, each of one thread: faster than one process of many threads.
test: $(STAMP)  ## the fast tests; ARGS="-k name" picks some
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(ARGS)

test-slow: $(STAMP)  ## the slow tests
	$(BIN)/python -m pytest -m 'slow and not gpu' $(ARGS)

test-gpu: $(STAMP)  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(ARGS)

# A network that fails is printed as a script. A test may take 15 minutes otherwise, hence the last option.
fuzz: $(STAMP)  ## random networks; ARGS="--networks 2000 --hypothesis-seed 1 --fuzz-log fuzz.jsonl"
	$(BIN)/python -m pytest -m fuzz tests/fuzz -s -o faulthandler_timeout=0 $(ARGS)

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## put the code into ruff's format, mend what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## the documentation as a site, where there is a mkdocs.yml
	@if [ -f mkdocs.yml ]; then \
	    $(BIN)/python -m pip install -qq --editable '.[docs]' && $(BIN)/mkdocs build --strict; \
	else \
	    echo "There is no mkdocs.yml: read README.md and docs/ as they are."; \
	fi

clean:  ## remove caches and build products
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## and the virtual environment
	rm -rf $(VENV)
