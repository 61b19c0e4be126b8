# SPDX-License-Identifier: Apache-2.0
# `make` lists the targets. Every target sets .venv up first, which takes no time once it is done.

MODEL        ?= examples/tiny/model
ADAPTERS     ?= examples/tiny/adapters
HOST         ?= 127.0.0.1
HTTP_PORT    ?= 8000
GRPC_PORT    ?= 8001
METRICS_PORT ?= 8002
INSTANCES    ?=
SHAPE        ?= llama-3.1-8b
RESULTS      ?= build/benchmarks
WORKERS      ?= 2
ARGS         ?=

BIN    := .venv/bin
SETUP  := @scripts/setup.sh
SHELLS := scripts/*.sh .ci/run

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test test-gpu lint format bench perf example-model clean \
  bench-engine bench-latency bench-triton bench-kernels profile simulate figures

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## create .venv from requirements.lock, with a tritonserver if there is none
	$(SETUP)

demo: ## stream one prompt through the base model and every example adapter
	$(SETUP)
	@$(BIN)/python examples/demo.py $(ARGS)

serve: ## run the server until Ctrl-C; see MODEL, ADAPTERS, HOST, HTTP_PORT, GRPC_PORT, METRICS_PORT, INSTANCES
	$(SETUP)
	@exec $(BIN)/multilora serve --model "$(MODEL)" --adapters "$(ADAPTERS)" --instances $(or $(INSTANCES),0) \
	  --host $(HOST) --http-port $(HTTP_PORT) --grpc-port $(GRPC_PORT) --metrics-port $(METRICS_PORT) $(ARGS)

test: lint ## lint, then every test that needs no GPU, in WORKERS processes (2; 0: in one, e.g. with ARGS=--pdb)
	@$(BIN)/python -m pytest tests -m "not gpu" -n $(WORKERS) --dist loadscope --no-loadscope-reorder \
	  --durations=15 $(ARGS)

test-gpu: ## the tests that need a CUDA device; without one they are skipped
	$(SETUP)
	@$(BIN)/python -m pytest tests -m gpu -rs $(ARGS)
	@$(BIN)/python -c 'import torch; torch.cuda.is_available() or print("test-gpu: skipped, torch finds no CUDA device")'

lint: ## ruff, mypy, shellcheck and hadolint
	$(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck $(SHELLS)
	$(BIN)/hadolint docker/Dockerfile

format: ## let ruff rewrite the source
	$(SETUP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: ## what Triton and the front end cost, with the example model
	$(SETUP)
	@$(BIN)/python benchmarks/run.py $(ARGS)

# RESULTS=benchmarks/results puts the JSON where `make figures` reads it.
bench-engine: ## throughput of the engine at SHAPE by number of adapters; JSON in RESULTS
	$(SETUP)
	@$(BIN)/python benchmarks/engine.py --shape $(SHAPE) --requests 512 --input 256 --output 256 \
	  --json $(RESULTS)/engine.json $(ARGS)

bench-latency: ## time to first token and between tokens at SHAPE by batch size
	$(SETUP)
	@$(BIN)/python benchmarks/latency.py --shape $(SHAPE) --input 256 --output 128 \
	  --json $(RESULTS)/latency.json $(ARGS)

bench-triton: ## the same traffic to the engine alone and through Triton at SHAPE
	$(SETUP)
	@$(BIN)/python benchmarks/through_triton.py --shape $(SHAPE) --input 256 --output 256 \
	  --json $(RESULTS)/through-triton.json $(ARGS)

bench-kernels: ## every kernel against the roofline and its torch reference
	$(SETUP)
	@$(BIN)/python benchmarks/bench_kernels.py --json $(RESULTS)/kernels.json $(ARGS)

profile: ## where the time of a saturated decode goes at SHAPE
	$(SETUP)
	@$(BIN)/python benchmarks/profile_steps.py --shape $(SHAPE) --input 256 --json $(RESULTS)/profile.json $(ARGS)

simulate: ## the scheduler in virtual time: tables, and whether the targets hold; about eight minutes on 2 cores
	$(SETUP)
	@$(BIN)/python benchmarks/simulate.py --json $(RESULTS)/simulation $(ARGS)

figures: ## the plots and tables of docs/ from benchmarks/results; needs matplotlib
	$(SETUP)
	@$(BIN)/python benchmarks/plot.py
	@$(BIN)/python benchmarks/tables.py
	@$(BIN)/python benchmarks/simulated.py

perf: ## drive a server of its own with Triton's perf_analyzer
	$(SETUP)
	@$(BIN)/python benchmarks/perf_analyzer.py --model "$(MODEL)" --adapters "$(ADAPTERS)" $(ARGS)

example-model: ## train examples/tiny from nothing
	$(SETUP)
	@$(BIN)/python examples/train_tiny.py $(ARGS)

clean: ## remove .venv and every cache
	rm -rf .venv build .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
