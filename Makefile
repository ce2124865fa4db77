# Everything runs in .venv, which `make setup` builds from requirements.lock; no other preparation is needed.
PYTHON ?= python3
BIN := .venv/bin
# Compiled bytecode halves the start of every Ray worker; some shells switch it off.
export PYTHONDONTWRITEBYTECODE =

.PHONY: setup quickstart test test-slow test-gpu lint benchmark faults ablation clean

setup: .venv/ready

.venv/ready: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	VIRTUAL_ENV=.venv $(BIN)/uv pip install --quiet --compile-bytecode -r requirements.lock
	VIRTUAL_ENV=.venv $(BIN)/uv pip install --quiet --no-deps -e .
	touch $@

quickstart: setup
	$(BIN)/python jobs/selftrain.py --config configs/quickstart.yaml $(ARGS)

test: setup
	$(BIN)/python -m pytest -m "not gpu and not slow"

test-slow: setup
	$(BIN)/python -m pytest -m slow

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy i3cl
	$(BIN)/mypy --explicit-package-bases cluster

benchmark: setup
	$(BIN)/python jobs/benchmark.py step

# Breaks training and labelling on a small cluster on this machine; as root also its network.
faults: setup
	$(BIN)/python cluster/faults.py

ablation: setup
	$(BIN)/python jobs/ablation.py --config configs/ablation/plain.yaml

clean:
	rm -rf .venv build dist *.egg-info
