# Every target sets up a virtual environment by itself; the second call finds it ready.
#
#   make demo                  train 32 members on real data (under two minutes), see what comes out
#   make test                  the tests; with another torch, in an environment of its own: make test TORCH=2.14.1
#   make check                 everything that .ci/run checks
#   make help                  all targets

PYTHON ?= python3
TORCH ?=
ARGS ?=
ROW ?=

VENV  := .venv$(if $(TORCH),-$(TORCH))
BIN   := $(VENV)/bin
READY := $(VENV)/.ready
BENCH := $(VENV)/.ready-bench
THIRD := .venv-third-party

# Small tensors run fastest on one thread; the tests use the cores by running side by side.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
SIDE_BY_SIDE := -n auto --maxprocesses=8 --dist=worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test lint format types doctest snippets imports check check-long check-capture check-plans check-fuzz coverage check-modules \
        check-operations check-mutations check-torch-tests bench bench-first bench-overhead readme clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | \
	    awk -F'|' '{ printf "%-24s %s\n", $$1, $$2 }'

# -- the two commands

demo: $(READY) ## train 32 members on scikit-learn's digits as one stack; ARGS="--help" shows the options
	@$(PYTHON) tools/preflight.py compiler || true
	@$(BIN)/python examples/digits.py $(ARGS)

test: $(READY) ## run the tests, side by side on all cores; ARGS="-k vmap" picks some
	@$(PYTHON) tools/preflight.py compiler
	$(ONE_THREAD) $(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not long" $(ARGS)

# -- the checks of .ci/run

check: lint imports types doctest snippets check-long test ## all of them

lint: $(READY) ## ruff: faults and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

imports: $(READY) ## the imports form the DAG of docs/design.md
	$(BIN)/lint-imports

types: $(READY) ## pyright: no errors, and every public name annotated
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python tools/public_types.py

doctest: $(READY) ## the examples in the docstrings
	$(ONE_THREAD) $(BIN)/python -m pytest --doctest-modules src/memberwise

snippets: $(READY) ## the examples in README.md and docs/
	$(ONE_THREAD) $(BIN)/python -m pytest tests/journeys/test_snippets.py

check-long: $(READY) ## tests that take seconds each, of other processes or of recordings; two minutes
	@$(PYTHON) tools/preflight.py compiler
	$(ONE_THREAD) $(BIN)/python -m pytest $(SIDE_BY_SIDE) -m long $(ARGS)

check-mutations: $(READY) ## break each rule in turn, and demand that the tests notice
	$(ONE_THREAD) $(BIN)/python tools/mutations.py $(ARGS)

check-capture: $(READY) ## captured steps, compiled, against eager ones over 50 steps; minutes of compiling
	$(ONE_THREAD) $(BIN)/python -m pytest $(SIDE_BY_SIDE) tests/parity/check_capture.py $(ARGS)

PLANS := graph one-by-one two-by-two lanes ours
CAPTURED := tests/parity/test_capture*.py tests/parity/test_optim_capture.py tests/properties/test_capture.py

check-plans: $(READY) ## the tests of captured steps, with each way to run them forced; six minutes
	@for plan in $(PLANS); do echo "MEMBERWISE_PLAN=$$plan"; MEMBERWISE_PLAN=$$plan $(ONE_THREAD) $(BIN)/python -m pytest \
		$(SIDE_BY_SIDE) -m "not chooses" $(CAPTURED) || exit 1; done

check-fuzz: $(READY) ## random programs and histories, stack against loop; ARGS="--programs 100000 --sequences 5000" records
	$(ONE_THREAD) $(BIN)/python -m survey.fuzz.run $(ARGS)

check-torch-tests: $(READY) ## PyTorch's own tests, pointed at Memberwise; PYTORCH= is a checkout of pytorch; ten minutes
	@test -n "$(PYTORCH)" || { echo "Say where the tests are: make check-torch-tests PYTORCH=<a checkout of pytorch>"; exit 1; }
	$(ONE_THREAD) $(BIN)/python -m survey.torch_tests $(PYTORCH) $(ARGS)

check-modules: $(READY) ## every module of torch.nn as a stack, against its members and torch.func; twenty minutes
	$(ONE_THREAD) $(BIN)/python -m survey.modules $(ARGS)

check-operations: $(READY) ## every operation of torch's own table, likewise; an hour (ARGS=--resume: goes on)
	$(ONE_THREAD) $(BIN)/python -m survey.operations $(ARGS)

coverage: $(READY) ## both sweeps, over all modules and operations of torch, and docs/coverage.md from them; an hour
	$(ONE_THREAD) $(BIN)/python -m survey.modules
	$(ONE_THREAD) $(BIN)/python -m survey.operations
	$(BIN)/python -m survey.coverage_page

.PHONY: check-third-party
check-third-party: $(THIRD)/.ready ## architectures of transformers, timm, PyG and others as stacks; half an hour, 6 GB
	$(ONE_THREAD) HF_HUB_OFFLINE=1 $(THIRD)/bin/python -m survey.third_party.run $(ARGS)

# -- figures

bench: $(BENCH) ## every workload against every rival, hours; ROW=W3 measures one, ARGS=--resume goes on
	$(BIN)/python -m benchmarks.workloads $(ROW) $(ARGS)

bench-first: $(BENCH) ## the table of small models in README.md, an hour
	$(BIN)/python -m benchmarks.run $(ARGS)

bench-overhead: $(BENCH) ## microseconds an operation
	$(BIN)/python -m benchmarks.overhead $(ARGS)

readme: $(READY) ## put the figures of benchmarks/results and demo-output into README.md
	$(BIN)/python tools/figures.py

# -- the virtual environment

$(READY): pyproject.toml constraints.txt tools/preflight.py
	@command -v $(PYTHON) >/dev/null || { echo "No $(PYTHON) found. Install Python 3.11 or newer, \
	or name one: make PYTHON=/path/to/python3 ..."; exit 1; }
	@$(PYTHON) tools/preflight.py
	@echo "Setting up $(VENV); this happens once."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@sed 's/^torch==.*/torch==$(or $(TORCH),$(shell sed -n 's/^torch==//p' constraints.txt))/' constraints.txt \
	    > $(VENV)/constraints.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --constraint $(VENV)/constraints.txt --editable '.[dev,demo]'
	@touch $@

$(BENCH): $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --constraint $(VENV)/constraints.txt --editable '.[bench]'
	@touch $@

$(THIRD)/.ready: survey/third_party/requirements.txt survey/third_party/constraints.txt
	@echo "Setting up $(THIRD); this happens once, and takes 6 GB."
	@test -x $(THIRD)/bin/python || $(PYTHON) -m venv $(THIRD)
	@$(THIRD)/bin/python -m pip install --quiet --disable-pip-version-check \
	    --constraint survey/third_party/constraints.txt --requirement survey/third_party/requirements.txt
	@$(THIRD)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

clean: ## remove what the targets made
	rm -rf .venv .venv-* .pytest_cache .ruff_cache .hypothesis .import_linter_cache demo-output
