# Two commands: `make demo` shows what this does, `make test` checks it.
# PYTHON picks the interpreter (3.10-3.12), VENV where everything is installed.
PYTHON ?= python3
VENV ?= .venv
STORE ?= data/market
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
INSTALLED = $(VENV)/.installed
TESTS ?= tests
# Processes that share the tests; each computes on one thread.
JOBS ?= 2

.PHONY: demo test lint install clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else "Python 3.10-3.12 is needed, this is %d.%d; run make PYTHON=python3.11" % v)'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The embedded market, one training run and its report.
demo: $(INSTALLED)
	test -d $(STORE) || $(BIN)/qlib-ext market make --out $(STORE) --stocks 200
	QLIB_EXT_STORE=$(STORE) $(BIN)/qlib-ext run workflows/rnn_day_multi.yaml
	$(BIN)/qlib-ext report --experiment rnn_day_multi

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TESTS) -m "not slow and not gpu" -n $(JOBS) --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
