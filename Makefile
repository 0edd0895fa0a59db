# The verbs of this project. Each makes .venv itself; they need only Python 3.11+ and make.
.PHONY: demo test test-containers check bench bench-gpu eval chaos lock clean help
.DEFAULT_GOAL := help

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(if $(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo ok),$(p))))
BIN := .venv/bin

help: ## Show the verbs
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

# uv installs 140 packages in half a minute where pip takes five; pip itself only fetches uv.
.venv/.ready: requirements.lock bootstrap.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "rewatch needs Python 3.11 or newer: none found on PATH (set PYTHON=/path/to/python)"; exit 1; }
	@date +%s > .install-began
	@echo "Installing into .venv: about 3 GB to download the first time (torch is most of it), 6.6 GB on disk."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r bootstrap.lock
	@VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install -q --require-hashes -r requirements.lock
	@VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install -q --no-deps --no-build-isolation -e .
	@echo $$(( $$(date +%s) - $$(cat .install-began) )) > $@; rm -f .install-began

demo: .venv/.ready ## Play three cameras through the whole pipeline, show what it found, stop
	@$(BIN)/rewatch demo

# Files by two at a time, each with servers of its own: most tests wait for something. One test alone: pytest as usual.
test: .venv/.ready ## Every test, on the real Kafka, ClickHouse engine and llama.cpp server, kills included
	@$(BIN)/python -m pytest -n 2 --dist loadfile

test-containers: .venv/.ready ## The compose files linted, started, secured and spread over six hosts under podman; as root, fifteen minutes
	@TEST_CONTAINERS=1 $(BIN)/python -m pytest tests/containers -s

check: .venv/.ready ## Lint, types, import contracts, schema compatibility
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m schemas.compatibility

bench: .venv/.ready ## Ratios of speed against stated baselines, into bench.json; fifteen minutes
	@$(BIN)/python -m tests.bench

bench-gpu: .venv/.ready ## Images a second of full-size detectors on a GPU; says so and ends where there is none
	@$(BIN)/python -m tests.bench.gpu

eval: .venv/.ready ## Scores of the shipped models on held-out scenes and windows, into eval.json; five minutes
	@$(BIN)/python -m infra.models.evaluate

N ?= 100
SEED ?= 1
chaos: .venv/.ready ## N faults at random under load, then an audit from outside, into chaos.json: make chaos N=100 SEED=1
	@$(BIN)/python -m tests.chaos --n $(N) --seed $(SEED)

lock: .venv/.ready ## Pin the newest versions that fit pyproject.toml
	@$(BIN)/uv pip compile -q -U --universal --generate-hashes --no-emit-index-url --no-annotate --no-header --python-version 3.11 --extra dev pyproject.toml -o requirements.lock
	@for i in processors detector; do $(BIN)/uv pip compile -q --universal --generate-hashes --no-emit-index-url --no-annotate --no-header --python-version 3.11 --constraint requirements.lock --excludes infra/images/$$i.without pyproject.toml infra/images/build.in -o infra/images/$$i.lock; done

clean: ## Remove the environment and the local data
	@rm -rf .venv .rewatch
