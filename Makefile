# Two commands: `make demo` does the main job, `make test` runs every test that needs no GPU.
PYTHON ?= python3
VENV   ?= .venv
# The processes of `make test`.  A file's tests share fixtures and so run in one of them.
WORKERS ?= 2
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
TRITON := $(VENV)/triton/.ready

.PHONY: demo test gpu-test faults models lint install clean

demo: $(READY)
	$(BIN)/torchtrt-md export examples/flux.py --mesh cp=4 --strategy ulysses -o flux.mdtrt

test: $(READY) $(TRITON)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

gpu-test: $(READY) $(TRITON)
	$(BIN)/python -m pytest -q tests/gpu

faults: $(READY)
	$(BIN)/python tests/faults/report.py

# Writes docs/models.md: which models of the installed transformers verify under their own tensor-parallel plans.
models: $(READY)
	$(BIN)/python benchmarks/model_matrix.py -o docs/models.md

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

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
