# Two commands do everything: `make quickstart` and `make test`. Both use .venv and may be run again at any time.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
MANIFESTS := pyproject.toml kernels/pyproject.toml constraints.txt

REFERENCE := .venv-reference

.PHONY: help quickstart quickstart-spo test test-thorough test-processors lint compare bench reference-venv kernels fuzz soak gpu-bench gpu-acceptance clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   RPO on the bundled emoji world, report in runs/quickstart/report.html"
	@echo "make quickstart-spo   a step-aware preference model, then SPO with it; report in runs/quickstart-spo/report.html"
	@echo "make test         lint, types and the test suite"
	@echo "make test-thorough   the suite with what it repeats at length, marked thorough"
	@echo "make test-processors   all of that with the BLAS, convolution and vector kernels of three other processors"
	@echo "make compare      SFT, DPO and RPO from one base over three seeds: an hour and a half or more, resumable"
	@echo "make bench        the short set of benchmarks: 11 minutes"
	@echo "make reference-venv   $(REFERENCE), 6 GB, in which diffusers' training scripts run too"
	@echo "make kernels      the kernel package's proof without a GPU: gates, interpreter, lanes, mutations; 6 minutes"
	@echo "make fuzz         5000 damaged inputs in-process and 300 through the command line; half an hour"
	@echo "make soak         50 kill -9 over the phases of DPO, RPO and SPO runs, each resumed; 20 minutes, resumable"
	@echo "make gpu-bench    the training step on this machine's GPU beside its limits: 8 minutes at most; BENCH=... its options"
	@echo "make gpu-acceptance   kernels and training on this machine's GPU are right: 4 minutes at most; without one it skips"

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

quickstart-spo: $(VENV)/.run
	@echo "== preparing the emoji store (skipped if it is there)"
	@$(BIN)/fastpref prepare configs/emoji_spm.yaml
	@echo "== the step-aware preference model, into runs/quickstart-spm"
	@$(BIN)/fastpref train configs/emoji_spm.yaml name=quickstart-spm overwrite=true
	@echo "== SPO on the emoji world, then runs/quickstart-spo/report.html"
	@$(BIN)/fastpref train configs/emoji_spo.yaml name=quickstart-spo \
		scorer=runs/quickstart-spm/step_preference_model overwrite=true

lint: $(VENV)/.dev
	@echo "== ruff and mypy"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# Three workers on two cores: some tests wait for processes that they started.
# tests/conftest.py puts the modules that take longest first, which xdist would reorder by their number of tests.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist loadscope --no-loadscope-reorder

test: lint
	@echo "== tests"
	@$(PYTEST)

test-thorough: lint
	@echo "== tests, the thorough ones too"
	@$(PYTEST) -m ""

test-processors: $(VENV)/.dev
	@$(BIN)/python tests/processors.py

compare: $(VENV)/.dev
	@$(BIN)/python benchmarks/compare.py

bench: $(VENV)/.dev
	@echo "== SFT, DPO and RPO from one base, one seed"
	@$(BIN)/python benchmarks/compare.py --short
	@echo "== our step over the bare UNet passes"
	@$(BIN)/python benchmarks/limit.py --quick
	@echo "== DPO against the literal trainer"
	@$(BIN)/python benchmarks/offline_vs_reference.py --short
	@echo "== batch, records, loader, ranks"
	@$(BIN)/python benchmarks/scaling.py --short
	@echo "== rounding that a ledger leaves"
	@$(BIN)/python benchmarks/ledger_noise.py --short
	@echo "== kernels: what they move, and their times on the CPU, into runs/bench"
	@$(BIN)/python benchmarks/op_bench.py counts cpu --out runs/bench

# The public script imports torchvision, which has no build for the torch of constraints.txt: both sides run with these.
reference-venv: $(REFERENCE)/.made

$(REFERENCE)/.made: $(MANIFESTS)
	@echo "== making $(REFERENCE) (several GB)"
	@$(PYTHON) -m venv $(REFERENCE)
	@grep -vE '^(torch|triton)==' constraints.txt > $(REFERENCE)/constraints.txt
	@$(REFERENCE)/bin/python -m pip install --quiet --disable-pip-version-check -c $(REFERENCE)/constraints.txt \
		torch==2.14.1 torchvision==0.29.1 datasets wandb -e kernels -e .
	@touch $@

kernels: $(VENV)/.dev
	@echo "== every kernel in every configuration compiled: gates, and the table in kernels/README.md"
	@$(BIN)/python kernels/tests/static/gates.py
	@echo "== kernels interpreted"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal kernels/tests --ignore kernels/tests/execution
	@echo "== kernels as compiled for gfx942, lane by lane on the CPU"
	@KERNELS_ON=lanes OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal kernels/tests
	@echo "== planted faults, each of which a test must catch"
	@OMP_NUM_THREADS=1 $(BIN)/python kernels/tests/mutation/mutate.py --workers 2

fuzz: $(VENV)/.dev
	@echo "== damaged inputs, into benchmarks/results/fuzz.csv"
	@$(BIN)/python tests/fuzz/fuzz.py

soak: $(VENV)/.dev
	@echo "== runs that are killed and resumed, into benchmarks/results/soak.csv"
	@$(BIN)/python benchmarks/soak.py

gpu-bench: $(VENV)/.dev
	@$(BIN)/python benchmarks/gpu_bench.py $(BENCH)

# What has not ended within its share of the four minutes is interrupted: it reports what it has, and fails. Tests of
# several GPUs take longer: make gpu-acceptance TRAINING_SECONDS=1800
TRAINING_SECONDS ?= 130
WITHIN := timeout --signal=INT --kill-after=10

gpu-acceptance: $(VENV)/.dev
	@echo "== the kernels on a GPU against eager float64: a minute at most"
	@KERNELS_ON=gpu $(WITHIN) 60 $(BIN)/python -m pytest -q -rs --no-fold-skipped kernels/tests/gpu
	@echo "== training on a GPU, with two of them NCCL and ZeRO 1-3 too: $(TRAINING_SECONDS) s at most"
	@$(WITHIN) $(TRAINING_SECONDS) $(BIN)/python -m pytest -q -rs --no-fold-skipped -m gpu tests/gpu
	@echo "== timings in short, into benchmarks/results/op_bench.csv: 50 s at most"
	@$(WITHIN) 50 $(BIN)/python benchmarks/op_bench.py gpu --short --plot --skip-without-gpu

clean:
	rm -rf $(VENV) $(REFERENCE) runs stores .pytest_cache .mypy_cache .ruff_cache
