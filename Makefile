# make demo: the main job. make test: every test. Both set everything up first; see README.md.
PYTHON ?= python3
VENV ?= .venv
EXTRAS := operator,router,worker,dev
ARGS ?=
AUDIT ?=
PYTEST_WORKERS ?= 2
SHELL := /bin/bash

.PHONY: help setup demo test lint sbom chart cluster reference docs screenshots clean
help:
	@echo 'make demo     start a small and a large model behind one endpoint and route questions'
	@echo 'make test     run every test'
	@echo 'make lint     ruff, mypy, import contracts, bills of materials, known vulnerabilities (AUDIT=--required)'
	@echo 'make sbom     what the images install, as CycloneDX'
	@echo 'make chart    pack the chart, or push it: ARGS=oci://registry.example.com/charts'
	@echo 'make cluster  a real Kubernetes control plane in the foreground'
	@echo 'make docs     the documents as one site, in site/ (ARGS=serve shows it while you write)'
	@echo 'make screenshots  take the pictures of the documents anew (needs Chromium)'
	@echo 'make reference  write docs/reference and docs/troubleshooting.md from the code'
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
	$(VENV)/bin/python scripts/sbom.py
	$(VENV)/bin/python scripts/audit.py $(AUDIT)

sbom: setup
	@$(VENV)/bin/python scripts/sbom.py $(ARGS)

clean:
	rm -rf "$(VENV)" .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

reference: setup
	@PYTHONPATH=scripts $(VENV)/bin/python -m reference
	@PYTHONPATH=scripts $(VENV)/bin/python -m reference.rooms

screenshots: setup
	@exec $(VENV)/bin/python scripts/site/screenshots.py

docs: reference
	@exec $(VENV)/bin/python -m mkdocs $(or $(ARGS),build)

chart:
	@exec scripts/chart.sh $(ARGS)

cluster: setup
	@exec $(VENV)/bin/python tests/controlplane/cluster.py $(ARGS)
