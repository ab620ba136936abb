# Two commands do all the set-up: `make serve` and `make test`.

HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?= mini-lcm
VENV ?= .venv
RUNS ?= runs

# The bundled Redis comes in a wheel for Linux x86-64 and Python 3.11 or 3.12, so such an interpreter is preferred.
PYTHON ?= $(shell for python in python3.12 python3.11 python3 python; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$python && break; \
	done)

BIN := $(VENV)/bin

.PHONY: help serve test lint format bench train clean

help:  ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

serve: $(VENV)/.serve  ## Run the service: HOST, PORT and MODEL can be given
	@$(BIN)/fewstep serve --host $(HOST) --port $(PORT) --model $(MODEL)

test: $(VENV)/.dev  ## Run the tests
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(VENV)/.dev  ## Check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev  ## Measure the service beside diffusers and two other servers
	$(BIN)/python -m benchmarks.service

train: $(VENV)/.dev  ## Make the bundled models anew, in many hours; an interrupted run goes on where it stopped
	$(BIN)/fewstep train mini --out $(RUNS)/mini

clean:  ## Remove the virtual environment
	rm -rf $(VENV)

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "fewstep needs Python 3.11 or 3.12: put one on PATH, or give PYTHON=/path/to/python." \
		"With another version, install Redis too (apt-get install redis-server, brew install valkey)." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.serve: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.serve
