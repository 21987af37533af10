# containerd-shim-grit. `make help` lists what there is.

# The interpreter itself: a version manager's wrapper, often first in PATH, costs its users
# 70 ms at every start of the shim.
PYTHON     := $(shell python3 -c 'import os, sys; print(os.path.realpath(sys._base_executable))')
PREFIX     ?= /usr/local
SYSCONFDIR ?= /etc
VENV       ?= .venv
PY         := $(VENV)/bin/python

.PHONY: help venv setup package table nodes lint test gpu-kit gpu-kube-kit gpu-test demo bench soak matrix fuzz install uninstall proto

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

install:  ## put the shim on this machine, under PREFIX (/usr/local)
	$(PYTHON) packaging/install.py install --prefix $(PREFIX) --sysconfdir $(SYSCONFDIR)

uninstall:  ## take it away again
	$(PYTHON) packaging/install.py uninstall --prefix $(PREFIX) --sysconfdir $(SYSCONFDIR)

package:  ## the Debian package and the tree for other systems, into dist/
	$(PYTHON) packaging/package.py dist

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

# Files go to one of three processes each, in the order of tests/conftest.py; what most tests do
# most of the time is wait.
JOBS ?= 3
test: lint nodes  ## all of it: lint, unit tests, end to end on Debian 12, 13 and forky
	$(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder || { \
	  echo "once more, alone, what failed above: a busy machine is not to decide"; \
	  $(PY) -m pytest --last-failed --last-failed-no-failures none; }

table: nodes  ## the table of clients in docs/compatibility.md, from the outcomes of its tests
	$(PY) -m pytest --write-table

nodes: setup venv  ## the Debian systems that tests and demo run on, kept in /var/cache/grit-tests
	@$(PY) -m tests.nodes

# What a machine with a GPU lacks, for the Python it will use there: docs/gpu.md.
GPU_PYTHON ?= 3.12
gpu-kit: nodes  ## pack what a machine with a GPU lacks into .gpu/
	$(PY) -m tests.gpu.pack .gpu $(GPU_PYTHON)

gpu-kube-kit: nodes  ## pack a control plane and the agent's needs for it
	$(PY) -m tests.gpu.pack_kube .gpu $(GPU_PYTHON)

# In this order: what may leave a process stuck in the driver comes last.
gpu-test:  ## on a machine with an NVIDIA GPU and PyTorch, with the kit: the tests on it (root)
	@test -e /dev/nvidiactl || { echo "no NVIDIA GPU here: /dev/nvidiactl is missing"; exit 1; }
	@test -e .gpu/kit.tar.xz || { echo "no .gpu/kit.tar.xz: make gpu-kit, elsewhere if need be"; exit 1; }
	python3 -m pytest -o timeout_method=signal tests/gpu/test_real_checkpoint.py \
	  tests/gpu/test_real_workloads.py tests/gpu/test_real_several.py tests/gpu/test_real_lane.py \
	  tests/gpu/test_real_faults.py

demo: nodes  ## a GPU container checkpointed and restored before your eyes
	$(PY) -m tests.demo

bench: nodes  ## beside the stock shim and runc, some ten minutes; writes into docs/
	$(PY) -m tests.bench

matrix: nodes  ## every fault in every phase, some 13 minutes; writes docs/fault-matrix.md
	$(PY) -m pytest tests/matrix --write-matrix

FUZZ_SECONDS ?= 180
fuzz: venv  ## what others hand the shim, mutated under coverage: FUZZ_SECONDS=
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[fuzz]'
	$(PY) -m tests.fuzz --seconds $(FUZZ_SECONDS)

SOAK_ROUNDS ?= 200
SOAK_SECONDS ?= 0
soak: nodes  ## containers checkpointed, restored and broken at random: SOAK_ROUNDS=, SOAK_SECONDS=
	$(PY) -m tests.soak --rounds $(SOAK_ROUNDS) --seconds $(SOAK_SECONDS) --json soak.json

proto: venv  ## check that the shim's messages are in step with proto/
	$(PY) -m pytest tests/proto_in_step
