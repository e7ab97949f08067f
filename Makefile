# Every verb makes its own virtual environment (.venv) on first use; pip's own settings (index, wheels) are honoured.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LIBRARIES := $(VENV)/.conformance
# Without bytecode, which is half of the work: Python makes it for the modules that are imported, when they are.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

.PHONY: demo docs site test test-all test-fast lint bench gpu conformance clean

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/python examples/train.py $(ARGS)

# Parallel workers share the cores: torch's thread pool and Inductor's compile processes in each would multiply them. A file's tests stay with one worker, so
# a costly fixture of the file is made once; files are taken in their order, because pytest-xdist's own puts files of few but long tests last.
PYTEST := $(BIN)/python -m pytest
PARALLEL := OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(PYTEST) -n logical --dist loadfile --no-loadscope-reorder

# The tests, or with `test-all` also the exhaustive ones: those that may share the machine on all cores, then those that time or count memory by themselves.
# ARGS go to both runs; one that selects no test (exit code 5) is no failure unless the other selects none either.
test: KIND := and not exhaustive
test test-all: $(READY)
	@$(PARALLEL) -m "not serial $(KIND)" $(ARGS); first=$$?; \
	$(PYTEST) -m "serial $(KIND)" $(ARGS); second=$$?; \
	[ $$first -eq 5 ] && exit $$second; [ $$second -eq 5 ] && exit $$first; [ $$first -eq 0 ] && exit $$second; exit $$first

# What a change is tried with first: the tests of `make test` without the mark `slow`.
test-fast: $(READY)
	$(PARALLEL) -m "not slow and not serial and not exhaustive" $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# The site alone; `make docs` also runs the tests of the documentation, which `make test` has among its own.
site: $(READY)
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html
	@echo "written: docs/_build/html/index.html"

docs: site
	$(BIN)/python -m pytest -q tests/e2e/test_documentation.py

bench: $(READY)
	$(BIN)/python -m benchmarks.speed.bench $(ARGS)

$(LIBRARIES): $(READY)
	$(INSTALL) -e '.[conformance]'
	@touch $@

conformance: $(LIBRARIES)
	$(BIN)/python tests/conformance/run.py $(ARGS)

gpu: $(READY)
	$(PYTEST) -m gpu
	$(BIN)/python -m benchmarks.kernels.gpu $(ARGS)

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache out
