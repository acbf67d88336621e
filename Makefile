# `make demo`, `make study` and `make test` set up .venv on first use and do nothing again when it is there.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= demo,models,perf,study,test
RUN = $(VENV)/bin/python
# Two runs at once take turns; the second finds the work done. Without flock (macOS) they must not overlap.
LOCK = $(if $(shell command -v flock),flock Makefile)

.PHONY: help setup demo study test test-all test-versions mutants fuzz sanitize gpu-check lint clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | expand -t 12

setup:  ## the virtual environment, once and after pyproject.toml changes
	@$(LOCK) $(MAKE) --no-print-directory $(VENV)/.installed

# The mark comes last: an installation that was interrupted is taken up again.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

demo: setup  ## train on real digits, fused and eager side by side, then a quick profile
	$(VENV)/bin/fused-rect demo
	$(VENV)/bin/fused-rect profile --quick

# Minutes on two cores; STUDY passes options on, e.g. make study STUDY="--seeds 20 --out study-20".
study: setup  ## repeat the evaluation of Xu et al. 2015
	$(VENV)/bin/fused-rect study $(STUDY)

lint: setup  ## ruff, its formatter, and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

test: lint  ## all but the long sweeps
	$(RUN) -m pytest -n 2 -m "not exhaustive"

test-all: lint  ## everything
	$(RUN) -m pytest -n 2

# Other versions of torch and Python, gigabytes and a quarter of an hour each, e.g. make test-versions VERSIONS="2.11.0 -- -x".
test-versions: setup  ## the tests on the oldest and the newest torch
	$(RUN) tests/versions.py $(VERSIONS)

# Breaks the code on purpose and expects a test to fail, e.g. make mutants MUTANTS=philox; half an hour on two cores.
mutants: setup  ## break the code on purpose
	$(RUN) tests/mutation.py $(MUTANTS)

# Random cases, e.g. make fuzz FUZZ="native --seed 7 --count 10000"; a wrong one is named, and can be repeated by itself.
fuzz: setup  ## random cases on every path, against eager, float64 and torch's autograd
	$(RUN) tests/fuzz.py $(FUZZ)

# e.g. make sanitize SANITIZE="--seed 7 --count 5000"; the first run builds four programs, a minute each.
sanitize: setup  ## the C++ kernels under address, undefined-behaviour and thread sanitizers
	$(RUN) tests/sanitize.py $(SANITIZE)

# Eight minutes at most; GPU_CHECK passes options on, e.g. make gpu-check GPU_CHECK="--dry-run" says what it would do.
# The machine's own Python where its torch sees a GPU, so that nothing is installed or fetched; else .venv's.
gpu-check:  ## all that needs a GPU; writes perf/results/
	@if $(PYTHON) -c 'import pandas, rich, scipy, triton, torch; assert torch.cuda.is_available()' 2>/dev/null; \
	then run=$(PYTHON); else $(MAKE) --no-print-directory setup && run=$(RUN); fi && \
	PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $$run -m fused_rect.perf.gpu_check --results perf/results $(GPU_CHECK)

clean:  ## remove the environment and build outputs
	rm -rf $(VENV) build dist *.egg-info
