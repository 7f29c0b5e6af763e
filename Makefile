# Everything runs in .venv, which the first target that needs it creates. `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export RAY_USAGE_STATS_ENABLED := 0

# The graph starts some twenty Python processes: without compiled bytecode their imports take minutes, not seconds.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup repro figures test suite check format ui s3 lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.done ## Create .venv with the pinned packages

repro: setup ## Run the graph: digits in, drawn digits, FID, report and an MLflow run out
	dvc repro
	@echo "Look at out/report.html, or compare runs with: make ui"

figures: setup ## Draw the papers' figures and the frontier of samplers, tell bits; runs what they need of the graph
	dvc repro $(addprefix sweeps/dvc.yaml:,figures strips frontier likelihood)

test: check suite ## Run every check: linters, types, import contracts, tests

suite: setup
	pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

check: setup ## Run the checks that need no run: ruff, mypy, import-linter
	ruff check .
	ruff format --check .
	mypy
	lint-imports

format: setup ## Let ruff rewrite the sources
	ruff check --fix .
	ruff format .

ui: setup ## Open the MLflow UI on the runs made here, http://127.0.0.1:5000
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow server --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000 --workers 1

s3: setup ## Serve an S3 object store and MLflow on this machine, data in s3data/; see docs/storage.md
	python -m pipeline.s3

lock: setup ## Write requirements.lock anew from pyproject.toml
	uv pip compile --quiet --upgrade --universal --python-version 3.11 --all-extras --no-emit-index-url --no-annotate \
		--custom-compile-command "make lock" --output-file requirements.lock pyproject.toml

clean: ## Delete what runs leave behind: out/, runs/ (checkpoints, finished shards, what waits for MLflow); keeps MLflow's runs
	rm -rf out runs

.venv/.done: requirements.lock pyproject.toml pipeline/collect_seldom.pth
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	cp pipeline/collect_seldom.pth .venv/lib/python3*/site-packages/
	touch $@
