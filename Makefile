# Every target does its own set-up, from a fresh clone on.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup run test check bench mutants format clean

help:  ## Say what there is to make
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

setup: $(STAMP)  ## Make .venv with qkv and all that its tests need, in pinned versions

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "qkv needs Python 3.11 or newer; run make PYTHON=python3.12, say")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

run: setup  ## Train a Transformer on Shakespeare and read what it writes (a few minutes)
	$(BIN)/qkv train shakespeare

test: setup  ## Run the tests: with every signature checked, then what is compiled without that
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --ignore=tests/compiled --jaxtyping-packages=qkv,typecheck.checked
	$(BIN)/python -m pytest -q tests/compiled

check: setup  ## Lint, types, floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: setup  ## Compare with other libraries, in one run (about two hours; installs them)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt litgpt vit-pytorch
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/short_rows.py
	for peer in huggingface nano litgpt x_transformers; do $(BIN)/python benchmarks/train_step.py --peers qkv $$peer || exit 1; done
	$(BIN)/python benchmarks/wall_time.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/seq2seq_step.py
	$(BIN)/python benchmarks/sentences.py
	$(BIN)/python benchmarks/vision.py
	$(BIN)/python benchmarks/vision.py --dtype bfloat16
	$(BIN)/python benchmarks/vision.py --mix --n 16

mutants: setup  ## Plant faults, one at a time, and see the tests find each
	$(BIN)/python tests/mutants.py

format: setup  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove the virtual environment and caches
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
