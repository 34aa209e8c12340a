# Each target makes and uses .venv by itself. PYTHON=python3.12 picks another interpreter for the first time.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# Tests and benchmarks run on one thread a process and never ask a model hub for anything.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE  ?= 1

.PHONY: help demo test bench lint docs format clean
.DELETE_ON_ERROR:

help:
	@echo "make demo   the main job on a real pretrained encoder: inspect, gate, train, save, export, compare"
	@echo "make test   the test suite, on two processes (ARGS='-k gate' adds arguments for pytest; GATECC_ZOO=all: all variants)"
	@echo "make bench  every benchmark; fails where a bar is missed"
	@echo "make lint   ruff, pyright, the order of the layers and the shape of the house"
	@echo "make docs   the generated pages under docs/ and the table of recipes in the README"
	@echo "make format what ruff can mend by itself"
	@echo "make clean  remove .venv and what the tools left"

$(READY): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing gatecc and its tools into $(VENV) (minutes, the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(READY)
	@$(BIN)/python examples/demo.py $(ARGS)

test: $(READY)
	@$(BIN)/python -m pytest -n 2 --dist worksteal --durations=10 $(ARGS)

# All of them, even after a miss: the table of each is worth reading. gpu.py needs a machine of its own.
bench: $(READY)
	@missed=; for file in $(filter-out benchmarks/gpu.py,$(wildcard benchmarks/[!_]*.py)); do \
	    echo "== $$file"; $(BIN)/python "$$file" --check || missed="$$missed $$file"; \
	done; test -z "$$missed" || { echo "bars missed in:$$missed"; exit 1; }

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/python tools/layers.py
	@$(BIN)/python -m tools.house
	@$(BIN)/pyright

docs: $(READY)
	@$(BIN)/python tools/docs.py

format: $(READY)
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) dist .pytest_cache .ruff_cache .hypothesis
