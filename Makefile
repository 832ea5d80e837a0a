# Set-up, tests and the quickstart; everything lives in .venv beside this file and needs no root.
PYTHON ?= python3
PYTEST ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OFFLINE := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

.PHONY: install quickstart test test-slow test-reliability check bench constraints screenshot clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; make PYTHON=… names another one" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -c 'import torchvision' 2>/dev/null || { \
		echo "torch $$($(BIN)/python -c 'import torch; print(torch.__version__)') and torchvision do not match: installing the pair of constraints.txt again"; \
		$(BIN)/python -m pip install --disable-pip-version-check --quiet --force-reinstall --no-deps $$(grep -E '^torch(vision)?==' constraints.txt); }
	@$(BIN)/python -c 'import torchvision' || { echo "torch and torchvision still do not match; remove $(VENV) and install a matching pair"; exit 1; }
	@touch $@

quickstart: install
	$(BIN)/orchestrate sweep sweeps/quickstart.yaml

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: check
	$(OFFLINE) $(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: install
	$(OFFLINE) $(BIN)/python -m pytest -m "slow and not gpu" $(PYTEST)

# The goals of reliability one by one: kills at every point, outages, torn files, damage, hostile input; half an hour alone.
test-reliability: install
	$(OFFLINE) $(BIN)/python -m pytest -m "slow and not gpu" tests/reliability

bench: install
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[bench]'
	$(OFFLINE) $(BIN)/python -m benchmarks

screenshot: install
	$(BIN)/python -m docs.screenshot_report runs/quickstart/report.html docs/quickstart_report.png

constraints: install
	{ head -1 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable; } > constraints.new && mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
