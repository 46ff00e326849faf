# Everything a person needs from a clean clone: each target sets up what it wants.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= $(firstword $(shell command -v python3.11 python3))
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := exporters runtime_py toolchain tests
CORPUS ?= ../shared/data/corpus
MODEL_OUT ?= out/builtin-model
# Where pip finds torch, and torch alone: the URL of an index, such as that of PyTorch's CPU builds,
# or a folder of wheels. Empty: as pip is configured.
TORCH_INDEX ?=
TORCH_ONLY = $(if $(findstring ://,$(TORCH_INDEX)),--index-url,--no-index --find-links) "$(TORCH_INDEX)"
TORCH_ALSO = $(if $(findstring ://,$(TORCH_INDEX)),--extra-index-url,--find-links) "$(TORCH_INDEX)"
TORCH := $(shell grep -m1 '^torch==' constraints.txt)
PIP = $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt
ARM64_PACKAGES := qemu-user-static g++-aarch64-linux-gnu libc6-dev-arm64-cross g++

.PHONY: help setup venv torch debian demo test test-full format lint model constraints clean

help:  ## This list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(STAMP)  ## Make .venv with Python 3.11 and the pinned versions

$(STAMP): pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory torch
	@echo "== 2 of 2: attune and what else it needs"
	$(PIP) --editable '.[test]'
	@touch $@

# By itself, so that the place it comes from serves nothing else; without its dependencies first,
# since of two places with the same version pip does not say which it takes.
torch: venv
	@case "$(TORCH_INDEX)" in ""|*://*) ;; *) test -d "$(TORCH_INDEX)" || { \
		echo "TORCH_INDEX is neither a URL nor a folder: $(TORCH_INDEX)"; exit 1; } ;; esac
	@echo "== 1 of 2: $(TORCH)$(if $(TORCH_INDEX), from $(TORCH_INDEX))"
ifneq ($(TORCH_INDEX),)
	$(PIP) --no-deps $(TORCH_ONLY) "$(TORCH)"
endif
	$(PIP) $(if $(TORCH_INDEX),$(TORCH_ALSO)) "$(TORCH)"  # and what it depends on

venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
		echo "attune needs Python 3.11, found: $(or $(PYTHON),none). Give it with make PYTHON=..."; \
		exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
		echo "Python's venv is missing: run 'make debian' as root."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)

debian:  ## As root: Python's venv, and QEMU and compilers for running ARM64 programs here
	@if [ "$$(id -u)" = 0 ]; then \
		apt-get update -qq && \
		apt-get install --yes --no-install-recommends python3-venv $(ARM64_PACKAGES); \
	else \
		echo "run as root: apt-get install python3-venv $(ARM64_PACKAGES)"; \
	fi

demo: $(STAMP)  ## Export the built-in model, check the bundle, let it answer
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/attune demo

test: $(STAMP)  ## The tests that need nothing but this repository
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m 'not full'

test-full: $(STAMP)  ## All tests; those without their data skip and say so
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

format: $(STAMP)  ## Rewrite the code in the house's format
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

lint: $(STAMP)  ## Format, ruff's rules and types, without changing a file
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

model: $(STAMP)  ## Train the built-in model again (CORPUS=..., MODEL_OUT=...); docs/builtin-model.md
	HF_HUB_OFFLINE=1 $(BIN)/python -m toolchain.compile.builtin.recipe --corpus $(CORPUS) --out $(MODEL_OUT)

constraints: $(STAMP)  ## Write constraints.txt anew from what .venv holds
	{ sed -n '/^#/p' constraints.txt; \
		$(BIN)/pip freeze --exclude-editable | sed -n 's/^\([^ #@]*==[^+ ]*\).*/\1/p'; } > constraints.new
	mv constraints.new constraints.txt

clean:  ## Remove caches and build output; .venv stays
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
