# make reproduce | test | lab | browser | book | bench | tables. Each sets up .venv by itself; nothing is reinstalled while pyproject.toml and
# constraints.txt stay as they are. In an environment of your own (conda): make reproduce PYTHON=python VENV=
PRESET ?= cpu
VENV ?= .venv
BOOTSTRAP ?= python3
PYTHON ?= $(VENV)/bin/python
READY := $(if $(VENV),$(VENV)/.ready)
PAGES := $(if $(VENV),$(VENV)/.pages)
SOURCES := packlib tests benchmarks notebooks

.PHONY: reproduce test lab browser book bench tables
.DEFAULT_GOAL := reproduce

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(BOOTSTRAP) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	@echo "setting up $(VENV) (once; some minutes)"
	@test -x $(VENV)/bin/python || $(BOOTSTRAP) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[lab,test]'
	@touch $@

$(VENV)/.pages: $(VENV)/.ready
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[book,browser]'
	@touch $@

reproduce: $(READY)
	$(PYTHON) -m packlib reproduce $(PRESET)

test: $(READY)
	$(PYTHON) -m ruff check $(SOURCES)
	$(PYTHON) -m ruff format --check $(SOURCES)
	$(PYTHON) -m mypy packlib
	$(PYTHON) -c 'from importlinter.cli import lint_imports_command as lint; lint(["--no-logo"])'
	$(PYTHON) -m pytest

# The repository is its root, 00 its first page; what is run there does not change tracked notebooks (packlib/lab/pages/contents.py).
lab: $(READY)
	$(PYTHON) -m jupyter lab --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb --ServerApp.contents_manager_class=packlib.lab.pages.contents.Contents

# JupyterLab and the book in a real browser; without Chromium it says so, and passes. ONLY=: pytest's -k.
browser: $(PAGES)
	$(PYTHON) -m pytest -n 0 -m browser tests/browser $(if $(ONLY),-k "$(ONLY)")

book: $(PAGES)
	$(PYTHON) -m packlib book

bench: $(READY)
	$(PYTHON) benchmarks/bench_collators.py
	$(PYTHON) benchmarks/bench_dispatch.py
	$(PYTHON) benchmarks/bench_plans.py

tables: $(READY)
	$(PYTHON) -m packlib tables
