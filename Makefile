# What a newcomer needs: `make mnist` and `make test`. Every target that needs the environment makes .venv itself.
PYTHON ?= python3
VENV ?= .venv
PRESET ?= default
OUT ?=
DATA ?=
ARGS ?=

BIN := $(VENV)/bin
# What running, testing and building the site need, installed one on top of the other.
RUN := $(VENV)/.run
DEV := $(VENV)/.dev
DOCS := $(VENV)/.docs
# Modules are compiled as they are imported: most of them never are.
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps
# The suite compiles more than it computes, so it runs in WORKERS processes, each with one BLAS thread.
WORKERS ?= 2
# Rooms to test, such as ROOM="theory records"; all where it is empty.
ROOM ?=
PYTEST = OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(addprefix tests/,$(ROOM))
# The quick suite compiles without the passes of LLVM, which cost most and gain nothing on small arrays; test-all compiles as
# a run does, checks types and shapes at every call, and tries more examples of every property.
QUICK = XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true $$XLA_FLAGS"
WHOLE = --jaxtyping-packages=lplr_jax,beartype.beartype --hypothesis-profile=thorough -m ''
OPTIONS = --preset $(PRESET) $(if $(OUT),--out "$(OUT)") $(if $(DATA),--data "$(DATA)") $(ARGS)

# A newer Python than that of .venv, for test-latest; the newest that runs.
PYTHON_LATEST ?= $(shell for v in 3.14 3.13 3.12; do for p in python$$v "$$HOME"/.pyenv/versions/$$v*/bin/python; do \
  "$$p" -c '' 2>/dev/null && echo "$$p" && exit; done; done)
VENV_LATEST ?= .venv-latest

.DEFAULT_GOAL := help
.PHONY: help setup mnist ablation boundary width initialisation edge steps noise cifar transformer reproduction bench test test-all test-worlds test-latest check docs lock clean

help:  ## show this list
	@echo 'lplr-jax: which hypotheses of local Polyak-Lojasiewicz theory hold on a training run'
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22
	@echo '  variables: PRESET=smoke|default|paper|paper-like  OUT=folder  DATA=file-or-folder  ARGS="--width 256 ..."'
	@echo '  of tests:  ROOM="theory records" (folders under tests/)  WORKERS=2'

setup: $(DEV)  ## make .venv from locks/: what running and testing need

$(RUN): locks/run.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("lplr-jax needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	@echo 'installing what running needs into $(VENV) (about a minute) ...'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -r locks/run.lock
	@$(PIP) --no-build-isolation -e .
	@touch $@

$(DEV): $(RUN) locks/dev.lock
	@echo 'installing what the tests need into $(VENV) (about a minute) ...'
	@$(PIP) -r locks/dev.lock
	@touch $@

$(DOCS): $(RUN) locks/docs.lock
	@echo 'installing what the site needs into $(VENV) (about a minute) ...'
	@$(PIP) -r locks/docs.lock
	@touch $@

mnist: $(RUN)  ## digits 3 against 8: train, measure every latent variable, draw figures/mnist.png
	@$(BIN)/lplr mnist $(OPTIONS)

ablation: $(RUN)  ## widths 128 to 1024 at one step size: predicted from 2/β, then watched
	@$(BIN)/lplr ablation $(OPTIONS)

boundary: $(RUN)  ## the largest step size that descends, for every width, against 2/β
	@$(BIN)/lplr boundary $(OPTIONS)

width: $(RUN)  ## λ_min of the kernel at initialisation against width, proved, and where it stops growing
	@$(BIN)/lplr width $(OPTIONS)

initialisation: $(RUN)  ## three initialisations side by side, and the figures of the paper's earlier version
	@$(BIN)/lplr initialisation $(OPTIONS)

edge: $(RUN)  ## edge of stability as published: sharpness rises to 2/η on CIFAR-10, and hovers (needs DATA=)
	@$(BIN)/lplr edge $(OPTIONS)

steps: $(RUN)  ## step rules against width: which keep drift, kernel and PL ratio stable without a tuned η
	@$(BIN)/lplr steps $(OPTIONS)

noise: $(RUN)  ## mini-batches of 10 to 1000, five seeds: a noise ball, or none where the network interpolates
	@$(BIN)/lplr noise $(OPTIONS)

cifar: $(RUN)  ## CIFAR-10, five classes: residual network, SGD, three seeds, and a subset's kernel (needs DATA=)
	@$(BIN)/lplr cifar $(OPTIONS)

transformer: $(RUN)  ## a causal transformer on text, by SGD and Adam: its kernel, and where the gradient lies in it
	@$(BIN)/lplr transformer $(OPTIONS)

reproduction: $(RUN)  ## the paper's statements one by one: reproduced or not, and in which set-ups (hours; needs DATA=)
	@$(BIN)/lplr reproduce $(if $(filter smoke,$(PRESET)),--preset smoke) $(if $(OUT),--out "$(OUT)") $(if $(DATA),--data "$(DATA)") $(ARGS)

bench: $(DEV)  ## time the kernel engine against its peers; tables to benchmarks/results/ (minutes to hours)
	@$(BIN)/python benchmarks/ntk.py $(ARGS)

test: $(DEV)  ## the quick test suite, or that of some rooms: make test ROOM=theory
	@$(QUICK) $(PYTEST)

test-all: $(DEV)  ## the whole test suite, slow tests and checks of types included, and test-worlds
	@$(PYTEST) $(WHOLE)
	@$(MAKE) --no-print-directory test-worlds

# A run of seconds, written to a folder that goes with it.
SMOKE = mnist --preset smoke --out "$$folder" > "$$folder.log" || { cat "$$folder.log"; exit 1; }

test-worlds: $(DEV)  ## the quick suite in float64 and on 8 simulated devices; runs under python -O and JAX_DEBUG_NANS
	@echo 'JAX_ENABLE_X64=1'
	@JAX_ENABLE_X64=1 $(QUICK) $(PYTEST)
	@echo '8 devices'
	@XLA_FLAGS='--xla_force_host_platform_device_count=8'; export XLA_FLAGS; $(QUICK) $(PYTEST)
	@set -e; work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; \
	echo 'python -O'; folder="$$work/O"; $(BIN)/python -O -m lplr_jax $(SMOKE); \
	echo 'JAX_DEBUG_NANS=1'; folder="$$work/nans"; JAX_DEBUG_NANS=1 $(BIN)/python -m lplr_jax $(SMOKE)

test-latest:  ## the quick suite on a newer Python with the newest JAX it gets
	@set -e; if [ -z "$(PYTHON_LATEST)" ]; then echo 'test-latest: skipped, no Python newer than 3.11 found (name one: make test-latest PYTHON_LATEST=...)'; exit 0; fi; \
	echo "test-latest: $$($(PYTHON_LATEST) --version)"; \
	$(PYTHON_LATEST) -m venv $(VENV_LATEST); \
	$(VENV_LATEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r locks/dev.lock; \
	$(VENV_LATEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade jax jaxlib flax optax; \
	$(VENV_LATEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .; \
	$(VENV_LATEST)/bin/python -m pip list 2>/dev/null | grep -E '^(jax|jaxlib|flax|optax) '; \
	$(QUICK) $(subst $(BIN),$(VENV_LATEST)/bin,$(PYTEST))

check: $(DEV)  ## lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

docs: $(DOCS)  ## build the site: docs/_build/html/index.html
	@XLA_FLAGS="--xla_llvm_disable_expensive_passes=true $$XLA_FLAGS" OPENBLAS_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo 'site     docs/_build/html/index.html'

# One resolution; each lock is the part of it that its own list needs.
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --override locks/overrides.txt \
  --no-header --no-annotate --no-emit-package lplr-jax

lock: $(DEV)  ## make the locks of locks/ anew
	@set -e; work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; \
	$(COMPILE) --upgrade -o "$$work/all.lock" locks/dev.in locks/docs.in; \
	for part in run dev docs; do $(COMPILE) --upgrade -c "$$work/all.lock" -o locks/$$part.lock locks/$$part.in; done

clean:  ## remove environments, caches and build products; runs/ and figures/ stay
	rm -rf $(VENV) $(VENV_LATEST) build dist docs/_build docs/jupyter_execute .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
