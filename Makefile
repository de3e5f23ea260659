# posttrain: everything a clone needs. `make` or `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
TRITON_ENV ?= .venv-triton
BIN := $(VENV)/bin
# Tests run on all cores, at most four, one thread each; TEST_WORKERS=0 runs them in one process.
TEST_WORKERS ?= logical
PYTEST := $(BIN)/python -m pytest --durations=15 -n $(TEST_WORKERS) --maxprocesses 4 --dist loadscope
STAMP := $(VENV)/.installed
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
unexport VIRTUAL_ENV

.DEFAULT_GOAL := help
.PHONY: help install triton-env demo test test-all lint format docs bench overoptimisation clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

# torch first and pinned: the newest torch on PyPI brings gigabytes of CUDA libraries, the pin does not here.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

install: $(STAMP) ## create .venv and install posttrain into it

triton-env: ## create .venv-triton, the environment of the embedded Triton server
	scripts/setup_triton_env.sh $(TRITON_ENV)

demo: install triton-env ## run the whole tiny pipeline, from data to a served model and a report
	$(BIN)/posttrain run configs/tiny/pipeline.yaml

test: install triton-env ## unit, integration and conformance tests
	$(PYTEST)

test-all: install triton-env ## the same and the slow proofs
	$(PYTEST) -m ''

lint: install ## ruff and mypy over everything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## apply ruff's fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install ## regenerate the JSON schema of the configuration
	$(BIN)/posttrain schema --output docs/schema.json

bench: install ## learning over three seeds, written to runs/seeds.html
	$(BIN)/python scripts/bench_learning.py

overoptimisation: install ## gold against proxy reward over sqrt(KL), written to runs/tiny-over-optimisation/
	$(BIN)/python scripts/overoptimisation.py

clean: ## remove environments, runs and caches
	rm -rf $(VENV) $(TRITON_ENV) runs dist build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
