# What one needs to know: `make demo` shows it, `make test` proves it. Both set everything up
# themselves, in .venv and build, and take no time to do so when nothing has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
LOCKS := requirements/dev.txt requirements/peers.txt
STUBS := build/typings/.ready
LINTED := lib tools server_stub tests $(wildcard boot.py main.py)

.PHONY: help demo load test lint bench bench32 genuine size compat packages lock faults faults-page faults-long powercut soak kills fuzz fuzz-api mutants setup clean

help:
	@echo "make demo    a virtual board updates itself, and survives a bad release"
	@echo "make test    lint, sizes, device tests on MicroPython, host tests"
	@echo "make load    what the fleet server carries here (python tools/load.py --help)"
	@echo "make lint    ruff and pyright"
	@echo "make bench   what an update costs, against targets; plots in docs/bench"
	@echo "make bench32  the heap of an update on a MicroPython of 32 bits (needs Debian's archive)"
	@echo "make genuine  two genuine ESP32 images: a board updates by delta (needs PyPI)"
	@echo "make size    bytes of each module of lib/twinslot on the device"
	@echo "make compat  the device package against MicroPython 1.24 to 1.29 (needs PyPI)"
	@echo "make packages  write package*.json, when a module came or went"
	@echo "make lock    pin the newest allowed version of every dependency, with hashes"
	@echo "make faults  every fault and attack of the catalogue, with the tests that cover it"
	@echo "make faults-page  run what docs/faults.md is made from, and write how it ended there"
	@echo "make faults-long  network cut at every byte, exceptions at every statement (SEED=, PIECE=1/9)"
	@echo "make powercut  cut the power at every flash operation, in every way (half an hour)"
	@echo "make soak N=1000 SEED=1  update one board N times, with faults and power cuts"
	@echo "make kills N=100  kill the server in the middle of reports, uploads and rollouts, N times"
	@echo "make fuzz SECONDS=60  fuzz the device's parsers"
	@echo "make fuzz-api SECONDS=60  fuzz the server by its OpenAPI document"
	@echo "make mutants break each line of the trusted code, see that a test notices (ONE_IN=20)"
	@echo "make clean   remove .venv and build"

demo: $(READY)
	@$(BIN)/twinslot demo

test: lint size
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

load: $(READY)
	@$(BIN)/python tools/load.py

lint: $(READY) $(STUBS)
	@$(BIN)/ruff check $(LINTED)
	@$(BIN)/ruff format --check $(LINTED)
	@$(BIN)/pyright

size: $(READY)
	@$(BIN)/python tools/size.py

compat: $(READY)
	@$(BIN)/python -m twinslot_tools.compat

packages: $(READY)
	@$(BIN)/python -m twinslot_tools.mip

bench32: $(READY)
	@$(BIN)/python -m twinslot_tools.port32

bench: $(READY)
	@$(BIN)/python -m twinslot_tools.bench $(BENCH)
	@$(BIN)/python tools/bench_trust.py

setup: $(READY) $(STUBS)

$(READY): pyproject.toml $(LOCKS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "twinslot: $(PYTHON) is `$(PYTHON) -V 2>&1`: needs Python 3.11 or newer;" \
	         "name one with  make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    $(PYTHON) -m virtualenv -q $(VENV) 2>/dev/null || { rm -rf $(VENV); \
	    echo "twinslot: $(PYTHON) can't make a virtual environment: on Debian and Ubuntu" \
	         "run  apt install python3-venv" >&2; exit 1; }; }
	@echo "installing into $(VENV)" >&2
	@$(PIP) install --require-hashes --requirement requirements/dev.txt
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@$(PIP) install --no-build-isolation --require-hashes --requirement requirements/peers.txt 2>/dev/null || \
	    echo "no detools (it needs a C compiler): tests that compare with it are skipped" >&2
	@touch $@

$(STUBS): $(READY)
	@$(BIN)/python tools/stubs.py build/typings
	@touch $@

# The newest versions that pyproject.toml allows, for every Python from 3.11 on, each with the
# hashes of its files: what is tested is what was looked at, and a file that was swapped is refused.
LOCK := $(BIN)/uv --quiet pip compile --universal --python-version 3.11 --generate-hashes --upgrade \
    --custom-compile-command 'make lock' pyproject.toml

lock: $(READY)
	@$(PIP) install uv
	@$(LOCK) --extra dev --group build --output-file requirements/dev.txt
	@$(LOCK:pyproject.toml=) --group peers --constraint requirements/dev.txt --output-file requirements/peers.txt

SECONDS ?= 60

genuine: $(READY)
	@$(BIN)/python -m twinslot_tools.genuine

powercut: $(READY)
	@$(BIN)/python tests/host/sweep.py $(STORY)

faults-long: $(READY)
	@FAULTS=long SEED=$(SEED) PIECE=$(PIECE) $(BIN)/python -m pytest -q -rP tests/host/test_network_faults.py \
	    tests/host/test_statements.py tests/host/test_time_and_space.py

soak: $(READY)
	@$(BIN)/python -m twinslot_tools.soak $(or $(N),1000) --seed $(or $(SEED),1)

PROOFS := power_cut network_faults time_and_space statements update safe_mode soak

faults-page: $(READY)
	@$(BIN)/python -m pytest -n 3 --dist loadfile --results $(PROOFS:%=tests/host/test_%.py)
	@$(BIN)/python tools/faults_page.py

faults: $(READY)
	@$(BIN)/python tools/coverage_of_faults.py

kills: $(READY)
	@$(BIN)/python tests/host/kills.py $(or $(N),100) --seed $(or $(SEED),1)
	@$(BIN)/python tests/host/kills.py $(or $(N),100) --seed $(or $(SEED),1) --postgres

fuzz: $(READY)
	@$(BIN)/python tests/fuzz/run.py $(SECONDS)

fuzz-api: $(READY)
	@$(BIN)/python tests/fuzz/api.py $(SECONDS)

mutants: $(READY)
	@$(BIN)/python tests/mutants/run.py $(MODULE) $(if $(ONE_IN),--one-in $(ONE_IN))

clean:
	rm -rf $(VENV) build
