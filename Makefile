# `make demo` and `make test` are all a newcomer needs: each does its own set-up (tools/setup.sh).

PYTHON ?= python3
BIN := .venv/bin
# As many tests at once as there are processors, four at the most; ARGS="-n0" for one after the other in one process.
SIDE_BY_SIDE := --numprocesses auto --maxprocesses 4 --max-worker-restart 0 --dist worksteal
CHECKED := lmdbitmap tests $(wildcard benchmarks/*.py contrib/*.py demo/*.py tools/*.py)

export PYTHON
export PATH := $(PATH):/usr/sbin:/sbin
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help demo test lint types format bench fuzz torture setup setup-python clean

help: ## these lines
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

demo: setup ## track, crash, back up, restore: the whole job on a real file system, under a minute
	@$(BIN)/python demo/run.py $(ARGS)

test: setup ## every test; ARGS="-k crash" for some of them
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

lint: setup-python ## style and formatting
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { $(BIN)/ruff format --check .; exit 1; }

types: setup-python ## mypy --strict, tests included
	@$(BIN)/mypy --no-error-summary $(CHECKED)

format: setup-python ## let ruff lay out the code
	@$(BIN)/ruff format .

bench: setup ## one table of ratios against peers, and the same as JSON
	@$(BIN)/python -m benchmarks.run $(ARGS)

fuzz: setup ## coverage-guided fuzzing of all that reads bytes, an hour or two; ARGS="qcow2 --runs 100000" for less
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[fuzz]'
	@$(BIN)/python -m tests.fuzz $(ARGS)

torture: setup ## an hour of power cuts, kills, races and damage; ARGS="races --scale 0.1" for less
	@$(BIN)/python -m tests.torture $(ARGS)

setup:
	@tools/setup.sh

setup-python:
	@tools/setup.sh --python

clean: ## remove .venv and everything else that make made
	@rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find lmdbitmap tests benchmarks demo tools -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
