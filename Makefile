# Needs CPython >= 3.11 with venv and pip; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
FLAGS ?=
WORKERS ?= 2

.PHONY: demo test test-long parity peers lint clean

demo: .venv/installed-report ## Trains a U-Net, attacks it and writes runs/demo/report.html
	$(BIN)/python -m jaxadv attack configs/demo.py $(FLAGS)

test: .venv/installed-dev lint ## Lint, format, types, tests, doctests, coverage
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --cov --cov-report=term

test-long: .venv/installed-dev ## Kills runs at twenty random moments, large networks
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m long tests

parity: .venv/installed-dev .venv/installed-parity ## Compares with networks of PyTorch
	$(BIN)/python -m pytest tests/test_convert.py tests/test_frameworks.py

peers: .venv-peers/installed ## Measures attacks of other libraries beside ours
	.venv-peers/bin/python benchmarks/peers.py $(FLAGS)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One environment, installed anew whenever the package's requirements change.
.venv/installed-%: setup.cfg pyproject.toml
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 \
	  || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

# Peers have an environment of their own: `make test` does without them.
.venv-peers/installed: setup.cfg pyproject.toml
	@test -x .venv-peers/bin/python && .venv-peers/bin/python -m pip --version \
	  >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv-peers
	.venv-peers/bin/python -m pip install --quiet --editable '.[peers]'
	.venv-peers/bin/python -m pip install --quiet --no-deps 'adv-lib>=0.2.8,<1'
	@touch $@

clean:
	rm -rf .venv .venv-peers .coverage .mypy_cache .pytest_cache .ruff_cache
