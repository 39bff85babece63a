# Everything that is done with this repository, each by one command. Each sets up .venv itself when that is needed.
#   PYTHON   the Python (3.11 or newer) that .venv is made with
#   FULL     1: make bench measures all cells
#   WORKERS  how many processes run the tests, with one torch thread each

PYTHON ?= python3
WORKERS ?= $(shell $(PYTHON) -c "import os; print(min(8, os.cpu_count() or 1))")
PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help setup quickstart test test-full bench bench-gpu check clean environment
.DEFAULT_GOAL = help

help: ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

setup: environment ## .venv with torch, Luthier and its tests' tools
	@echo ".venv is ready; try .venv/bin/luthier --help"

quickstart: environment ## fine-tune, compare and merge the embedded model in quickstart/ (2 minutes)
	@echo "The quickstart, in quickstart/ (under 2 minutes on two cores)"
	@mkdir -p quickstart && cd quickstart && ../.venv/bin/luthier quickstart

test: environment ## the tests (10 minutes at most)
	@echo "The tests (10 minutes at most, $(WORKERS) workers); make test-full runs the long ones too"
	@$(PYTEST) -m "not full"

test-full: environment ## every test, however long; the summary goes to tests/FULL.md
	@echo "Every test, however long ($(WORKERS) workers)"
	@rm -f build/test-full.xml
	@$(PYTEST) --junitxml=build/test-full.xml; status=$$?; \
	.venv/bin/python tools/full_summary.py build/test-full.xml tests/FULL.md && exit $$status

bench-gpu: environment ## the engine on a CUDA card: exact? how fast? (10 minutes; needs nothing from the network)
	@.venv/bin/python benchmarks/gpu.py --out benchmarks/results/gpu.json

bench: environment ## Luthier beside other tools (under 20 minutes; FULL=1 for all cells); docs/performance.md
	@echo "Luthier beside other tools on the same rows (under 20 minutes, and some for the peers' environments the first time)"
	@.venv/bin/python benchmarks/compare/bench.py $(if $(FULL),--full)

check: environment ## format, lint and types
	@.venv/bin/ruff format --check . || { echo "To format: .venv/bin/ruff format ."; exit 1; }
	@.venv/bin/ruff check --quiet .
	@.venv/bin/mypy

clean: ## remove .venv, caches and build products (runs/ and quickstart/ stay)
	rm -rf .venv build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache
	find src tests tools -name __pycache__ -prune -exec rm -rf {} +

environment:
	@$(PYTHON) tools/setup.py
