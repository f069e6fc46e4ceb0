PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder
READY := $(VENV)/.ready

.PHONY: demo quick test coverage nightly benchmark-smoke check format docs clean

# Train on a real MuJoCo task, compare with random actions, save model and learning curve to demo/
demo: $(READY)
	$(BIN)/python examples/quickstart.py

# All but the files that take minutes, in less than two
quick: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "not long and not nightly"

# The whole test-suite, a file per core at a time
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) --durations=20

# The same, a third slower, with the lines that no test runs
coverage: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) --cov --cov-report=term-missing:skip-covered --cov-fail-under=95

# What takes too long for every change: the toy at full size, 90 kills, hundreds of drawn trainings
nightly: $(READY)
	$(BIN)/python -m pytest -m nightly
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest tests/test_robustness.py

# The benchmarks' whole path on a tiny suite: runs, then a report, to demo/
benchmark-smoke: $(READY)
	$(BIN)/python benchmarks/run.py benchmarks/suites/smoke.yml --output demo/smoke.csv --folder demo/runs --workers 2
	$(BIN)/python benchmarks/report.py benchmarks/suites/smoke.yml --input demo/smoke.csv --images demo --table demo/smoke.md

# Format, lint, types
check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY)
	$(BIN)/pip install -q -c constraints.txt -e ".[docs]"
	$(BIN)/sphinx-build -W -b html docs docs/_build

# The virtual environment with everything that the commands above need
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist demo docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage
