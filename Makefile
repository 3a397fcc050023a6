# Everything from nothing: Python 3.10 or newer and make are enough.
#
#   make book    run the notebooks that changed, then build _build/html/index.html
#   make test    run the tests, then every notebook

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready

.PHONY: help test book bench lint clean distclean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|'

test: $(READY)  ## the tests, then every notebook
	$(PY) -m pytest -n logical --maxprocesses 4 --dist loadfile
	$(PY) book/make.py run

book: $(READY)  ## the book: _build/html/index.html
	$(PY) book/make.py

bench: $(READY)  ## speed of the parts that have a target
	$(PY) bench.py

lint: $(READY)  ## style of code and notebooks; notebooks carry no outputs
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m nbstripout --verify --keep-id --extra-keys metadata.language_info.version notebooks/*.ipynb

clean:  ## remove what was built; keep the virtual environment
	rm -rf build _build .pytest_cache .ruff_cache *.egg-info

distclean: clean  ## remove the virtual environment too
	rm -rf $(VENV)

# The environment is made once, and again when what it must hold changes.
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --editable '.[book,test]'
	@touch $@
