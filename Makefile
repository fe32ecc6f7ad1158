# make quickstart   the whole pipeline on embedded data, then for two more seeds; open runs/quickstart/report.html
# make test         all tests
# make test-cpu     tests that compare two computations once more, with an older CPU's instructions and two threads
# make bench        every benchmark on this machine, into runs/bench.json
# make lint         what the code is held to
# Each makes .venv first where it is missing.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# On a busy machine, threads that spin while they wait for their siblings slow training several times over.
export GOMP_SPINCOUNT ?= 2000
# Modules are compiled as they are first imported, and kept: compiling all that is installed takes a minute.
export PYTHONDONTWRITEBYTECODE :=
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

.PHONY: install quickstart test test-cpu bench lint

install: $(READY)

$(READY): setup.py pyproject.toml constraints.txt $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=/path/to/python3.x")'
	$(PYTHON) -m venv .venv
	$(PIP) setuptools wheel ninja torch
	# csrc/ is built against that torch, while pip, which sees none as it builds, installs the rest.
	$(BIN)/python setup.py build_ext --inplace >.venv/csrc.log 2>&1 & built=$$!; $(PIP) -e '.[dev]' && wait $$built
	$(BIN)/python -c 'import copgen_fast.study'
	touch $@

quickstart: $(READY)
	$(BIN)/python -m copgen_fast.train quickstart
	$(BIN)/python -m copgen_fast.study quickstart --seeds 0..2 --reuse runs/quickstart --out runs/quickstart-seeds --jobs 2 \
		--vary pairs.positives=identity,gaussian,navigator,steering

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-cpu: $(READY)
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 TEST_THREADS=2 $(BIN)/python -m pytest -n 2 --dist loadfile \
		tests/test_encoders.py tests/training \
		tests/stages/test_navigator.py tests/bench/areas/test_navigator.py tests/bench/areas/test_pretrain.py \
		-k 'not the_command_writes_its_rows'

bench: $(READY)
	$(BIN)/python -m bench all --json runs/bench.json

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
