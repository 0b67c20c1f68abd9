# One environment in .venv, made once and again whenever the requirements change.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint check-types contracts suite bench bad-inputs soak clean install

install: $(READY)

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or call make with PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch (the largest part), then the rest; a few minutes, once"
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $(READY)

demo: $(READY)  ## real CT in, pre-trained weights out
	$(BIN)/python examples/demo.py

test: lint check-types contracts suite  ## all that must hold before a change lands

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check-types: $(READY)
	$(BIN)/mypy

contracts: $(READY)
	$(BIN)/lint-imports

suite: $(READY)  ## three at a time for two cores: a fifth of the time is waiting for launchers, servers and time limits
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal --durations 10

bench: $(READY)  ## measured figures; results are committed under docs/benchmarks
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.step
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.build
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.codecs
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.verify
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.scale

bad-inputs: $(READY)  ## every bad input, what must become of it and what does: docs/bad-inputs.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.pipeline.corpus.page

soak: $(READY)  ## the long tests that the suite leaves out, fuzzing of the readers, builds that are killed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.simulation.simulate
	-$(BIN)/python -m pip install --quiet --constraint constraints.txt atheris  # without it the fuzzing is blind
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.pipeline.fuzz_readers --seconds 120
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.pipeline.kill_builds
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.pipeline.kill_builds --executor ray
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.launch.kill_runs
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.launch.change_worlds
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.launch.lost_ranks
	$(BIN)/mim-scale example-data
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.launch.soak_run --minutes 60

clean:
	rm -rf $(VENV) runs/demo stores/demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
