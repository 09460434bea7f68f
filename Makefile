# Every target sets up what it needs; a fresh machine needs Python 3.11 to 3.13 and make.
#   make demo ARGS="--quick --no-serve"      arguments for the command behind a target
#   make install PYTHON=/opt/python3.13/bin/python3 PIP_ARGS="--prefer-binary"

VENV ?= .venv
PIP_ARGS ?=
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/installed

# What a usable interpreter must answer; ensurepip is what Debian leaves out of python3.
IS_USABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11 python,\
	$(shell $(name) -c '$(IS_USABLE)' >/dev/null 2>&1 && command -v $(name))))

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format serve clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Create .venv with prunefront and everything it can use

demo: $(STAMP) ## Search a Pareto front for the demo model on this machine, then show it on a page
	@$(BIN)/prunefront demo $(ARGS)

test: $(STAMP) ## Run the tests; what this machine lacks is skipped with the reason
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

lint: $(STAMP) ## Check style, formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP) ## Sort imports, format the code and write docs/openapi.json anew
	@$(BIN)/ruff check --select I --fix .
	@$(BIN)/ruff format .
	@$(BIN)/python -m service.openapi

serve: $(STAMP) ## Start the HTTP API, the page and a controller on this machine
	@$(BIN)/prunefront serve $(ARGS)

clean: ## Remove the environment and the caches
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist

# The stamp is written last, so an interrupted installation is taken up again.
$(STAMP): pyproject.toml
	@if [ -z "$(PYTHON)" ]; then \
		echo "prunefront needs Python 3.11, 3.12 or 3.13 with the venv module, but none was found on the PATH." >&2; \
		echo "Install one (Debian and Ubuntu: apt-get install python3 python3-venv), or name it: make PYTHON=/path/to/python3" >&2; \
		exit 1; \
	fi
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		echo "Creating $(VENV) with $(PYTHON)"; "$(PYTHON)" -m venv --clear "$(VENV)"; }
	@echo "Installing prunefront and what it needs into $(VENV): a few minutes, most of it torch (once; again when pyproject.toml changes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --editable ".[all]"
	@touch $(STAMP)
	@echo "Installed."
