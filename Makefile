# Every command is `python -m pipeline <command>`; variables become options of the same name.
#   make extract TEACHER=clip-l DATA=/data/imagenet VIEWS=4 SET="extract.sampler.min_scale=0.08 distill.epochs=300"

SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.installed-bench

PRESET ?=
TEACHER ?=
WEIGHTS ?=
DATA ?=
VIEWS ?=
LAYOUT ?=
ENCODING ?=
WHITENING ?=
READ_DATA ?=
STORE ?=
FROM ?=
TO ?=
FORMAT ?=
STUDENT ?=
ONLINE ?=
GPUS ?=
LAUNCHER ?=
ACCUMULATE ?=
SEEDS ?=
EXECUTOR ?=
RAY ?=
WORK ?=
FORCE ?=
JOIN ?=
RETRY_FAILED ?=
TRIAL ?=
N ?=
SEED ?=
SET ?=
DOCS ?=

quoted = $(if $($(1)),'$(subst ','\'',$($(1)))')
option = $(if $($(2)),--$(1) $(call quoted,$(2)))
flag = $(if $(filter-out 0 no false,$($(2))),--$(1))
switch = $(if $($(2)),$(if $(filter-out 0 no false,$($(2))),--$(1),--no-$(1)))
OPTIONS = $(strip $(call option,preset,PRESET) $(call option,teacher,TEACHER) $(call option,weights,WEIGHTS) \
	$(call option,data,DATA) $(call option,views,VIEWS) $(call option,layout,LAYOUT) $(call option,encoding,ENCODING) \
	$(call option,whitening,WHITENING) $(call option,store,STORE) $(call option,student,STUDENT) $(call option,seeds,SEEDS) \
	$(call option,gpus,GPUS) $(call option,launcher,LAUNCHER) $(call option,accumulate,ACCUMULATE) \
	$(call option,executor,EXECUTOR) $(call option,ray-address,RAY) $(call option,work,WORK) $(call switch,online,ONLINE) $(call flag,force,FORCE) \
	$(call flag,join,JOIN) $(call flag,retry-failed,RETRY_FAILED) $(foreach pair,$(SET),--set $(call quoted,pair)))
PIPELINE = @$(BIN)/python -m pipeline

STAGE_COMMANDS := demo run plan precision extract distill finetune evaluate report
.PHONY: help setup test check fix bench experiments clean $(STAGE_COMMANDS) status join audit verify repair convert upload export import teachers

help: ## this list
	@echo "usage: make <command> [TEACHER=clip-l] [DATA=<folder>] [VIEWS=4] [STUDENT=vit-b] [SEEDS=3] [PRESET=...]"
	@echo "                      [WEIGHTS=<file>] [LAYOUT=zarr|wds] [ENCODING=fp16|int8|...] [STORE=<path or URL>]"
	@echo "                      [WHITENING=layer_norm|mean_std|pca|none] [ONLINE=1] [GPUS=8] [LAUNCHER=torchrun|ray]"
	@echo "                      [EXECUTOR=ray|process|inline] [RAY=<address>] [JOIN=1] [RETRY_FAILED=1]"
	@echo "                      [WORK=runs] [FORCE=1] [SET=\"name=value ...\"]"
	@echo
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## a virtual environment with everything; the only install step
	@$(if $(filter setup,$(MAKECMDGOALS)),echo "setup: $(VENV) is up to date",:)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else \
	  f"error: Python {v[0]}.{v[1]} found at {sys.executable}, expected 3.11, 3.12 or 3.13; name one: make setup PYTHON=python3.12")'
	@echo "setup: installing into $(VENV) (some minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --no-deps foolbox  # its pictures alone
	@touch $(STAMP)
	@echo "setup: done"

demo: setup ## the whole path on real photographs with a real teacher, on a laptop CPU
run: setup ## everything that is not up to date
plan: setup ## what a run would do, why and for how long; nothing is run, but for a trial of TRIAL=20 seconds (0: none)
precision: setup ## how far each precision of TEACHER is from float32 on DATA, and how fast it is
extract: setup ## fill or resume a store: the teacher's tokens of every view
distill: setup ## a student from the store; again and again from the same store
finetune: setup ## fine-tune on the labels, from scratch and from the student
evaluate: setup ## probe frozen features; compare student and teacher
report: setup ## the table and the HTML page
status: setup ## every store, student and result; how far those are that are at work, and whether they are alive
join: setup ## help to fill a store that another machine is filling: STORE=<folder>; needs nothing but that folder
audit: setup ## ask the teachers again about N=64 random records of the stores: are they what is stored?
verify: setup ## compare the stores with what was committed: READ_DATA=100%, 5%, or 0% for the structure alone
repair: setup ## make again what is damaged of the stores, and nothing else
convert: setup ## a store to another layout or encoding: FROM=<store> TO=<folder> LAYOUT=wds ENCODING=int8
upload: setup ## a finished store to an object store: FROM=<store> TO=s3://bucket/store
export: setup ## a student for timm, the hub and ONNX: FROM=runs/students/<run> TO=<folder> FORMAT=timm|onnx|both
import: setup ## a checkpoint of the paper's authors as a student: FROM=<file.pth> TO=<folder>
teachers: setup ## the teachers by name: what they see and give, what they cost, their licence

$(STAGE_COMMANDS):
	$(PIPELINE) $@ $(OPTIONS) $(if $(filter plan,$@),$(call option,trial,TRIAL))

status:
	$(PIPELINE) $@ $(call quoted,STORE) $(call option,work,WORK)

join:
	$(PIPELINE) $@ $(call quoted,STORE) $(call option,teacher,TEACHER) $(call option,executor,EXECUTOR) $(call option,ray-address,RAY)

audit:
	$(PIPELINE) $@ $(call quoted,STORE) $(call option,work,WORK) $(call option,n,N) $(call option,seed,SEED)

verify repair:
	$(PIPELINE) $@ $(call quoted,STORE) $(call option,work,WORK) $(call option,read-data,READ_DATA)

convert:
	$(PIPELINE) $@ $(call quoted,FROM) $(call quoted,TO) $(call option,layout,LAYOUT) $(call option,encoding,ENCODING) $(call option,data,DATA)

upload:
	$(PIPELINE) $@ $(call quoted,FROM) $(call quoted,TO)

export:
	$(PIPELINE) $@ $(call quoted,FROM) $(call quoted,TO) $(call option,format,FORMAT) $(call flag,force,FORCE)

import:
	$(PIPELINE) $@ $(call quoted,FROM) $(call quoted,TO) $(call option,teacher,TEACHER) $(call flag,force,FORCE)

teachers:
	$(PIPELINE) $@

test: setup ## the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

check: setup ## format, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

fix: setup ## apply format and lint fixes
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: setup $(BENCH_STAMP) ## speed and size as ratios to plain reads and writes, beside peers; DOCS=1: into docs/
	@OMP_NUM_THREADS=1 BENCH_FOLDER='$(or $(WORK),runs)/bench' BENCH_DOCS='$(DOCS)' \
	  $(BIN)/python -m pytest tests/bench/bench_store.py -o python_files='bench_*.py'

experiments: setup ## how many views, which encoding: students of a data set DATA with SEEDS=3 seeds each; DOCS=1: into docs/
	@test -n '$(DATA)' || { echo "error: say on which images: make experiments DATA=<folder of class folders>"; exit 2; }
	@OMP_NUM_THREADS=1 BENCH_FOLDER='$(or $(WORK),runs)/experiments' BENCH_DATA=$(call quoted,DATA) BENCH_SEEDS='$(SEEDS)' \
	  BENCH_DOCS='$(DOCS)' $(BIN)/python -m pytest tests/bench/bench_experiments.py -o python_files='bench_*.py'

$(BENCH_STAMP): $(STAMP)
	@echo "setup: installing what only the benchmark needs"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $(BENCH_STAMP)

clean: ## remove caches; results and the environment stay
	@rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
