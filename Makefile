# Every verb makes its own virtual environment (.venv) on first use; pip's own settings (index, wheels) are honoured.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LIBRARIES := $(VENV)/.conformance

.PHONY: demo docs test lint bench gpu conformance clean

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/python examples/train.py $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: $(READY)
	$(BIN)/python docs/generate.py --check
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html
	$(BIN)/python -m pytest -q tests/e2e/test_documentation.py
	@echo "written: docs/_build/html/index.html"

bench: $(READY)
	$(BIN)/python -m benchmarks.speed.bench $(ARGS)

$(LIBRARIES): $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[conformance]'
	@touch $@

conformance: $(LIBRARIES)
	$(BIN)/python tests/conformance/run.py $(ARGS)

gpu: $(READY)
	$(BIN)/python -m pytest tests -k on_a_gpu
	$(BIN)/python -m benchmarks.kernels.gpu $(ARGS)

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache out
