# Two commands: `make demo` does the main job, `make test` runs every test that needs no GPU.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test gpu-test models lint install clean

demo: $(READY)
	$(BIN)/torchtrt-md export examples/flux.py --mesh cp=4 --strategy ulysses -o flux.mdtrt

test: $(READY)
	$(BIN)/python -m pytest -q

gpu-test: $(READY)
	$(BIN)/python -m pytest -q tests/gpu

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

clean:
	rm -rf $(VENV) build dist *.egg-info *.mdtrt .pytest_cache .mypy_cache .ruff_cache .hypothesis
