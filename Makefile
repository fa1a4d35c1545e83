# Every target sets up what it needs in .venv first (tools/bootstrap.py); a second run installs nothing.
# Another Python: make test PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin

unexport PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE MPLBACKEND
NO_KEYS := env -u OPENAI_API_KEY -u OPENAI_BASE_URL -u REPLICATE_API_TOKEN -u REFIMG_SANDBOX
# One thread each, or torch's get in each other's way; glibc keeps the memory of images that are gone.
SHARING := OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=268435456 MALLOC_TRIM_THRESHOLD_=536870912
# Four for two cores, since many tests wait.
PYTEST := $(SHARING) $(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder
FIRST := nbs/03_pipeline.ipynb
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
export JUPYTER_PATH := $(CURDIR)/.venv/share/jupyter
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup demo lint notebooks compiled unit test test-all lab bench bench-long docs readme clean

help:
	@echo "make demo   a story through the whole pipeline, offline, into output/demo/"
	@echo "make test   lint, types, notebooks and modules in step, notebooks run, pytest: about five minutes"
	@echo "make test-all the same with the long tests and coverage"
	@echo "make lab    JupyterLab on 03_pipeline, the other notebooks beside it"
	@echo "make bench  the short benchmarks; make bench-long the rest"
	@echo "make docs   the documentation site in _docs/, offline; with Quarto the published one"
	@echo "make readme README.md from nbs/index.ipynb"
	@echo "make clean  removes what was built; .venv stays"

setup:
	@$(PYTHON) tools/bootstrap.py

demo: setup
	@$(BIN)/python tools/demo.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python tools/check_sync.py

notebooks: setup
	$(NO_KEYS) $(SHARING) $(BIN)/nbdev_test --n_workers 2

# Compiles the tests once, where each of four processes would do it at the same time.
compiled: setup
	-@$(BIN)/python -m pytest --collect-only -q >/dev/null

unit: setup
	$(PYTEST) $(MORE)

test: setup
	@$(MAKE) --no-print-directory -j 2 notebooks lint compiled
	@$(MAKE) --no-print-directory unit

test-all: setup
	@$(MAKE) --no-print-directory -j 2 notebooks lint compiled
	@REFIMG_TEST_ALL=1 $(MAKE) --no-print-directory unit \
		MORE="--cov=refimg --cov-report=term --cov-fail-under=90"

lab: setup
	$(BIN)/jupyter lab $(AS_ROOT) --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/$(FIRST)

bench: setup
	$(BIN)/python tools/bench.py

bench-long: setup
	$(BIN)/python tools/bench.py --long

docs: setup
	$(BIN)/python tools/docs.py

readme: setup
	$(BIN)/python tools/readme.py

clean:
	rm -rf output _docs _proc build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage
