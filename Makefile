# Every command makes the environment first, if it is missing or pyproject.toml has changed.

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin

# Where the quickstart puts its data, run and export; and keys of configs/quickstart.yaml to set differently.
OUT ?= .
OVERRIDES ?=
RANKS ?= 2
# The quickstart and the tests are made for CPU cores. DS_ACCELERATOR=cuda trains on GPUs instead.
export DS_ACCELERATOR ?= cpu
export PATH := $(CURDIR)/$(BIN):$(PATH)

DATA := $(OUT)/data/quickstart
RUN := $(OUT)/runs/quickstart
EXPORT := $(OUT)/exports/quickstart

.PHONY: quickstart test lint format bench clean

quickstart: $(READY)
	@echo "── 1/6  the standard library's text → tokenizer → shards"
	python -m data_pipeline.prepare --source stdlib --tokenizer train:sentencepiece:4096 --out $(DATA)
	@echo "── 2/6  pretrain on $(RANKS) ranks under ZeRO-3"
	deepspeed --log_level error --num_accelerators $(RANKS) --module pretrain.train \
	  --config configs/quickstart.yaml data.path=$(DATA) run.dir=$(OUT)/runs $(OVERRIDES)
	@echo "── 3/6  export a LlamaForCausalLM"
	python -m pretrain.export $(RUN) --out $(EXPORT) --overwrite
	@echo "── 4/6  evaluate"
	python -m pretrain.evaluate $(EXPORT) --suite perplexity,speculative --out $(RUN)/evaluation
	@echo "── 5/6  generate, with the latent dynamics model drafting"
	python -m pretrain.generate $(EXPORT) --prompt 'def read(self, size=-1):' --max-new-tokens 96 --stats
	@echo "── 6/6  report"
	python -m pretrain.report $(RUN) --out $(RUN)/report.html

test: $(READY)
	python -m pytest

lint: $(READY)
	ruff check .
	ruff format --check .
	mypy
	shellcheck --external-sources slurm/*.sh

format: $(READY)
	ruff check --fix .
	ruff format .

bench: $(READY)
	python -m benchmarks.loss
	python -m benchmarks.step
	python -m benchmarks.data

clean:
	rm -rf $(VENV) .cache build *.egg-info

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e ".[dev]"
	touch $(READY)
