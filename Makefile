# make reproduce | test | lab | bench | tables. Each sets up .venv by itself; nothing is reinstalled while pyproject.toml and
# constraints.txt stay as they are. In an environment of your own (conda): make reproduce PYTHON=python VENV=
PRESET ?= cpu
VENV ?= .venv
BOOTSTRAP ?= python3
PYTHON ?= $(VENV)/bin/python
READY := $(if $(VENV),$(VENV)/.ready)
SOURCES := packlib tests benchmarks notebooks

.PHONY: reproduce test lab bench tables
.DEFAULT_GOAL := reproduce

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(BOOTSTRAP) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	@echo "setting up $(VENV) (once; some minutes)"
	@test -x $(VENV)/bin/python || $(BOOTSTRAP) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[lab,test]'
	@touch $@

reproduce: $(READY)
	$(PYTHON) -m packlib reproduce $(PRESET)

test: $(READY)
	$(PYTHON) -m ruff check $(SOURCES)
	$(PYTHON) -m ruff format --check $(SOURCES)
	$(PYTHON) -m mypy packlib
	$(PYTHON) -c 'from importlinter.cli import lint_imports_command as lint; lint(["--no-logo"])'
	$(PYTHON) -m pytest

lab: $(READY)
	$(PYTHON) -m jupyter lab notebooks/00_start_here.ipynb

bench: $(READY)
	$(PYTHON) benchmarks/bench_collators.py
	$(PYTHON) benchmarks/bench_dispatch.py
	$(PYTHON) benchmarks/bench_plans.py

tables: $(READY)
	$(PYTHON) -m packlib tables
