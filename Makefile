# Every command runs in .venv, made on first use. PYTHON names the interpreter to make it with.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
SEEDS  ?= 1
JOBS   ?= 2
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))

.DEFAULT_GOAL := help
.PHONY: help demo lab test test-lowest test-timm docs notebooks lint format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Versions come from constraints.txt, so that two installs are alike; see README.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 4) and "Python 3.11.4 or newer is needed; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[notebooks,dev]'
	touch $@

# Only the tests of the metrics need it, and it is built by a C compiler: without one, they skip.
$(VENV)/pysaliency: $(VENV)/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[pysaliency]' \
		&& touch $@ || echo 'pysaliency could not be built (no C compiler?); its tests are skipped'

# Only the tests of other people's checkpoints need them; without them, lists of their names do.
$(VENV)/others: $(VENV)/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[others]'
	touch $@

demo: $(VENV)/installed ## the whole experiment on drawn birds, about 2 minutes
	$(BIN)/python -m lib demo --seeds $(SEEDS)

# Threads of several kernels would wait for each other by spinning, 7 to 40 times slower.
lab notebooks: export OMP_WAIT_POLICY ?= PASSIVE

lab: $(VENV)/installed ## JupyterLab on the notebooks
	$(BIN)/jupyter lab notebooks --ServerApp.kernel_websocket_connection_class=lib.widgets.nodelay.NoDelayConnection

# The notebooks come first, and in their order: they take longest. One thread a process: PyTorch's
# would wait for each other by spinning.
NBVAL := --nbval-lax --nbval-current-env --nbval-cell-timeout=1200
SPREAD := -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: lint $(VENV)/pysaliency $(VENV)/others ## lint, all tests, all notebooks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SPREAD) $(NBVAL) $(NOTEBOOKS) tests

# uv finds the oldest versions that pyproject.toml allows. What is slow, or of several processes, is left
# to `make test`, and so are five tests of what only newer versions do: where pandas 3 puts a bar of no
# width, how matplotlib 3.11 resamples, which operations torch 2.6 counts, how torch 2.14 rounds.
LOWEST := .venv-lowest
SLOW := browser test_bench.py test_cluster.py test_download.py test_house.py test_jobs.py test_pictures.py \
	test_processes.py test_sweep.py test_weights.py
NEWER := killed or parts_stack or an_overlay_draws or only_what_an_edit_changes_is_computed \
	or any_edit_equals_the_real_model or one_that_was_stopped_goes_on

test-lowest: ## fast tests with the oldest versions of everything (Python 3.11)
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt uv
	$(LOWEST)/bin/uv pip install -q --python $(LOWEST)/bin/python --resolution lowest-direct -e '.[notebooks,dev]'
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest tests $(SLOW:%=--ignore tests/%) -k 'not ($(NEWER))'

# The model's tests alone, as most of what timm changes from release to release is in its models.
OLD_TIMM := $(shell sed -n 's/.*"timm>=\([0-9.]*\)".*/\1/p' pyproject.toml)
OLD_TIMM_AT := $(CURDIR)/build/timm-$(OLD_TIMM)

$(OLD_TIMM_AT)/timm: | $(VENV)/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $(@D) timm==$(OLD_TIMM)

test-timm: $(OLD_TIMM_AT)/timm ## the model's tests with the oldest timm that pyproject.toml allows
	OMP_NUM_THREADS=1 PYTHONPATH=$(OLD_TIMM_AT) $(BIN)/python -m pytest -n $(JOBS) \
		tests/test_families.py tests/test_vit.py tests/test_kinds.py tests/test_live.py tests/test_mean_edit.py

$(VENV)/docs: $(VENV)/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

docs: $(VENV)/docs ## pages and API as HTML in build/docs
	$(BIN)/python tools/make_docs.py

notebooks: $(VENV)/installed ## execute the notebooks in place and tidy them
	$(BIN)/python tools/execute_notebooks.py $(NOTEBOOKS)

lint: $(VENV)/installed ## ruff on code and notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches; keeps .venv, datasets, models, and what you trained (runs, result)
	rm -rf build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	find . -name .ipynb_checkpoints -not -path './$(VENV)/*' -prune -exec rm -rf {} +
