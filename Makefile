# Two commands need nothing but Python >= 3.11, pip and make: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# Threads that wait for each other by spinning make a busy machine many times slower.
export OMP_WAIT_POLICY ?= PASSIVE
# Without compiled modules, each process that the tests start compiles the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-core suite setup setup-dev lint format sbom
demo: setup  ## fine-tune on emoji, search an unseen artist's, write outputs/demo
	$(BIN)/python train_scripts/demo.py $(DEMO_FLAGS)

test: setup-dev  ## lint and type checks beside the whole test suite
	@$(MAKE) --no-print-directory -j 2 lint suite

test-core: setup-dev  ## the same without the tests marked slow: about a third of the time
	@$(MAKE) --no-print-directory -j 2 lint suite PYTEST_FLAGS='-m "not slow"'

suite: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS)

setup: .venv/installed
setup-dev: .venv/installed-dev

# torch first, at its pinned version: otherwise a dependency may draw in another build of several gigabytes.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is too old: Transformers 5.23 needs Python 3.11 or newer. Try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[emoji]'
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

lint: setup-dev  ## what CI checks, without changing files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup-dev  ## let ruff change files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

sbom: setup  ## a bill of materials of .venv in CycloneDX's form; the tool has an environment of its own
	$(PYTHON) -m venv build/cyclonedx
	build/cyclonedx/bin/python -m pip install -q --disable-pip-version-check cyclonedx-bom==7.5.0
	mkdir -p outputs
	build/cyclonedx/bin/cyclonedx-py environment --gather-license-texts --output-file outputs/sbom.json $(BIN)/python
