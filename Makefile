# Everything happens in .venv, which the first target that needs it makes.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint types tests speed bench soak attack stress gpu-check clean

demo: $(INSTALLED)
	$(BIN)/python examples/digits.py

test: lint types tests speed

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

# Two at a time, with a thread of torch each.
tests: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

# By ratios within one run, to those that are kept here.
speed: $(INSTALLED)
	$(BIN)/python benchmarks/check.py benchmarks/results/quick.json

# The reports that the tables of docs/benchmarks.md are made of: half an hour with nothing beside it.
bench: $(INSTALLED)
	for scenario in small large ragged quick; do \
		$(BIN)/python benchmarks/scenarios.py $$scenario \
			--json benchmarks/results/$$scenario.json || exit 1; \
	done
	$(BIN)/python benchmarks/tables.py

soak: $(INSTALLED)
	$(BIN)/python tests/soak.py --minutes 10 --json benchmarks/results/soak.json

# Says how to repeat what fails. For as long as you like: make attack MINUTES=600
MINUTES ?= 10
attack: $(INSTALLED)
	$(BIN)/python tests/attack.py --minutes $(MINUTES)

# Tests of what runs at the same time, under conditions that bring rare orders about.
CONCURRENT := $(addprefix tests/test_,store.py store_machine.py nodes.py streams.py faults.py \
	on_error.py read_timeout.py revalidate.py interrupts.py signals.py bad_paths.py soak.py)

stress: $(INSTALLED)
	PYTHONDEVMODE=1 $(BIN)/python -m pytest -q -n 2
	SWITCH_INTERVAL=1e-6 $(BIN)/python -m pytest -q -n 2
	for seed in $$(seq 1 20); do \
		$(BIN)/python -m pytest -q -n 2 --randomly-seed=$$seed $(CONCURRENT) || exit 1; \
	done

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
