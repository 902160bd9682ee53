# Everything happens in a virtual environment of the project's own; nothing else has to be prepared.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest

.PHONY: help install demo test test-slow test-browser soak fuzz conformance docs lint types names clean

help:
	@echo "make demo           videos to a trained model and runs/demo/report.html (VIDEOS=/some/folder for your own)"
	@echo "make test           the tests (minutes)"
	@echo "make test-slow      compile, many-kills and other long tests"
	@echo "make test-browser   pages in headless Chromium"
	@echo "make soak fuzz      memory and kills over long runs; thousands of damaged inputs (minutes each)"
	@echo "make conformance    measure every reader on every kind of video, and write docs/conformance.md"
	@echo "make docs           the documentation as a site, in build/site, with its pictures drawn anew"
	@echo "make lint types     ruff and mypy"
	@echo "make clean          remove the virtual environment and everything built"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "framestream needs Python >= 3.10; set PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "could not create $(VENV): install your system's venv package (Debian: python3-venv)" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77"
	@echo "installing framestream and what it needs into $(VENV) (PyTorch is large: this takes some minutes once)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

demo: $(INSTALLED)
	$(BIN)/framestream demo --output runs/demo $(if $(VIDEOS),--videos "$(VIDEOS)")

# A file of tests stays on one process, because its tests share what they have built.
test: $(INSTALLED)
	$(PYTEST) -n auto --maxprocesses 8 --dist loadfile

test-slow: $(INSTALLED)
	$(PYTEST) -m slow

test-browser: $(INSTALLED)
	$(PYTEST) -m browser

soak: $(INSTALLED)
	$(PYTEST) -m soak -s

fuzz: $(INSTALLED)
	$(PYTEST) -m fuzz -s

# DECORD2 and TORCHCODEC are folders that hold those readers (pip install --no-deps --target FOLDER decord2).
conformance: $(INSTALLED)
	$(BIN)/python tests/write_conformance.py $(if $(DECORD2),--decord2 "$(DECORD2)") \
	  $(if $(TORCHCODEC),--torchcodec "$(TORCHCODEC)")

docs: $(INSTALLED) names
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	$(BIN)/python -m framestream.tools.draw_docs docs/images
	$(BIN)/mkdocs build --strict

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy and mkdocstrings look packages up by folder, so give them one in which the installed names hold.
names:
	@mkdir -p build/types/framestream
	@for p in pipeline model tools configs; do ln -sfn "$(CURDIR)/$$p" build/types/framestream/$$p; done

types: $(INSTALLED) names
	MYPYPATH=build/types $(BIN)/mypy -p framestream.pipeline -p framestream.model -p framestream.tools

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
