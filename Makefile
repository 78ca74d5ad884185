# make help lists every command. Nothing outside this folder is written, except pip's own cache, and by setup-browser
# (as root) Chromium.
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
BROWSER := $(STAMPS)/browser
NOTEBOOK := $(STAMPS)/notebook
WEIGHTS := models/$(MODEL)/provenance.json
# --no-deps: a lock names everything. Bytecode is compiled when first imported: of torch and transformers, a tenth is.
PIP_INSTALL := $(PY) -m pip install --disable-pip-version-check --no-deps --no-compile -qq
# Only files whose SHA-256 stands in the lock; scripts/lock.sh --hashes makes them.
PIP_INSTALL_LOCK := $(PIP_INSTALL) --require-hashes -r
TORCH = $(shell cat requirements/torch.txt)
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: help
help: ## List the commands
	@echo "make COMMAND [PYTHON=python3.12] [MODEL=gemma-3-270m|smollm2-135m] [ARGS=\"...\"]"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-26s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(BASE) ## Make .venv with the tool and its development tools (no vLLM; a minute)

.PHONY: setup-local
setup-local: $(LOCAL) $(WEIGHTS) ## Add vLLM for the CPU and a small real model (a few minutes, 4 GB)

.PHONY: setup-browser
setup-browser: $(BROWSER) ## Add Playwright, and as root on Debian Chromium: for tests of HTML pages (a minute)

.PHONY: setup-notebook
setup-notebook: $(NOTEBOOK) ## Add Jupyter's kernel and pandas: for notebooks and their tests (a minute)

.PHONY: icm
icm: setup-local ## Label the built-in claims with a real model on this machine (ARGS="--seed 2")
	@$(PY) scripts/run_local.py --model $(MODEL) $(ARGS)

.PHONY: serve
serve: setup-local ## Serve answers and scores at port 8080 with a real model on this machine, until Ctrl-C (ARGS="--port 9000")
	@$(PY) -m contrib.serving.command --start local --model $(MODEL) $(ARGS)

.PHONY: test
test: setup-local $(STAMPS)/tokenizers $(STAMPS)/tracking $(NOTEBOOK) ## Run every test, those against a real vLLM server included (ARGS="-k tree")
	@$(PY) -m pytest -m "not gpu" $(ARGS)

.PHONY: test-fast
test-fast: setup ## Run the tests that need no vLLM
	@$(PY) -m pytest -m "not gpu and not real_server" $(ARGS)

# What these test is for GPUs, and takes minutes.
FOR_GPUS := test_batch_invariant.py test_exact.py test_exactness.py test_model_parts.py test_triton_attention.py
.PHONY: test-oldest
test-oldest: setup-local ## Test the plugin and a real server with the oldest vLLM that is supported, in a fresh environment (ARGS="-k pools")
	@$(PY) scripts/versions.py oldest --run -- -m pytest tests/icm_vllm tests/real_server/test_real_server.py \
	  -m "not gpu" $(FOR_GPUS:%=--ignore tests/icm_vllm/%) $(ARGS) \
	  || { code=$$?; test "$(WHERE_POSSIBLE)$$code" = 1125 && echo "no environment with the oldest vLLM: not tested with it"; }

.PHONY: chaos
chaos: setup ## Break runs in every way that we know (docs/robustness.md; an hour and more)
	@$(PY) -m tests.faults.campaign --runs 1000 --kills 200 --seed 1 --jobs 2 $(ARGS)
	@$(PY) -m tests.faults.store

.PHONY: fuzz
fuzz: $(STAMPS)/fuzz ## Fuzz every parser, 10 CPU minutes each (ARGS="--seconds 60")
	@$(PY) -m tests.faults.fuzz $(ARGS)

.PHONY: mutation
mutation: setup ## Count which small faults in the search and the cache the tests notice (docs/quality.md; 20 minutes)
	@$(PY) -m tests.mutation.run $(ARGS)

# Triton's interpreter takes over ten minutes when every line of it is traced.
KERNELS_INTERPRETED := tests/icm_vllm/test_batch_invariant.py::test_the_kernels_under_the_interpreter
# What coverage itself writes is larger than the files that this test allows.
SMALL_FILES := tests/faults/test_chaos.py::test_a_run_under_tight_limits_stops_with_a_reason_and_is_resumed[small files]
.PHONY: coverage
coverage: setup ## Run every test that needs no vLLM, and show which lines none of them reached (docs/quality.md)
	@$(PY) -m coverage erase
	@status=0; $(PY) -m coverage run -m pytest -m "not gpu and not real_server and not browser" \
	  --deselect $(KERNELS_INTERPRETED) --deselect "$(SMALL_FILES)" $(ARGS) || status=$$?; \
	  $(PY) -m coverage combine -q && $(PY) -m coverage report && exit $$status

.PHONY: audit
audit: $(STAMPS)/audit ## Look up known vulnerabilities of everything in the locks (asks pypi.org)
	@for lock in requirements/*.lock; do echo "$$lock"; \
	  $(VENV)/audit/bin/pip-audit --strict --disable-pip --require-hashes -r "$$lock" $(ARGS) || status=1; \
	  done; exit $${status:-0}

.PHONY: licences
licences: setup ## Write docs/licences.md from what is installed (after setup-local: what vLLM needs, too)
	@$(PY) scripts/licences.py $(ARGS)

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

# The container of vllm/ (docs/containers.md). Settings: VLLM_MODEL, VLLM_PORT, MAX_MODEL_LEN; keys come from the environment.
VLLM_MODEL ?= 8B
VLLM_PORT ?= 8000
VLLM_BIND ?= 127.0.0.1
MAX_MODEL_LEN ?=
VLLM_IMAGE ?= icm-vllm:0.33.0
VLLM_CONTAINER ?= icm-vllm
DOCKER ?= docker
DOCKER_ARGS ?= --gpus all
# Only for these targets: VLLM_PORT means something else to a vLLM that `make icm` starts.
vllm-run vllm-run-detached vllm-compose-%: export VLLM_MODEL := $(VLLM_MODEL)
vllm-run vllm-run-detached vllm-compose-%: export MAX_MODEL_LEN := $(MAX_MODEL_LEN)
vllm-compose-%: export VLLM_PORT := $(VLLM_PORT)
vllm-compose-%: export VLLM_BIND := $(VLLM_BIND)
vllm-compose-%: export VLLM_IMAGE := $(VLLM_IMAGE)
COMPOSE := $(DOCKER) compose -f vllm/docker-compose.yml
# Keys by name: an argument could be read by every user of the machine. HF_TOKEN and VLLM_API_KEY may be unset.
VLLM_RUN = $(DOCKER) run --name $(VLLM_CONTAINER) --init --ipc=host $(DOCKER_ARGS) \
  -p $(VLLM_BIND):$(VLLM_PORT):8000 -v icm-hf-cache:/home/icm/.cache/huggingface \
  -e VLLM_MODEL -e MAX_MODEL_LEN -e HF_TOKEN -e VLLM_API_KEY

.PHONY: vllm-build
vllm-build: ## Build the container of the vLLM server (needs Docker, as all vllm- commands but vllm-test)
	@$(DOCKER) build -f vllm/Dockerfile -t $(VLLM_IMAGE) .

.PHONY: vllm-run
vllm-run: ## Run it in the foreground (VLLM_MODEL=8B VLLM_PORT=8000 MAX_MODEL_LEN= ARGS="vLLM's options")
	@$(VLLM_RUN) --rm $(VLLM_IMAGE) $(ARGS)

.PHONY: vllm-run-detached
vllm-run-detached: ## Run it in the background
	@$(VLLM_RUN) --detach --restart unless-stopped $(VLLM_IMAGE) $(ARGS)

.PHONY: vllm-compose-up
vllm-compose-up: ## The same by docker compose, in the foreground
	@$(COMPOSE) up --build

.PHONY: vllm-compose-up-detached
vllm-compose-up-detached: ## The same by docker compose, in the background
	@$(COMPOSE) up --build --detach

.PHONY: vllm-compose-down
vllm-compose-down: ## Stop what compose started; downloaded models stay
	@$(COMPOSE) down

.PHONY: vllm-compose-logs
vllm-compose-logs: ## Follow the log of what compose started
	@$(COMPOSE) logs --follow

.PHONY: vllm-test
vllm-test: setup ## Check that the server at VLLM_PORT answers alike whatever else it does (ARGS=--quick)
	@$(PY) scripts/test_determinism.py --url http://127.0.0.1:$(VLLM_PORT) $(ARGS)

.PHONY: vllm-stop
vllm-stop: ## Stop and remove the container
	@$(DOCKER) stop -t 30 $(VLLM_CONTAINER)
	@$(DOCKER) rm --force $(VLLM_CONTAINER) 2>/dev/null || true

.PHONY: vllm-logs
vllm-logs: ## Follow the container's log
	@$(DOCKER) logs --follow $(VLLM_CONTAINER)

.PHONY: vllm-shell
vllm-shell: ## Open a shell in the running container
	@$(DOCKER) exec --interactive --tty $(VLLM_CONTAINER) bash

.PHONY: vllm-info
vllm-info: ## Show the settings, the container's state, and what it serves
	@echo "model $(VLLM_MODEL)  port $(VLLM_BIND):$(VLLM_PORT)  max-model-len $(or $(MAX_MODEL_LEN),as configured)"
	@echo "image $(VLLM_IMAGE)  container $(VLLM_CONTAINER)  HF_TOKEN $(if $(HF_TOKEN),set,not set)  VLLM_API_KEY $(if $(VLLM_API_KEY),set,not set)"
	@$(DOCKER) ps --all --filter name=^$(VLLM_CONTAINER)$$ --format 'state {{.Status}}' || true
	@curl -sS --max-time 5 $(if $(VLLM_API_KEY),-H @<(printf 'Authorization: Bearer %s' "$$VLLM_API_KEY")) \
	  http://127.0.0.1:$(VLLM_PORT)/v1/models || echo "nothing answers at port $(VLLM_PORT)"

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
	@$(STEP) "installing the tool and its development tools" $(PIP_INSTALL_LOCK) requirements/base.lock
	@$(STEP) "linking this folder into $(VENV)" $(PIP_INSTALL) --no-build-isolation -e .
	@touch $@

$(STAMPS)/fuzz: requirements/fuzz.lock $(BASE)
	@$(STEP) "installing the fuzzer" $(PIP_INSTALL_LOCK) requirements/fuzz.lock
	@touch $@

$(STAMPS)/tokenizers: requirements/tokenizers.lock $(BASE)
	@$(STEP) "installing tokenizers of models, for tests" $(PIP_INSTALL_LOCK) requirements/tokenizers.lock
	@touch $@

$(STAMPS)/tracking: requirements/tracking.lock $(LOCAL)
	@$(STEP) "installing tools that runs are logged to, for tests" $(PIP_INSTALL_LOCK) requirements/tracking.lock
	@touch $@

# pip-audit needs other versions than the tool does: an environment of its own.
$(STAMPS)/audit: requirements/audit.lock $(BASE)
	@$(STEP) "installing pip-audit" bash -c '$(PYTHON) -m venv --clear $(VENV)/audit && \
	  $(VENV)/audit/bin/python -m pip install --disable-pip-version-check --no-deps -qq --require-hashes -r requirements/audit.lock'
	@touch $@

# Two tries, because an index that cannot be reached costs minutes of retries when it is named on every call.
$(LOCAL): requirements/local.lock requirements/torch.txt $(BASE)
	@$(STEP) --may-fail "installing $(TORCH) from where pip looks" $(PIP_INSTALL) "$(TORCH)" || \
	  $(STEP) "installing $(TORCH) from $(TORCH_INDEX)" \
	    $(PIP_INSTALL) --index-url $(TORCH_INDEX) "$(TORCH)"
	@$(STEP) "installing vLLM for the CPU and what it needs" $(PIP_INSTALL_LOCK) requirements/local.lock
	@touch $@

# Playwright's own browsers are a download of their own; the system's Chromium does.
$(BROWSER): requirements/browser.lock $(BASE)
	@$(STEP) "installing Playwright" $(PIP_INSTALL_LOCK) requirements/browser.lock
	@scripts/install_chromium.sh
	@touch $@

$(NOTEBOOK): requirements/notebook.lock $(BASE)
	@$(STEP) "installing Jupyter's kernel and pandas" $(PIP_INSTALL_LOCK) requirements/notebook.lock
	@touch $@

$(WEIGHTS): scripts/prepare_model.py | $(LOCAL)
	@$(PY) scripts/prepare_model.py --model $(MODEL)
	@touch $@
