# Each target sets up .venv on first use (bare Python >= 3.11 and a package index are enough) and is quick afterwards.
#   make demo     train a small pruner on the embedded model, measure it, use it
#   make test     all tests
#   make quality  ruff and mypy       make style  reformat       make clean  remove what was generated
#
# PYTHON=… another interpreter; TORCH=… another torch, e.g. `make test TORCH='torch==2.15.0'`.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
# Without an NVIDIA GPU a fixed release keeps an unpinned requirement from drawing in a newer torch with CUDA libraries.
TORCH ?= $(shell if nvidia-smi >/dev/null 2>&1; then echo torch; else echo 'torch==2.13.0'; fi)

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: demo test quality style clean install
.DEFAULT_GOAL := demo

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found; name one with: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (about a minute the first time) ..."
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt '$(TORCH)' -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	@$(PY) -m trainers.demo

test: $(STAMP)
	@$(PY) -m pytest

quality: $(STAMP)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

style: $(STAMP)
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

clean:
	rm -rf build dist runs lightning_logs .mypy_cache .ruff_cache .pytest_cache *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
