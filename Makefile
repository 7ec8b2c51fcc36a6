# Everything happens in .venv, which the first target that needs it makes.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint types tests test-remote tests-python-reader coverage docs speed bench soak attack kills kill-ranks stress \
	gpu-check clean

demo: $(INSTALLED)
	$(BIN)/python examples/digits.py

test: lint types tests test-remote

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

# Two processes, with one thread of torch each.
tests: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --ignore=tests/remote

# With a server of objects on this machine. The tests without one are among the others.
test-remote: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/remote

# Once more without the native reader, as where there is no compiler.
tests-python-reader: $(INSTALLED)
	GPUCACHE_PIPES_NATIVE=0 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

coverage: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --cov --cov-report=term

# The documentation as a site, in site/. Warnings are errors.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Not part of `make test`: it measures, and needs a machine that does nothing else. Compares ratios
# within one run with those that were committed.
speed: $(INSTALLED)
	$(BIN)/python benchmarks/check.py benchmarks/results/quick.json

# The reports behind the tables of README.md and docs/benchmarks.md: an hour on an idle machine.
bench: $(INSTALLED)
	for scenario in small busy large ragged ragged-large quick; do \
		$(BIN)/python benchmarks/scenarios.py $$scenario \
			--json benchmarks/results/$$scenario.json || exit 1; \
	done
	$(BIN)/python benchmarks/aims.py --json benchmarks/results/aims.json
	$(BIN)/python benchmarks/tables.py

soak: $(INSTALLED)
	$(BIN)/python tests/soak.py --minutes 10 --json benchmarks/results/soak.json

# A thousand processes that write into a disk cache are killed: two minutes.
kills: $(INSTALLED)
	$(BIN)/python tests/kills.py

# Ranks that share their caches are killed thirty times: seven minutes.
kill-ranks: $(INSTALLED)
	$(BIN)/python tests/peers/kill_ranks.py

# Prints how to repeat a failure. Any duration: make attack MINUTES=600
MINUTES ?= 10
attack: $(INSTALLED)
	$(BIN)/python tests/attack.py --minutes $(MINUTES)

# The tests of concurrency, under conditions that make rare interleavings likely.
CONCURRENT := tests/store tests/device/test_streams.py tests/nodes/test_nodes.py \
	tests/nodes/test_on_error.py tests/test_soak.py

stress: $(INSTALLED)
	PYTHONDEVMODE=1 $(BIN)/python -m pytest -q -n 2
	SWITCH_INTERVAL=1e-6 $(BIN)/python -m pytest -q -n 2
	for seed in $$(seq 1 20); do \
		$(BIN)/python -m pytest -q -n 2 --randomly-seed=$$seed $(CONCURRENT) || exit 1; \
	done

# With the Python on the path, whose torch supports the device, and not in .venv. PYTHONPATH stays as
# it is; the script puts this repository in front of it. For example, one part of four:
# make gpu-check CHECK="--part tests --json /tmp/tests.json"
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(CHECK)

# Again when what is compiled has changed: an editable installation is not.
$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard gpucache_pipes/files/*.[ch] gpucache_pipes/files/packed/*.c)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
