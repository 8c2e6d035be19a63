# The few commands that a contributor needs. Each sets up .venv first where it has to; `make help` lists them.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
# Touched when the environment is complete; older than a source of the extension, it is made again.
INSTALLED := $(VENV)/.sft-fast-installed
SOURCES := pyproject.toml Cargo.toml Cargo.lock rust-toolchain.toml scripts/install \
	$(shell find rust -name '*.rs' -o -name 'Cargo.toml' | grep -v -e /target/ -e /fuzz/)

.PHONY: help
help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

.PHONY: setup
setup: $(INSTALLED)  ## create .venv with every dependency and a release build of the extension

$(INSTALLED): $(SOURCES)
	./scripts/install
	@touch $@

.PHONY: build
build: $(INSTALLED)  ## build a wheel into dist/
	rm -f dist/*.whl
	$(BIN)/maturin build --release --locked --out dist

.PHONY: test-wheel
test-wheel: build  ## install the wheel into each Python from 3.10 to 3.13 that is here, and work there
	$(BIN)/python scripts/test_wheel.py dist/*.whl

.PHONY: demo
demo: $(INSTALLED)  ## fine-tune a small real model on this machine, and show what it learned
	$(BIN)/python examples/demo.py

.PHONY: test
test: $(INSTALLED)  ## run all tests, Rust and Python
	cargo test --locked --workspace
	$(BIN)/pytest

.PHONY: test-browser
test-browser: $(INSTALLED)  ## the tests that open pages in Chromium, which has to be there: Debian's package chromium
	SFT_FAST_REQUIRE_CHROMIUM=1 $(BIN)/pytest -m browser

.PHONY: test-nodes
test-nodes: $(INSTALLED)  ## machines in network namespaces, one killed, one cut off: needs root
	SFT_FAST_REQUIRE_NODES=1 $(BIN)/pytest -m nodes

.PHONY: lint
lint: $(INSTALLED)  ## check formatting, lints and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings

.PHONY: format
format: $(INSTALLED)  ## format everything and apply safe fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	cargo fmt --all

.PHONY: docs
docs: $(INSTALLED)  ## write the generated parts of docs/, and build the site into build/site
	$(BIN)/python docs/generate_configuration.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.PHONY: bench
bench: $(INSTALLED)  ## measure beside what others use, and write docs/benchmarks.md; ARGS="--help" for more
	$(BIN)/python benches/run.py $(ARGS)

.PHONY: gpu-check
gpu-check: $(INSTALLED)  ## check on this machine's GPU what the tests cannot, and measure; status 3 without a GPU
	$(BIN)/python scripts/gpu_check.py $(ARGS)

.PHONY: parity
parity: $(INSTALLED)  ## compare NUM_EXAMPLES (10000) random conversations with transformers, over all templates at hand
	SFT_FAST_NUM_EXAMPLES=$(or $(NUM_EXAMPLES),10000) $(BIN)/pytest tests/test_template_parity.py -k random

.PHONY: fuzz
fuzz:  ## fuzz the readers and the tokenizer engine, SECONDS_EACH (60) for each of four targets
	rust/fuzz/run $(or $(SECONDS_EACH),60)

.PHONY: clean
clean:  ## remove what builds and runs leave behind; .venv stays
	cargo clean
	rm -rf build dist output .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -type d -prune -exec rm -rf {} +
