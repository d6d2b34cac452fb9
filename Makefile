# Two commands: `make reproduce` runs all notebooks, `make test` checks everything.
PYTHON ?= python3
PARAMS ?= params/ml-100k.yaml
GRID ?= params/grid/ml-100k.yaml
BIN := .venv/bin
# 00 shows the run of the others, so it comes after them.
NOTEBOOKS := $(filter-out notebooks/00_%,$(wildcard notebooks/*.ipynb)) notebooks/00_steering.ipynb $(wildcard notebooks/solutions/*.ipynb)

.PHONY: reproduce figures grid demo site test env lint strip clean

reproduce: env
	$(BIN)/corec run $(PARAMS)

# Make the figures of a run; what they depend on is run if it is missing or outdated.
figures: env
	$(BIN)/corec run $(PARAMS) --only figures

# Make all runs of a grid and one table of them.
grid: env
	$(BIN)/corec grid $(GRID)

# Steer the lists of a finished run in a browser.
demo: env
	$(BIN)/corec demo $(PARAMS)

# Build the site from the executed notebooks in docs/executed and the results in figures/.
site: env
	$(BIN)/python docs/site/build.py

# Run a command and print the seconds that it took.
timed = begin=$$(date +%s); $(2) || exit; echo "== $(1): $$(($$(date +%s) - begin)) s"

test: env
	@$(call timed,lint and types,$(MAKE) --no-print-directory lint)
	@$(call timed,tests,OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations 10 tests)
	@$(call timed,notebooks,COREC_AGAIN=1 $(BIN)/python -m pytest -q --nbval-lax $(NOTEBOOKS))
	@$(call timed,quality,$(BIN)/python -m pytest -q tests/quality.py)

env: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'COREC needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ...')"
	$(PYTHON) -m venv .venv
	@echo "installing packages into .venv (about two minutes)"
	@while sleep 20; do echo "  still installing ..."; done & beat=$$!; \
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[test]'; \
	status=$$?; kill $$beat; exit $$status
	@touch $@

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/nbstripout --keep-count --verify notebooks/*.ipynb notebooks/solutions/*.ipynb

# Outputs stay out of commits, except in cells tagged keep_output.
strip: env
	$(BIN)/nbstripout --keep-count notebooks/*.ipynb notebooks/solutions/*.ipynb

clean:
	rm -rf .venv runs .cache .snakemake
