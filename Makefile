PYTHON ?= python3
PORT ?= 9090
VENV := .venv
BIN := $(VENV)/bin
STUDIO_VENV ?= .venv-label-studio
STUDIO_VERSION := 1.23.2
# Three processes on two cores, because servers start and die in many tests; the tests of a file stay together, because
# they share servers, and long files (chaos, cli) come first.
PARALLEL := -n 3 --dist loadscope --no-loadscope-reorder

.PHONY: help demo serve test chaos e2e bench lint format install install-dev install-studio clean

help:  ## Show this help
	@grep -E '^[a-z0-9-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

demo: install  ## Serve the bundled checkpoint on PORT (default 9090), with all processes
	@exec env MODEL=demo PORT=$(PORT) $(BIN)/python -m backend serve  # exec: SIGTERM to make reaches the server

serve: install  ## Serve MODEL on PORT, with all processes
	@exec env PORT=$(PORT) $(BIN)/python -m backend serve

install: $(VENV)/installed
install-dev: $(VENV)/installed-dev
install-studio: $(STUDIO_VENV)/installed

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "error: Python 3.10 to 3.13 is needed; set PYTHON=/path/to/python3.12" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "error: cannot make $(VENV); install the venv module (Debian: python3-venv) or free the folder" >&2; exit 2; }

$(VENV)/installed: requirements.txt | $(VENV)/bin/python
	@echo "installing into $(VENV); the first time takes a few minutes"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt \
	  || { echo "error: pip could not install requirements.txt; the lines above say why" >&2; exit 2; }
	@touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(STUDIO_VENV)/installed:
	@echo "installing Label Studio $(STUDIO_VERSION) into $(STUDIO_VENV); takes about two minutes and 1 GB"
	@$(PYTHON) -m venv --clear $(STUDIO_VENV)
	@$(STUDIO_VENV)/bin/python -m pip install -q --disable-pip-version-check label-studio==$(STUDIO_VERSION)
	@touch $@

lint: install-dev  ## Check style, types and import rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@PYTHONPATH=. $(BIN)/lint-imports --no-cache

format: install-dev  ## Format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

test: install-dev  ## Run the tests on the real Redis and the real small model; ROOM=queue runs one room's
	@$(BIN)/python -m pytest $(if $(ROOM),tests/$(ROOM),tests --ignore tests/e2e $(PARALLEL))

chaos: install-dev  ## Run the long chaos tests: kill, hang and disconnect processes under load
	@CHAOS=full $(BIN)/python -m pytest tests/chaos

e2e: install-dev install-studio  ## Run the tests against a real Label Studio and a real browser
	@LABEL_STUDIO_VENV=$(STUDIO_VENV) $(BIN)/python -m pytest tests/e2e

bench: install-dev  ## Measure start-up, latency, memory, the queue, bulk work and the detector
	@$(BIN)/python -m tests.bench.serving
	@$(BIN)/python -m tests.bench.enqueue
	@$(BIN)/python -m tests.bench.queue
	@$(BIN)/python -m tests.bench.bulk
	@$(BIN)/python -m tests.bench.detector

clean:  ## Remove the virtual environments
	rm -rf $(VENV) $(STUDIO_VENV)
