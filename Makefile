# Two commands: `make demo` shows what this does, `make test` checks it.
# PYTHON picks the interpreter (3.10-3.12), VENV where everything is installed.
PYTHON ?= python3
VENV ?= .venv
STORE ?= data/market
# Companies of that market.
STOCKS ?= 200
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
INSTALLED = $(VENV)/.installed
TESTS ?= tests
# Processes that share the tests; each computes on one thread.
JOBS ?= 2

.PHONY: demo test smoke latest docs lint install clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else "Python 3.10-3.12 is needed, this is %d.%d; run make PYTHON=python3.11" % v)'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

# The embedded market, one training run and its report.
demo: $(INSTALLED)
	test -d $(STORE) || $(BIN)/qlib-ext market make --out $(STORE) --stocks $(STOCKS)
	QLIB_EXT_STORE=$(STORE) $(BIN)/qlib-ext run workflows/rnn_day_multi.yaml
	$(BIN)/qlib-ext report --experiment rnn_day_multi

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TESTS) -m "not slow and not gpu and not smoke" -n $(JOBS) --dist worksteal

# Market, workflow, report, compare, roll and score, each once through the command line.
smoke: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_smoke.py -m smoke

# The same on what a plain `pip install` resolves today, in an environment of its own;
# torch alone is pinned, so that pip finds the build that `install` found.
latest:
	test -d $(VENV)_latest || $(PYTHON) -m venv $(VENV)_latest
	$(VENV)_latest/bin/python -m pip --disable-pip-version-check install --quiet "$$(grep '^torch==' constraints.txt)"
	$(VENV)_latest/bin/python -m pip --disable-pip-version-check install --quiet --editable . pytest
	OMP_NUM_THREADS=1 $(VENV)_latest/bin/python -m pytest tests/test_smoke.py -m smoke

# The site, in build/site/index.html; warnings are errors, nothing is fetched.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VENV)_latest build *.egg-info .pytest_cache .mypy_cache .ruff_cache
