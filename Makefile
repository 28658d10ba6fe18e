# Two targets matter: `make quickstart` does the main job on a laptop, `make test` runs the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart
ARGS ?=
# Without an NVIDIA driver the CPU build of PyTorch is installed, so that nobody downloads gigabytes of CUDA libraries.
# pip finds it where the package index at hand carries it; uv knows PyTorch's own index of CPU builds.
TORCH_CPU := 2.13.0
PYTHON312 ?= python3.12
NEWEST ?= .venv-newest
NEWEST_TESTS := tests/test_device.py tests/test_core_optimizer.py tests/models tests/parallel tests/training tests/checkpoint

.PHONY: quickstart quickstart-short needle serve test test-fast test-newest faults lint format check clean

quickstart: $(BIN)/.installed
	$(BIN)/python examples/quickstart/quickstart.py --output $(RUN) $(ARGS)

quickstart-short: $(BIN)/.installed
	$(BIN)/python examples/quickstart/quickstart.py --output $(RUN)-short --short $(ARGS)

# The quickstart's model in a browser, at http://127.0.0.1:8000, and for OpenAI clients; makes it first where it is not.
serve: $(BIN)/.installed
	test -e $(RUN)/hf/config.json || $(MAKE) quickstart
	$(BIN)/python tools/serve.py --model $(RUN)/hf --served-model-name quickstart --enable-prefix-caching $(ARGS)

# The quickstart, and its model asked about videos of up to 4,096 frames, which is 64 times the trained length.
needle: $(BIN)/.installed
	$(BIN)/python examples/quickstart/quickstart.py --output $(RUN) --needle $(ARGS)

# Two processes; a file's tests run in one of them, in order: tests that load a model into their process come last.
test: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# For people who change things: what is not marked slow, in two processes.
test-fast: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 $(ARGS)

# The newest megatron-core that setup.py takes, by hand and not in CI: it needs Python 3.12, for which the package index
# may have no CPU build of PyTorch. The CUDA build (2.5 GB to fetch, 6 GB on disk) runs on the CPU too.
test-newest: $(NEWEST)/.installed
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(NEWEST_TESTS) $(ARGS)

$(NEWEST)/.installed: setup.py
	test -x $(NEWEST)/bin/python || $(PYTHON312) -m venv $(NEWEST) || \
	  { echo "make test-newest needs Python 3.12. Say where it is: make test-newest PYTHON312=/path/to/python3.12"; exit 1; }
	$(NEWEST)/bin/pip install "torch==$(TORCH_CPU)" megatron-core==0.19.2
	$(NEWEST)/bin/pip install -e ".[quickstart]" pytest pytest-xdist hypothesis
	touch $@

# What a checkpoint must outlive, every case: killed processes, full and broken disks, damaged files, layouts. An hour.
faults: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.faults.run $(ARGS)

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(BIN)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: lint test

# PyTorch first: with it in place the requirement torch>=2.6 is satisfied and nothing else is fetched for it.
$(BIN)/.installed: setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if $(BIN)/python -c "import torch" 2>/dev/null; then :; \
	elif command -v nvidia-smi >/dev/null 2>&1; then $(BIN)/pip install torch; \
	else $(BIN)/pip install "torch==$(TORCH_CPU)+cpu" || \
	  { $(BIN)/pip install uv && $(BIN)/uv pip install --python $(BIN)/python --torch-backend cpu "torch==$(TORCH_CPU)"; }; fi
	$(BIN)/pip install -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
