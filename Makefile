# make train, make test: all set-up included, in a virtual environment of their own.
PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/tiny
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check

.PHONY: help train test test-all faults lint
help:
	@echo 'make train   install, pretrain the tiny multi-token model on the standard library, show what it writes and how fast'
	@echo 'make test    install, run every test but the slow ones: Slurm, plans of large models, long kill loops'
	@echo 'make test-all   install, run every test'
	@echo 'make faults  install, inject every kind of fault into training, print what survived'
	@echo 'make lint    install, check the style'
	@echo 'variables: PYTHON=$(PYTHON) (3.11 or newer)  VENV=$(VENV)  WORKDIR=$(WORKDIR)'

train: $(VENV)/installed
	$(RUN) -m mtp_jax train --config=configs/tiny.py --workdir=$(WORKDIR)
	$(RUN) -m mtp_jax benchmark decode --workdir=$(WORKDIR)
	$(RUN) -m mtp_jax report --workdir=$(WORKDIR)
	@echo 'next: $(RUN) -m mtp_jax generate --workdir=$(WORKDIR) --prompt="def main():"'

test: $(VENV)/installed-dev
	$(RUN) -m pytest -m 'not slow'

test-all: $(VENV)/installed-dev
	$(RUN) -m pytest

faults: $(VENV)/installed-dev
	$(RUN) tests/faults.py

lint: $(VENV)/installed-dev
	$(RUN) -m ruff check src tests configs docs

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'mtp_jax needs Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.12'; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	@echo 'installing in $(VENV): a few minutes'
	$(PIP) --editable '.[report]'
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/python
	@echo 'installing in $(VENV): a few minutes'
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/installed
