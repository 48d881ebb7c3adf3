# Two commands do everything: `make quickstart` and `make test`. Both use .venv and may be run again at any time.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
MANIFESTS := pyproject.toml kernels/pyproject.toml constraints.txt

.PHONY: help quickstart test lint compare bench clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   RPO on the bundled emoji world, report in runs/quickstart/report.html"
	@echo "make test         lint, types and the whole test suite"
	@echo "make compare      SFT, DPO and RPO from one base over three seeds: two to three hours, resumable"
	@echo "make bench        the short set of benchmarks, 20 minutes"

$(VENV)/bin/python:
	@echo "== making $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(VENV)/bin/python $(MANIFESTS)
	@echo "== installing fastpref (a few minutes the first time)"
	@$(PIP) -e kernels -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "== installing the development tools"
	@$(PIP) -e kernels -e '.[dev]'
	@touch $@

quickstart: $(VENV)/.run
	@echo "== preparing the emoji store (skipped if it is there)"
	@$(BIN)/fastpref prepare configs/emoji_rpo.yaml
	@echo "== RPO on the emoji world, then runs/quickstart/report.html"
	@$(BIN)/fastpref train configs/emoji_rpo.yaml name=quickstart overwrite=true

lint: $(VENV)/.dev
	@echo "== ruff and mypy"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

test: lint
	@echo "== tests"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadscope

compare: $(VENV)/.dev
	@$(BIN)/python benchmarks/compare.py

bench: $(VENV)/.dev
	@$(BIN)/python benchmarks/compare.py --short

clean:
	rm -rf $(VENV) runs stores .pytest_cache .mypy_cache .ruff_cache
