# Two commands are enough: `make demo` and `make test`. Both set up what they need in $(VENV).

VENV ?= .venv
BIN := $(VENV)/bin
NEWEST := python3 python3.14 python3.13 python3.12 python3.11
PYTHON ?= $(shell for p in $(NEWEST); do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# An index or a folder that holds nothing but CPU builds of PyTorch, for the tests that need it.
TORCH_INDEX ?=
TORCH := torch==2.13.0
# The peer that policies are compared with; a build from source would need CMake and a compiler.
PEER := libcachesim==0.3.5
# Handed on to the command or to pytest: make demo ARGS="--policy fifo"
ARGS ?=

PIP := $(BIN)/python -m pip --disable-pip-version-check
MADE := $(VENV)/.made
RUN_READY := $(VENV)/.ready-to-run
TEST_READY := $(VENV)/.ready-to-test

# An engine and a release of it, each in an environment of its own that the target makes.
ENGINES := .engines
SGLANG ?= 0.5.17
SGLANG_PYTHON := $(ENGINES)/sglang-$(SGLANG)/bin/python
VLLM ?= 0.32.0
VLLM_PYTHON := $(ENGINES)/vllm-$(VLLM)/bin/python

.PHONY: engine test-engines matrix-vllm test-engines-sglang matrix-sglang
.PHONY: demo test lint format types bench clean help
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1  /p' $(MAKEFILE_LIST)

demo: $(RUN_READY) ## replay chats and agents over three tiers, every page verified
	$(BIN)/tiermem demo $(ARGS)

test: $(TEST_READY) ## all tests that need neither a GPU nor an engine
	$(BIN)/python -m pytest $(ARGS)

engine: $(ENGINES)/vllm-$(VLLM)/.ready ## set up what the next one needs: 1.8 GB, about a minute

test-engines: $(TEST_READY) $(ENGINES)/vllm-$(VLLM)/.ready ## vLLM (VLLM=0.32.0) on a CPU
	TIERMEM_VLLM_PYTHON=$(abspath $(VLLM_PYTHON)) \
		$(BIN)/python -m pytest -m engine -o faulthandler_timeout=900 \
		tests/integrations -k vllm $(ARGS)

matrix-vllm: ## the same for every release that is tested, one after the other
	$(MAKE) test-engines VLLM=0.28.0
	$(MAKE) test-engines VLLM=0.30.0
	$(MAKE) test-engines VLLM=0.32.0

test-engines-sglang: $(TEST_READY) $(ENGINES)/sglang-$(SGLANG)/.ready ## SGLang (SGLANG=0.5.17) on a CPU
	TIERMEM_SGLANG_PYTHON=$(abspath $(SGLANG_PYTHON)) \
		$(BIN)/python -m pytest -m engine -o faulthandler_timeout=900 \
		tests/integrations/test_sglang_serving.py $(ARGS)

matrix-sglang: ## the same for every release that is tested, one after the other
	$(MAKE) test-engines-sglang SGLANG=0.5.17
	$(MAKE) test-engines-sglang SGLANG=0.5.21
	$(MAKE) test-engines-sglang SGLANG=0.5.23

$(ENGINES)/vllm-$(VLLM)/.ready: scripts/make_vllm_environment.py scripts/engine_environment.py pyproject.toml
	TORCH_INDEX=$(TORCH_INDEX) $(PYTHON) scripts/make_vllm_environment.py $(ENGINES)/vllm-$(VLLM) $(VLLM)
	@touch $@

$(ENGINES)/sglang-$(SGLANG)/.ready: scripts/make_sglang_environment.py scripts/engine_environment.py pyproject.toml
	TORCH_INDEX=$(TORCH_INDEX) $(PYTHON) scripts/make_sglang_environment.py $(ENGINES)/sglang-$(SGLANG) $(SGLANG)
	@touch $@

lint: $(TEST_READY) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(TEST_READY) ## ruff: mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(TEST_READY) ## mypy, strict
	$(BIN)/mypy

bench: $(RUN_READY) ## measure the routes between the tiers on this machine
	$(BIN)/tiermem bench offload $(ARGS)

clean: ## remove the environment and what tools left
	rm -rf $(VENV) build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(MADE): scripts/make_environment.py
	@test -n "$(PYTHON)" || { echo "tiermem needs Python 3.11 or newer, none was found:" \
		"apt install python3 (Debian 12, Ubuntu 24.04), or python3.11 (Ubuntu 22.04)"; exit 1; }
	$(PYTHON) scripts/make_environment.py $(VENV)
	@touch $@

$(RUN_READY): $(MADE) pyproject.toml
	$(PIP) install --quiet -e '.[plot]'
	@touch $@

$(TEST_READY): $(RUN_READY)
	$(PIP) install --quiet -e '.[dev]'
	@$(PIP) install --quiet --only-binary=:all: --no-deps '$(PEER)' \
		|| echo "no $(PEER) for this Python: the tests that compare policies with it are skipped"
	@$(PIP) install --quiet --no-index --no-deps '$(TORCH)' 2>/dev/null \
		&& $(PIP) install --quiet '$(TORCH)' \
		|| { test -n "$(TORCH_INDEX)" && $(PIP) install --quiet --index-url '$(TORCH_INDEX)' '$(TORCH)'; } \
		|| echo "no CPU build of PyTorch at hand: tests that need it are skipped (TORCH_INDEX=... names one)"
	@touch $@
