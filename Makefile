# Everything runs in .venv, which `make setup` builds from requirements.lock. Nothing else has to be prepared.
PYTHON ?= python3
BIN := .venv/bin
# Compiled bytecode halves the start-up time of every Ray worker. Some shells switch it off.
export PYTHONDONTWRITEBYTECODE =

.PHONY: setup quickstart test test-fast test-slow test-gpu gpu lint format benchmark faults ablation clean

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

# Some tests of every room, without starting Ray: under a minute on two free cores.
test-fast: setup
	$(BIN)/python -m pytest -q -m "not gpu and not slow" @tests/fast.txt

# Two test files at a time: the tests that start Ray wait more than they compute.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu and not slow"

test-slow: setup
	$(BIN)/python -m pytest -m slow

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

# Less than ten minutes of one GPU; docs/gpu.json. Without network and make: python jobs/benchmark.py gpu
gpu: setup
	$(BIN)/python jobs/benchmark.py gpu

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy i3cl
	$(BIN)/mypy --explicit-package-bases cluster

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: setup
	$(BIN)/python jobs/benchmark.py step

# Starts a small cluster on this machine and breaks training and labelling in many ways; as root, also the network.
faults: setup
	$(BIN)/python cluster/faults.py

ablation: setup
	$(BIN)/python jobs/study.py --config configs/study/ablation.yaml $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info
