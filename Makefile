# make demo | test | bench | lint | format | clean
#   make test ARGS="-k decode"    make bench ARGS="--rows decode"    make demo PYTHON=python3.12 VENV=.venv312
# Needs python3 (3.10 or newer), a C++ compiler and make. Everything is installed into .venv, which is made when missing;
# a torch that python3 has already is used. Nothing is done twice: the second call starts at once.

PYTHON ?= python3
VENV ?= .venv
TORCH_SPEC ?= torch>=2.10
ARGS ?=

# Without a GPU, torch's CPU build (0.2 GB instead of several) is taken where pip finds it. TORCH_INDEX= turns that off.
ifeq ($(wildcard /dev/nvidiactl /dev/kfd)$(PIP_INDEX_URL)$(PIP_NO_INDEX)$(filter-out Linux,$(shell uname -s)),)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
endif

BIN := $(VENV)/bin
NATIVE := pyproject.toml setup.py $(wildcard build_backend/*.py) $(shell find csrc -type f)
PIP := $(BIN)/python -m pip --disable-pip-version-check

demo: $(VENV)/.with-demo
	$(BIN)/python -m flash_ext demo $(ARGS)

test: $(VENV)/.with-test
	$(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/.with-bench
	$(BIN)/python bench/cpu.py $(ARGS)

lint: $(VENV)/.with-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.h' '*.cpp' '*.cu' | grep -v ^third_party/ | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.with-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.h' '*.cpp' '*.cu' | grep -v ^third_party/ | xargs $(BIN)/clang-format -i

clean:
	rm -rf build dist *.egg-info flash_ext/*.so .pytest_cache .ruff_cache .hypothesis
	@echo "$(VENV) is kept; remove it by hand"

# Python files are used from this folder; only a change in the native part or in pyproject.toml installs again.
$(VENV)/.with-demo $(VENV)/.with-test $(VENV)/.with-bench: $(VENV)/.with-%: $(VENV)/.with-torch $(NATIVE)
	$(PIP) install --constraint $(VENV)/.with-torch --editable '.[$*]'
	@touch $@

$(VENV)/.with-dev: pyproject.toml
	@$(MAKE) --no-print-directory $(BIN)/python
	$(PIP) install $$(sed -n 's/^dev = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
	@touch $@

# The file holds torch's exact version, so that no extra can replace it.
$(VENV)/.with-torch:
	@$(MAKE) --no-print-directory $(BIN)/python
	@$(BIN)/python -c 'import torch' 2>/dev/null || { \
	  echo "installing $(TORCH_SPEC)"; \
	  $(PIP) install '$(TORCH_SPEC)' $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)); }
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("flash_ext needs Python 3.10 or newer, $(PYTHON) is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	@command -v $(CXX) g++ clang++ > /dev/null || \
	  { echo "flash_ext needs a C++ compiler: install g++ 11 or clang 14 or newer"; exit 1; }
	$(PYTHON) -m venv $$($(PYTHON) -c 'import torch' 2> /dev/null && echo --system-site-packages) $(VENV)

.PHONY: demo test bench lint format clean
.DELETE_ON_ERROR:
