# ovms: 'make help' lists what there is.
#
# Everything is made from here: system packages by apt, Python packages into .venv, tools that must not be installed
# (a registry, a guest kernel) unpacked into .cache. OVMS_CACHE names another place for the last.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OVMS_CACHE ?= $(CURDIR)/.cache
# the user's own settings must not change what the tests see
unexport OVMS_ROOT OVMS_DEBUG
# without byte code every command compiles its modules anew, as nothing that pip installed does
unexport PYTHONDONTWRITEBYTECODE

TESTS ?=
WORKERS ?= 2
FUZZ_SECONDS ?= 60

.PHONY: help
help: ## show this text
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: setup-system setup-python setup-tools ## install what ovms needs: system packages, .venv, tools (quick when all is there)

.PHONY: setup-system
setup-system:
	@scripts/setup-system.sh

.PHONY: setup-demo
setup-demo: setup
	@scripts/setup-system.sh --demo

.PHONY: setup-python
setup-python: setup-system
	@scripts/setup-python.sh $(PYTHON) $(VENV)

.PHONY: setup-tools
setup-tools: setup-system
	@scripts/fetch-tools.sh

.PHONY: setup-interop
setup-interop: setup ## get other people's tools for the tests; all but cosign and virtiofsd need Go (what can't be had is left out)
	@scripts/fetch-tools.sh interop

.PHONY: setup-fuzz
setup-fuzz: setup-python
	@scripts/setup-fuzz.sh $(VENV)

.PHONY: demo
demo: setup-demo ## build, push, pull, run, snapshot and restore a real VM
	@$(BIN)/python demo/demo.py

.PHONY: test
test: setup lint ## the quick tests (under 5 minutes)
	$(BIN)/pytest -q -n $(WORKERS) -m "not guest and not long" $(TESTS)

.PHONY: test-all
test-all: setup-demo setup-interop setup-fuzz lint ## all tests, with real Linux guests and those that take minutes
	@$(BIN)/python demo/make_images.py
	$(BIN)/pytest -q -n $(WORKERS) $(TESTS)

.PHONY: test-long
test-long: setup ## the property tests with other examples in each run, and fifty times as many (an hour or so; TESTS=tests/unit/spec)
	OVMS_TEST_PROFILE=long $(BIN)/pytest -q -n $(WORKERS) --timeout 3600 $(or $(TESTS),tests/unit)

.PHONY: fuzz
fuzz: setup-fuzz ## every parser of foreign bytes, FUZZ_SECONDS each (60); what is found, and what reached new code, is kept in .cache/fuzz
	FUZZ_SECONDS=$(FUZZ_SECONDS) FUZZ_CORPUS=$(CURDIR)/.cache/fuzz $(BIN)/pytest -q -n $(WORKERS) $(or $(TESTS),tests/fuzz)

.PHONY: lint
lint: setup-python ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: vectors
vectors: setup-python ## write the test vectors of spec/vectors, and the worked example of the RAM snapshot format
	@$(BIN)/python scripts/make_vectors.py
	@$(BIN)/python scripts/make_hostile_vectors.py

.PHONY: spec-coverage
spec-coverage: setup-python ## which tests and vectors cite which rule of the specification (ALL=1: every one of them)
	@$(BIN)/python scripts/spec_coverage.py $(if $(ALL),--all)

.PHONY: spec-mutations
spec-mutations: setup-python ## change each number of the specification once: does a test notice? (a minute)
	@$(BIN)/python scripts/spec_mutations.py

.PHONY: bench
bench: ## all benchmarks
	@for name in $$(cd bench && ls bench_*.py | sed 's/^bench_//; s/\.py$$//; s/_/-/g'); do $(MAKE) --no-print-directory bench-$$name; done

bench-distribution: setup-interop
.PHONY: bench-%
bench-%: setup
	@$(BIN)/python bench/bench_$(subst -,_,$*).py

.PHONY: wheel
wheel: setup-python ## the wheel and source archive of the last commit, in dist: the same bytes everywhere
	@scripts/build-wheel.sh "$(CURDIR)/$(BIN)/python" dist

.PHONY: audit
audit: setup-python ## look the pinned packages up among known vulnerabilities (error 1: some are; 3: it could not be found out)
	@$(BIN)/python scripts/audit.py

.PHONY: lock
lock: ## pin the newest Python packages with their hashes (needs uv)
	scripts/lock.sh

.PHONY: clean
clean: ## remove what was made here (.venv, .cache, caches of tools)
	rm -rf $(VENV) .cache build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
