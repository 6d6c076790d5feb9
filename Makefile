# Two commands on a fresh machine do everything: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow lint type gpu-check bench clean
demo: $(STAMP)
	$(BIN)/latentize samples/stdlib_lm.py -o out --export onnx

test: lint type
	$(BIN)/python -m pytest -q -m "not slow" -n auto

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -n auto

lint: $(STAMP)
	$(BIN)/ruff check .

type: $(STAMP)
	$(BIN)/mypy

gpu-check: $(STAMP)
	$(BIN)/python benchmarks/gpu_check.py

$(STAMP): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[all,dev]"
	touch $@

clean:
	rm -rf $(VENV) out build dist *.egg-info
