# SPDX-License-Identifier: Apache-2.0
# make demo: set-up, then D-MoLE and Seq-FT over the reduced mini stream, with table and picture.
# make test: set-up, then every check and test.
# make test-long: every drawn test with 2,000 draws instead of 40, the contract on more families of models, and the
# tests that need torchvision, in an environment of their own.
# make sanitize: the compiled ops' tests on a build with the address and undefined-behaviour sanitizers.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
READY := $(VENV)/.ready
PINS := $(VENV)/constraints.txt
CXX_FILES := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*/*.cpp csrc/*/*/*.h csrc/*/*.cu csrc/*/*.cuh tests/kernels/cuda/emulator/*.cpp tests/kernels/cuda/emulator/*.h)

.PHONY: demo test test-long sanitize lint aot setup data results docs clean

demo: setup
	$(BIN)/dmole run mini --recipe demo --output results/demo --resume
	$(BIN)/dmole ask results/demo/runs/dmole-seed0-default --each-task

test: setup lint aot
	$(BIN)/python -m pytest -n 2

test-long: setup
	DMOLE_DRAWS=2000 $(BIN)/python -m pytest -m hypothesis tests/kernels
	$(BIN)/python -m pytest -m long
	$(BIN)/python scripts/with_torchvision.py

sanitize: setup
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python scripts/sanitize.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

# The Triton kernels for one target, without a GPU, against the committed record; all targets: without --quick.
aot: setup
	$(BIN)/python -m dmole_kernels check-aot --quick

setup: $(READY)

# torch comes first and by itself: the plain index would bring a CUDA build of several GB as somebody's dependency. The
# compiled kernels come last and in place; ninja compiles again only what changed. A CUDA build of torch pins the Triton
# that it needs, and that one is kept; beside a CPU build, constraints.txt says which. The checkout itself is registered
# anew each time: its packages and entry points may be others than when it was installed, and an old dmole.egg-info in
# the checkout would be found before the new one.
$(READY): pyproject.toml constraints.txt setup.py $(wildcard csrc/*.cpp csrc/cpu/*.* csrc/cpu/per_isa/* csrc/cuda/*)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "make: 'python -m venv' failed; install Python 3.10 or newer with its venv module." >&2; exit 1; }
	@rm -rf dmole.egg-info
	@if $(BIN)/python scripts/check_installed.py; then echo "setup: every pinned package is already installed; nothing is downloaded"; \
	  DMOLE_KERNELS_BUILD=skip $(PIP) install -q --no-index --no-deps --no-build-isolation -e .; else \
	  grep -v '^triton==' constraints.txt > $(PINS) && $(PIP) install -q -c $(PINS) torch && \
	  { $(PIP) freeze | grep '^triton==' || grep '^triton==' constraints.txt; } >> $(PINS) && \
	  DMOLE_KERNELS_BUILD=skip $(PIP) install -q -c $(PINS) -e ".[data,dev,metrics,peft,triton]" || \
	  { echo "setup: a package above could not be installed. With no network, install it from a wheel into $(VENV) and run make again." >&2; exit 1; }; fi
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python scripts/quietly.py --log build/kernels.log --what "setup: compiled kernels" \
	  --show "dmole_kernels: " --trouble "the compiler failed" -- $(BIN)/python setup.py -q build_ext --inplace
	@touch $(READY)

# Hours: the committed results, from nothing, and the tables made of them. A stopped run goes on.
results: setup
	$(BIN)/python scripts/admission.py --output results/admission.csv
	$(BIN)/dmole run mini --recipe mini --output results/mini --resume
	$(BIN)/dmole run mini --recipe mini --output results/mini_matched_neighbour --method dmole \
	  --set dmole.neighbour_within_threshold=true --resume
	$(BIN)/dmole verify results/mini
	$(BIN)/dmole verify results/mini_matched_neighbour
	$(BIN)/python scripts/rescore.py results/mini results/mini_matched_neighbour > results/rescored.csv
	$(BIN)/dmole readme README.md mini_cmit/README.md docs/metrics.md

docs: setup
	$(PIP) install -q -c constraints.txt "mkdocs>=1.6" "mkdocstrings[python]>=0.28"
	$(BIN)/mkdocs build --site-dir build/site

data: setup
	$(BIN)/python -m mini_cmit.tasks

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
