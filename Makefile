# Every target works inside .venv, which `setup` creates. Variables are given on the command line: make demo NPROC=1
#
#   PYTHON       interpreter to create .venv with (3.11 to 3.13)
#   STACK        cpu or cuda; found by asking nvidia-smi
#   TORCH_INDEX  package index for PyTorch alone, such as the one that PyTorch publishes for its CPU builds; without it
#                PyTorch comes from where pip finds everything else (PIP_INDEX_URL, PIP_FIND_LINKS, pip.conf)
#   NPROC        processes that `demo` starts; 2, or 1 with a single GPU
#   DATA         files or a folder for `demo`; without it the demo generates its rows
#   SAVE         where `demo` saves its run; empty: nowhere
#   WORKERS      processes that `test` runs tests in; one for each processor, 4 at most, or 1 with a GPU, which they would
#                share
#   TRITON       releases of Triton for `aot`, which are put beside the environment's own: make aot TRITON="3.6.0 3.9.0"
#   SEED         seed of `explore`; another each time
#   BUNDLE_SCRIPT  makes the libraries of `gpu-bundle` instead: a Python program that is called with --out ARCHIVE
#   ARGS         further arguments for `demo`, `test`, `test-gpu`, `explore`, `matrix`, `bench`, `bench-gpu`, `aot` and
#                `gpu-bundle`

PYTHON ?= python3
STACK ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
TORCH_INDEX ?=
# Two, but no more than there are GPUs: NCCL takes one process for each.
NPROC ?= $(if $(filter cuda,$(STACK)),$(shell nvidia-smi -L | head -n 2 | wc -l),2)
DATA ?=
SAVE ?= .venv/demo/run
ARGS ?=
TRITON ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(STACK)
$(if $(filter $(STACK),cpu cuda),,$(error STACK=$(STACK) is not a stack; use cpu or cuda))
OTHER_STACK := $(if $(filter cuda,$(STACK)),cpu,cuda)
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint requirements/constraints.txt
OLDEST_TRITON := $(VENV)/triton-3.6.0

PROCESSORS := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1)
WORKERS ?= $(if $(filter cuda,$(STACK)),1,$(shell echo $$(( $(PROCESSORS) < 4 ? $(PROCESSORS) : 4 ))))
# Whole files go to a worker, since their tests share what takes long to make, in the order of tests/conftest.py.
PARALLEL := $(if $(filter-out 0 1,$(WORKERS)),--numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder)
SEED ?= $(shell $(PYTHON) -c 'import random; print(random.randrange(2**32))')

.PHONY: help setup demo test test-gpu explore matrix check format bench bench-gpu aot gpu-bundle clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

setup: $(STAMP) ## create .venv and install the pinned stack (again only after a pin has changed)

$(STAMP): pyproject.toml $(wildcard requirements/*.txt)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else \
		"Python %d.%d is not supported; use PYTHON=... to name a Python 3.11, 3.12 or 3.13" % v)'
	@# Both stacks provide one module, so they cannot share an environment.
	test ! -e $(VENV)/.installed-$(OTHER_STACK) || rm -rf $(VENV)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) --requirement requirements/torch.txt
	$(PIP_INSTALL) --requirement requirements/base.txt --requirement requirements/$(STACK).txt --requirement requirements/dev.txt
	$(PIP_INSTALL) --no-deps --requirement requirements/torchrec.txt
	$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	touch $@

TRAIN = $(BIN)/python examples/train_criteo.py --ranks $(NPROC) $(if $(DATA),--data $(DATA))

demo: setup ## train the example, save, verify, resume (DATA=path for your own rows, ARGS="--epochs 2 ...")
	$(TRAIN) $(if $(SAVE),--save $(SAVE)) $(ARGS)
ifneq ($(SAVE),)
	$(BIN)/dynamicemb verify $(SAVE)
	$(TRAIN) --load $(SAVE) $(ARGS)
endif

# Other releases of Triton lie beside the environment's own. The tests compile every kernel with the oldest one that is
# supported, too.
$(VENV)/triton-%: | setup
	rm -rf $@.partial
	$(PIP_INSTALL) --no-deps --target $@.partial triton==$*
	mv $@.partial $@

test: setup $(if $(filter Linux,$(shell uname -s)),$(OLDEST_TRITON)) ## run the tests (ARGS="-m 'not slow'" for the fast ones, ARGS="-k name" for some)
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-gpu: setup ## run the tests that need an NVIDIA GPU
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit( \
		"make test-gpu needs an NVIDIA GPU, and PyTorch built for CUDA (make setup STACK=cuda)")'
	$(BIN)/python -m pytest -m gpu $(ARGS)

# One seed for the line that says it and for the run.
explore: SEED := $(SEED)
explore: setup ## let Hypothesis try more examples than `test` does, other ones each time (SEED=... repeats a run)
	@echo "make explore SEED=$(SEED)"
	$(BIN)/python -m pytest $(PARALLEL) -m hypothesis --hypothesis-profile explore --hypothesis-seed $(SEED) $(ARGS)

matrix: setup ## run the fast tests with other releases of torch, fbgemm and torchrec (ARGS="--help" for the choices)
	$(BIN)/python tests/matrix.py $(ARGS)

check: setup ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup ## rewrite the sources in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup ## measure speed and memory (ARGS="--help" for the choices)
	$(BIN)/python benchmarks/run.py $(ARGS)

bench-gpu: setup ## measure the GPU engine beside fbgemm's CUDA tables, in 8 minutes at most
	$(BIN)/python benchmarks/run_gpu.py $(ARGS)

aot: setup $(TRITON:%=$(VENV)/triton-%) ## compile every Triton kernel for sm_80, sm_90 and sm_100; needs no GPU (TRITON=3.9.0 for that release)
ifeq ($(TRITON),)
	$(BIN)/python benchmarks/aot.py $(ARGS)
else
	for version in $(TRITON); do \
		PYTHONPATH="$(CURDIR)/$(VENV)/triton-$$version$${PYTHONPATH:+:$$PYTHONPATH}" $(BIN)/python benchmarks/aot.py $(ARGS) \
			|| exit 1; \
	done
endif

# Compiled by the version of Triton on the machine that it is for.
gpu-bundle: setup $(OLDEST_TRITON) ## make .gpu, what a GPU machine without a network needs; again after a change to a kernel
	PYTHONPATH="$(CURDIR)/$(OLDEST_TRITON)$${PYTHONPATH:+:$$PYTHONPATH}" $(BIN)/python benchmarks/gpu_bundle.py $(if $(BUNDLE_SCRIPT),--script $(BUNDLE_SCRIPT)) $(ARGS)

clean: ## remove .venv and every cache
	rm -rf $(VENV) build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
