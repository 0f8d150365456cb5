# Two commands on a fresh machine: `make demo` and `make test`. Both need python3 and make only.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo unseen lora test pytest test-slow notebooks budget check-results lint bench install clean pdiff fields metric docs package

install: $(STAMP)

# uv installs in seconds what pip installs in minutes; pip is the fall-back.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv || true
	if [ -x $(BIN)/uv ]; then \
		$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[test]'; \
	else \
		$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'; \
	fi
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/rpg demo $(DEMO_ARGS)

# Idle OpenMP threads must not spin: both recipes would suffer from whatever else runs.
bench: $(STAMP)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python scripts/bench.py --json runs/bench.json

# What each of these takes is in scripts/budget.json.
# Networks for tasks nobody trained. More seeds: make unseen UNSEEN_ARGS="--seeds 3"
unseen: $(STAMP)
	$(BIN)/rpg unseen $(UNSEEN_ARGS)

# LoRA adapters for tasks nobody trained: runs/lora/evaluation.json
lora: $(STAMP)
	$(BIN)/rpg lora $(LORA_ARGS)

# Neural fields of digits, generated and compared in function space: runs/fields
fields: $(STAMP)
	$(BIN)/rpg fields $(FIELDS_ARGS)

# Networks of a wished loss, beside Adam: runs/gpt/evaluation.json
metric: $(STAMP)
	$(BIN)/rpg metric $(METRIC_ARGS)

# p-diff on the mini networks, recurrent diffusion on the same zoos: runs/pdiff/table.md
pdiff: $(STAMP)
	$(BIN)/rpg sweep configs/sweeps/pdiff.yaml --jobs 2

# The documentation as a site: site/index.html
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# One core checks types while the other begins with the tests: the files that take longest first, each on one worker, so
# that what a file prepares is made once (groups of xdist 3.8 do nothing with pytest 9.2). Notebooks run in CI: make notebooks.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(MAKE) --jobs=2 --output-sync=target lint pytest

pytest: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

notebooks: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m notebook

# Whole journeys (pages of the documentation, launches, a hundred kills, sweeps) and large real networks: half an hour, and
# gigabytes of memory. Before a release, and after a change to what they walk through.
test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# What the commands of README's table take, and which grew by more than 30 %: scripts/budget.json
budget: $(STAMP)
	$(BIN)/python scripts/budget.py $(BUDGET_ARGS)

# The same of the commands that take no longer than five minutes, for their figures: which differ from the record?
check-results: $(STAMP)
	$(BIN)/python scripts/budget.py --most 300 --limit 900 --keep

# The wheel, built and installed in an environment of its own; with the oldest PyTorch (2 GB): make package PACKAGE_TORCH=2.6
package: $(STAMP)
	PACKAGE_TORCH=$(PACKAGE_TORCH) $(BIN)/python -m pytest -m package tests/test_packages.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
