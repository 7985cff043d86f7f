# make demo and make test include the whole setup and skip completed steps.
.PHONY: help set-up demo test lint check format bench clean

export OMP_WAIT_POLICY = PASSIVE
export OMP_NUM_THREADS ?= 2
# Empty: Python writes bytecode, also where the environment forbids it. Otherwise each process compiles Charter again.
export PYTHONDONTWRITEBYTECODE =
PYTHON ?= python3
export PYTHON
BIN = .venv/bin

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 10

set-up: ## Create .venv, install the packages, convert the small model
	@./setup.sh

demo: set-up ## Run the whole loop once, with a small real model
	@$(BIN)/charter demo

test: export OMP_NUM_THREADS = 1
test: set-up ## Run all tests, in six processes (many tests wait for brokers and for killed processes)
	@$(BIN)/python -m pytest -q -n 6 --dist worksteal

lint: set-up ## Format, lint, types, imports, schema evolution
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m schemas.compatibility

check: lint test ## Run every check that a change must pass

format: set-up ## Generate the reference pages and format the code
	@$(BIN)/python -m charter.reference
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: set-up ## Measure speed and memory, as ratios to peers
	@$(BIN)/python -m benchmarks.generation
	@$(BIN)/python -m benchmarks.labels
	@$(BIN)/python -m benchmarks.bus
	@$(BIN)/python -m benchmarks.sink
	@$(BIN)/python -m benchmarks.evaluation
	@$(BIN)/python -m benchmarks.demo
	@if [ -n "$$KAFKA_HOME" ]; then $(BIN)/python -m benchmarks.hop; else echo "KAFKA_HOME is not set: benchmarks.hop is skipped"; fi

clean: ## Remove .venv, the data folder and build outputs
	rm -rf .venv .charter build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
