# make demo: the main job. make test: every test. Both set everything up first; see README.md.
PYTHON ?= python3
VENV ?= .venv
EXTRAS := operator,router,worker,dev
ARGS ?=
PYTEST_WORKERS ?= 2
SHELL := /bin/bash

.PHONY: help setup demo test lint cluster clean
help:
	@echo 'make demo     start a small and a large model behind one endpoint and route questions'
	@echo 'make test     run every test'
	@echo 'make lint     ruff, mypy, import contracts'
	@echo 'make cluster  a real Kubernetes control plane in the foreground'
	@echo 'make clean    remove .venv and caches'

setup:
	@scripts/setup.sh "$(PYTHON)" "$(VENV)" "$(EXTRAS)"

demo: setup
	@exec $(VENV)/bin/tandem demo $(ARGS)

test: setup
	@exec scripts/test.sh "$(VENV)" "$(PYTEST_WORKERS)" $(ARGS)

lint: setup
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

clean:
	rm -rf "$(VENV)" .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

cluster: setup
	@exec $(VENV)/bin/python tests/controlplane/cluster.py $(ARGS)
