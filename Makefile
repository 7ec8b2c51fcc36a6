# Everything happens in .venv, which the first target that needs it makes.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint types tests bench gpu-check clean

demo: $(INSTALLED)
	$(BIN)/python examples/digits.py

test: lint types tests

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

tests: $(INSTALLED)
	$(BIN)/python -m pytest -q -n 2

bench: $(INSTALLED)
	$(BIN)/python benchmarks/warm_batch.py --json benchmarks/results/warm_batch.json

# With the Python at hand, which has a torch for its device, and not in .venv.
gpu-check:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_check.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
