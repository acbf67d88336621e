# `make demo` and `make test` set up .venv on first use and do nothing again when it is there.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= demo,models,perf,study,test
RUN = $(VENV)/bin/python

.PHONY: setup demo test test-all lint clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

demo: setup
	$(VENV)/bin/fused-rect demo

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m mypy

test: lint
	$(RUN) -m pytest -n 2 -m "not exhaustive"

test-all: lint
	$(RUN) -m pytest -n 2

clean:
	rm -rf $(VENV) build dist *.egg-info
