# Two commands: `make demo` does the main job, `make test` runs every test that needs no GPU.
PYTHON ?= python3
VENV   ?= .venv
# The processes of `make test`.  A file's tests share fixtures and so run in one of them.
WORKERS ?= 2
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
TRITON := $(VENV)/triton/.ready

.PHONY: demo test gpu-test faults models models-part lint cpp cpp-tests install clean

# The C++ runner: its core with tests, and with TENSORRT_INCLUDE=path, the folder of NvInferVersion.h, mdtrt_run.
CPP_TESTS   := build/cpp-tests
CPP_RUNNER  := build/cpp
NCCL_INCLUDE ?= $(firstword $(wildcard $(VENV)/lib/python3*/site-packages/nvidia/nccl/include))

demo: $(READY)
	$(BIN)/torchtrt-md export examples/flux.py --mesh cp=4 --strategy ulysses -o flux.mdtrt

test: $(READY) $(TRITON)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

gpu-test: $(READY) $(TRITON)
	$(BIN)/python -m pytest -q tests/gpu

faults: $(READY)
	$(BIN)/python tests/faults/report.py

# Writes docs/models.md: which models of the installed transformers and diffusers verify under their own plans.
models: $(READY)
	$(BIN)/python benchmarks/model_matrix.py -o docs/models.md

# One of 24 parts of it, beside what the page says.
models-part: $(READY)
	$(BIN)/python benchmarks/model_matrix.py --part 1/24 --check docs/models.md

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

cpp: cpp-tests
	ctest --test-dir $(CPP_TESTS) --output-on-failure
ifdef TENSORRT_INCLUDE
	cmake -S examples/cpp -B $(CPP_RUNNER) -DMDTRT_TESTS=OFF \
	  -DTENSORRT_INCLUDE=$(abspath $(TENSORRT_INCLUDE)) -DNCCL_INCLUDE=$(abspath $(NCCL_INCLUDE))
	cmake --build $(CPP_RUNNER) --parallel $(shell nproc)
endif

cpp-tests:
	@for tool in cmake c++; do command -v $$tool >/dev/null || { \
	  echo "$$tool is missing: apt-get install g++ cmake nlohmann-json3-dev libssl-dev libcli11-dev doctest-dev"; exit 1; }; done
	cmake -S examples/cpp -B $(CPP_TESTS) -DMDTRT_SANITIZE=ON
	cmake --build $(CPP_TESTS) --parallel $(shell nproc)

install: $(READY)

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[rtx,test]'
	touch $@

# The server in this wheel is all that a test needs of it.  The package wants an older numpy, so it is not installed.
$(TRITON): $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --upgrade --target $(VENV)/triton nvidia-pytriton==0.7.0
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info *.mdtrt .pytest_cache .mypy_cache .ruff_cache .hypothesis
