# `make demo`, `make study` and `make test` set up .venv on first use and do nothing again when it is there.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= demo,models,perf,study,test
RUN = $(VENV)/bin/python

.PHONY: setup demo study test test-all mutants gpu-check lint clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

demo: setup
	$(VENV)/bin/fused-rect demo
	$(VENV)/bin/fused-rect profile --quick

# Minutes on two cores; STUDY passes options on, e.g. make study STUDY="--seeds 20 --out study-20".
study: setup
	$(VENV)/bin/fused-rect study $(STUDY)

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m mypy

test: lint
	$(RUN) -m pytest -n 2 -m "not exhaustive"

test-all: lint
	$(RUN) -m pytest -n 2

# Breaks the code on purpose and expects a test to fail, e.g. make mutants MUTANTS=philox; about 20 minutes on two cores.
mutants: setup
	$(RUN) tests/mutation.py $(MUTANTS)

# On a machine with a GPU: kernels, tests, times, CUDA graphs, compute-sanitizer; writes perf/results/.
gpu-check: setup
	$(RUN) -m fused_rect.perf.gpu_check

clean:
	rm -rf $(VENV) build dist *.egg-info
