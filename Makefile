# make demo and make test do all of their own set-up from nothing, and skip what is done.
.PHONY: help set-up demo test lint check format bench clean

export OMP_WAIT_POLICY = PASSIVE
export OMP_NUM_THREADS ?= 2
PYTHON ?= python3
export PYTHON
BIN = .venv/bin

help: ## What there is to make
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 10

set-up: ## A virtual environment in .venv, the packages, the small model
	@./setup.sh

demo: set-up ## The whole loop once, with a real small model
	@$(BIN)/charter demo

test: set-up ## All tests, in three processes (much of it waits for brokers and dying processes)
	@$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

lint: set-up ## Format, lint, types, schema evolution
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m schemas.compatibility

check: lint test ## All that a change must pass

format: set-up ## Format the code, and write the reference pages from it
	@$(BIN)/python -m charter.reference
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: set-up ## Speed and memory, as ratios
	@$(BIN)/python -m benchmarks.generation
	@$(BIN)/python -m benchmarks.labels
	@$(BIN)/python -m benchmarks.bus
	@$(BIN)/python -m benchmarks.sink
	@$(BIN)/python -m benchmarks.demo
	@if [ -n "$$KAFKA_HOME" ]; then $(BIN)/python -m benchmarks.hop; else echo "no KAFKA_HOME: benchmarks.hop is left out"; fi

clean: ## Remove what set-up and the demo made here
	rm -rf .venv .charter build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
