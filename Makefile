# containerd-shim-grit. `make help` lists what there is.

# The interpreter itself: a version manager's wrapper, often first in PATH, costs its users
# 70 ms at every start of the shim.
PYTHON     := $(shell python3 -c 'import os, sys; print(os.path.realpath(sys._base_executable))')
PREFIX     ?= /usr/local
SYSCONFDIR ?= /etc
VENV       ?= .venv
PY         := $(VENV)/bin/python

.PHONY: help venv setup nodes lint test demo bench install uninstall proto

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

install:  ## put the shim on this machine, under PREFIX (/usr/local)
	$(PYTHON) packaging/install.py install --prefix $(PREFIX) --sysconfdir $(SYSCONFDIR)

uninstall:  ## take it away again
	$(PYTHON) packaging/install.py uninstall --prefix $(PREFIX) --sysconfdir $(SYSCONFDIR)

setup:  ## the Debian packages that building and testing need (root)
	@tests/nodes/setup.sh $(PYTHON)

venv: $(VENV)/.ready  ## the Python environment for development

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || tests/nodes/setup.sh $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

lint: venv  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test: lint nodes  ## all of it: lint, unit tests, then end to end on Debian 12, 13 and forky
	$(PY) -m pytest

nodes: setup venv  ## the Debian systems that tests and demo run on, kept in /var/cache/grit-tests
	@$(PY) -m tests.nodes

demo: nodes  ## a GPU container checkpointed and restored before your eyes
	$(PY) -m tests.demo

bench: nodes  ## start-up, latency and memory beside the stock shim
	$(PY) -m tests.bench

proto: venv  ## check that the shim's messages are in step with proto/
	$(PY) -m pytest tests/proto_in_step
