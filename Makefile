# One command for each job; `make` alone lists them. Each makes its environment on first use.
#
#   PYTHON=python3.12     the Python to use (3.10 or newer, with venv)
#   TRITON=newest         triton's newest release, or TRITON=X.Y.Z, in an environment of its own
#   INSTALL=0             install nothing: PYTHON's own packages, the sources where they lie (no network needed)
#   PYTEST="-k norm -x"   more arguments for pytest; BENCH="--quick" for llmkernels bench

PYTHON ?= python3
TRITON ?= default
INSTALL ?= 1
PYTEST ?=
BENCH ?=
REPORTS := build/reports
# Threads of torch that wait sleep instead of spinning: pytest runs two processes on what may be two cores.
export OMP_WAIT_POLICY ?= PASSIVE

ifeq ($(INSTALL),0)
  ENVIRONMENT :=
  RUN := PYTHONPATH=$(CURDIR) $(PYTHON)
  CLANG_FORMAT := clang-format
  LINT :=
  # Plugins can't be taken for granted here, so one process and no time limit.
  PYTEST_PLUGINS :=
else
  VENV := .venv$(if $(filter-out default,$(TRITON)),-triton-$(TRITON))
  ENVIRONMENT := $(VENV)/installed
  RUN := $(VENV)/bin/python
  CLANG_FORMAT := $(VENV)/bin/clang-format
  LINT := lint
  PYTEST_PLUGINS := -n 2 --timeout=300
endif

.PHONY: help demo test lint format emulator build bench doctor clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       the main job: a pretrained encoder on these kernels, then a language model trained"
	@echo "make test       every check (TRITON=newest for the newest triton, PYTEST='...' for pytest's arguments)"
	@echo "make lint       ruff, mypy and clang-format;  make format applies them"
	@echo "make emulator   the CUDA C++ kernels built for the CPU; prints the path for LLMKERNELS_EXTENSION"
	@echo "make build      the CUDA C++ kernels built by nvcc"
	@echo "make bench      the benchmarks;  make doctor: what works on this machine"
	@echo "make clean      removes what the other commands made"
	@echo "Variables: PYTHON=python3.12, TRITON=newest, INSTALL=0 (run with PYTHON as it is, install nothing)."

$(VENV)/installed: pyproject.toml setup.py tools/install.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) tools/install.py $(VENV) --triton $(TRITON)
	@touch $@

demo: $(ENVIRONMENT)
	@$(RUN) -m examples.demo

test: $(ENVIRONMENT) $(LINT)
	@mkdir -p $(REPORTS)
	@echo "pytest's report goes to $(REPORTS)/tests.xml"
	$(RUN) -m pytest $(PYTEST_PLUGINS) --junitxml=$(REPORTS)/tests.xml $(PYTEST)

CSRC = $(shell find csrc tests -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h' -o -name '*.hpp')

lint: $(ENVIRONMENT)
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy llmkernels
	@$(if $(CSRC),$(CLANG_FORMAT) --dry-run --Werror $(CSRC))

format: $(ENVIRONMENT)
	@$(RUN) -m ruff check --fix --exit-zero -q .
	@$(RUN) -m ruff format .
	@$(if $(CSRC),$(CLANG_FORMAT) -i $(CSRC))

emulator: $(ENVIRONMENT)
	@$(RUN) -m tests.emulator.build

build: $(ENVIRONMENT)
	@$(RUN) -m llmkernels build

bench: $(ENVIRONMENT)
	@mkdir -p $(REPORTS)
	@$(RUN) -m llmkernels bench --output $(REPORTS)/bench $(BENCH)
	@$(RUN) -m pytest -q bench --benchmark-json=$(REPORTS)/host_overhead.json
	@echo "reports: $(REPORTS)"

doctor: $(ENVIRONMENT)
	@$(RUN) -m llmkernels doctor

clean:
	rm -rf .venv .venv-triton-* build dist runs bench-results *.egg-info .mypy_cache .ruff_cache .pytest_cache .benchmarks
	rm -f llmkernels/_C.*.so
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
