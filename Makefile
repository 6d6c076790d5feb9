# Two commands on a fresh machine do everything: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-fast test-slow lint type gpu-check clean
demo: $(STAMP)  ## install, then convert the trained sample
	$(BIN)/latentize samples/stdlib_lm.py -o out --export onnx

test: $(STAMP)  ## everything but the slow suite, side by side
	$(MAKE) --no-print-directory -j3 lint type test-fast

test-fast: $(STAMP)  ## the ordinary tests alone
	$(BIN)/python -m pytest -q -n auto -m "not slow"

test-slow: $(STAMP)  ## the slow suite alone
	$(BIN)/python -m pytest -q -n auto -m slow

lint: $(STAMP)
	$(BIN)/ruff check .

type: $(STAMP)
	$(BIN)/mypy

gpu-check: $(STAMP)  ## everything that needs a GPU: correctness, then speed, into benchmarks/results
	$(BIN)/python benchmarks/gpu_check.py

# torch first and alone: pinned, so that what follows cannot bring another build of it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "latentize needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[all,dev]"
	touch $@

clean:
	rm -rf $(VENV) out build dist *.egg-info
