# make run      set up, then plan, train, compare and report (CONFIG=..., ARGS="a.b=c ...")
# make test     set up, then the tests
# make check    format, lint, types, import rules
PYTHON ?= python3
VENV   ?= .venv
CONFIG ?= experiments/configs/quickstart.yaml
ARGS   ?=
PIP_ARGS ?=
EXTRAS ?= dev

comma := ,
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
BIN   := $(VENV)/bin

.PHONY: setup run test test-compiler test-others test-all check bench clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is older than Python 3.11; name another one: make setup PYTHON=python3.12" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt --editable '.[$(EXTRAS)]'
	$(BIN)/python -m hetero.planner.compiled
	@touch $@

run: $(STAMP)
	$(BIN)/heteroq run $(CONFIG) $(ARGS)

# Two processes, of about equal length: most of the time goes into compiling kernels, one at a time in each process.
COMPILER_TESTS := $(wildcard tests/numerics/test_compile_*.py)

test: $(STAMP)
	$(BIN)/lint-imports
	@$(MAKE) --no-print-directory -j2 test-compiler test-others

test-compiler: $(STAMP)
	$(BIN)/python -m pytest $(COMPILER_TESTS)

test-others: $(STAMP)
	$(BIN)/python -m pytest $(COMPILER_TESTS:%=--ignore=%)

test-all: $(STAMP)
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -m ''

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	@for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
