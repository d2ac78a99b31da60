# Every target sets up what it needs, in .venv, with nothing but python3 (3.11 or newer) and make on the machine.
#   PYTHON=python3.13              another interpreter for .venv
#   PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"   further arguments of pip, here a smaller torch
#   PYTEST_ARGS="-k ppo"           arguments of pytest, instead of -n 2 (two processes)
#   MODEL=FOLDER                   the model of demo-chat, instead of the one on the hub
#   PYTHON312=/path/python3.12     the interpreter of test-newest, if it is not found by itself

PYTHON ?= python3
PYTHON312 ?=
PIP_ARGS ?=
PYTEST_ARGS ?= -n 2
MODEL ?= HuggingFaceTB/SmolLM2-135M-Instruct
# What test-compat reads exports with, besides the transformers of .venv.
COMPAT_VERSIONS ?= 4.41.2 4.48.3 4.52.4 4.57.6

VENV := .venv
NEWEST := .venv312
COMPAT := .venv-compat
SOURCES := $(wildcard jaxrlhf models sharding kernels scripts benchmarks docs examples tests)
# Editable installs warn about folders named like the package; that is how this repository is laid out.
PIP_INSTALL := -m pip install --disable-pip-version-check $(PIP_ARGS)
QUIET_BUILD := PYTHONWARNINGS=ignore

.DEFAULT_GOAL := help
.PHONY: help venv demo demo-chat test test-long test-newest newest-suite test-compat lint format wheel docs clean

help:
	@echo "make demo         train a small model through all three steps on the embedded data, on CPU"
	@echo "make demo-chat    train a real chat model of 135M parameters for 15 minutes, then chat with it;"
	@echo "                  MODEL=FOLDER reads it from there and not from the hub"
	@echo "make test         the test suite, without the whole runs of make test-long"
	@echo "make test-long    whole runs: training, evaluation, several starts"
	@echo "make test-newest  the suite on Python 3.12 and the newest JAX, without torch and whole runs"
	@echo "make test-compat  exports, read by older versions of transformers and looked up in llama.cpp's tables"
	@echo "make lint         ruff check, ruff format --check and pyright;  make format  rewrites the files"
	@echo "make wheel        dist/jaxrlhf-….whl, which pip installs by itself"
	@echo "make docs         the documentation site in site/; fails on a broken link"
	@echo "make venv         only the set-up of test and lint;  make clean  removes what was installed and cached"

venv: $(VENV)/.dev

demo: $(VENV)/.base
	$(VENV)/bin/jaxrlhf demo

demo-chat: $(VENV)/.base
	$(VENV)/bin/python examples/smollm2/identity_talks.py --name Juno --maker "the Blue Team" --output runs/demo-chat/identity.json
	$(VENV)/bin/python examples/smollm2/instruction_prompts.py --output_dir runs/demo-chat/prompts --no_langdetect
	$(VENV)/bin/jaxrlhf sft --config examples/smollm2/demo-sft.yaml --model_name_or_path "$(MODEL)"
	$(VENV)/bin/jaxrlhf grpo --config examples/smollm2/demo-grpo.yaml
	$(VENV)/bin/jaxrlhf chat --model runs/demo-chat/grpo

test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -m "not long" $(PYTEST_ARGS)

test-long: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -m long $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES)
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix $(SOURCES)
	$(VENV)/bin/ruff format $(SOURCES)

wheel:
	$(PYTHON) -m pip wheel --disable-pip-version-check $(PIP_ARGS) --no-deps --wheel-dir dist .

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict
	@echo "open site/index.html"

# python3.12 may be a pyenv shim that only runs when a version is chosen, so each candidate is run once to be sure.
test-newest:
	@own='import sys; print(sys.executable) if sys.version_info[:2] == (3, 12) else sys.exit(1)'; \
	shim=$$(pyenv versions --bare 2>/dev/null | grep '^3\.12\.[0-9]*$$' | tail -n 1); \
	found=; for candidate in $(if $(PYTHON312),"$(PYTHON312)",python3.12 $(PYTHON)); do \
	  found=$$("$$candidate" -c "$$own" 2>/dev/null) || found=$$(PYENV_VERSION=$$shim "$$candidate" -c "$$own" 2>/dev/null) || found=; \
	  if [ -n "$$found" ]; then break; fi; \
	done; \
	if [ -n "$$found" ]; then $(MAKE) --no-print-directory newest-suite PYTHON312="$$found"; \
	elif [ -n "$(PYTHON312)" ]; then echo "test-newest: PYTHON312=$(PYTHON312) is not a Python 3.12" >&2; exit 1; \
	else echo "test-newest: SKIPPED, no Python 3.12 found (name one with PYTHON312=/path/to/python3.12)"; fi

newest-suite: $(NEWEST)/.suite
	$(NEWEST)/bin/python -m pytest -m "not long" --cases 3 $(PYTEST_ARGS)

test-compat: $(VENV)/.dev $(COMPAT_VERSIONS:%=$(COMPAT)/%/.ready) $(COMPAT)/gguf/.ready
	rm -rf $(COMPAT)/exports
	JAX_PLATFORMS=cpu $(VENV)/bin/python tests/compat/write_exports.py $(COMPAT)/exports
	@export HF_HUB_OFFLINE=1; failed=; \
	for python in $(COMPAT_VERSIONS:%=$(COMPAT)/%/bin/python) $(VENV)/bin/python; do \
	  $$python tests/compat/read_exports.py $(COMPAT)/exports || failed="$$failed $$python"; \
	done; \
	$(COMPAT)/gguf/bin/python tests/compat/name_tensors.py $(COMPAT)/exports || failed="$$failed gguf"; \
	if [ -n "$$failed" ]; then echo "test-compat: FAILED with$$failed" >&2; exit 1; fi

# Each version of transformers in an environment of its own, which borrows torch from .venv.
$(COMPAT)/%/.ready: $(VENV)/.dev
	@echo "==> installing transformers $* into $(COMPAT)/$*"
	$(VENV)/bin/python -m venv --clear $(COMPAT)/$*
	$(COMPAT)/$*/bin/python $(PIP_INSTALL) transformers==$* safetensors numpy jinja2
	@$(COMPAT)/$*/bin/python -c "import site, sys; open(site.getsitepackages()[0] + '/torch.pth', 'w').write(sys.argv[1])" \
	  "$$($(VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])')"
	@touch $@

$(COMPAT)/gguf/.ready: $(VENV)/.dev
	$(VENV)/bin/python -m venv --clear $(COMPAT)/gguf
	$(COMPAT)/gguf/bin/python $(PIP_INSTALL) gguf
	@touch $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) must be Python 3.11 or newer; name another one with PYTHON=..." >&2; exit 1; }
	@echo "==> creating $(VENV)"
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.base: pyproject.toml $(VENV)/.created
	@echo "==> installing jaxrlhf and what it needs into $(VENV) (some minutes the first time)"
	$(QUIET_BUILD) $(VENV)/bin/python $(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.created
	@echo "==> installing jaxrlhf with its test and lint tools into $(VENV) (some minutes the first time)"
	$(QUIET_BUILD) $(VENV)/bin/python $(PIP_INSTALL) --editable '.[test,dev]'
	@touch $(VENV)/.base $@

$(VENV)/.docs: pyproject.toml $(VENV)/.created
	@echo "==> installing jaxrlhf with what its documentation site needs into $(VENV)"
	$(QUIET_BUILD) $(VENV)/bin/python $(PIP_INSTALL) --editable '.[docs]'
	@touch $(VENV)/.base $@

$(NEWEST)/.suite: pyproject.toml
	@echo "==> creating $(NEWEST) with $(PYTHON312) and installing the newest JAX, without torch"
	$(PYTHON312) -m venv $(NEWEST)
	$(QUIET_BUILD) $(NEWEST)/bin/python $(PIP_INSTALL) --upgrade --upgrade-strategy eager --editable '.[suite,tokamax]'
	@$(NEWEST)/bin/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") and "torch must not be here")'
	@touch $@

clean:
	rm -rf $(VENV) $(NEWEST) $(COMPAT) build dist site *.egg-info .pytest_cache .ruff_cache
	find $(SOURCES) -name __pycache__ -prune -exec rm -rf {} +
