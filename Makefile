# `make` alone lists the targets.
#
# Which Python: an active environment (VIRTUAL_ENV, or CONDA_PREFIX other than conda's base) is used as it is, and
# so is PYTHON=... when it lies in a virtual environment; missing packages are added to it, none is changed.
# Otherwise .venv is made once from PYTHON (or the first fitting python3 on the path) and the lock installed into it.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test lint bench lock

DESCRIBE := import sys; print("env" if sys.prefix != sys.base_prefix else "base", "%d.%d" % sys.version_info[:2])

ifdef PYTHON
GIVEN := $(shell $(PYTHON) -c '$(DESCRIBE)' 2>/dev/null)
ifeq ($(GIVEN),)
$(error PYTHON=$(PYTHON) does not run. Give the path of a Python from 3.10 to 3.12)
endif
ifeq ($(word 1,$(GIVEN)),env)
ACTIVE := $(PYTHON)
else
HELD := $(shell .venv/bin/python -c '$(DESCRIBE)' 2>/dev/null)
ifneq ($(word 2,$(HELD)),)
ifneq ($(word 2,$(HELD)),$(word 2,$(GIVEN)))
$(error .venv holds Python $(word 2,$(HELD)), but PYTHON=$(PYTHON) is $(word 2,$(GIVEN)). Remove .venv to have it made anew)
endif
endif
endif
else ifdef VIRTUAL_ENV
ACTIVE := $(VIRTUAL_ENV)/bin/python
else ifdef CONDA_PREFIX
ifneq ($(CONDA_DEFAULT_ENV),base)
ACTIVE := $(CONDA_PREFIX)/bin/python
endif
endif

ifdef ACTIVE
READY := active
PY := $(ACTIVE)
else
READY := .venv/installed
PY := $(CURDIR)/.venv/bin/python
endif

help: ## list the targets
	@echo "make TARGET [PYTHON=python3.12]"
	@sed -n 's/^\([a-z]*\):[^#]*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r target text; do \
	    printf '  %-8s %s\n' "$$target" "$$text"; done

demo: $(READY) ## small cohort, patches, LMDB, training end to end, test result (5 minutes on 2 cores)
	PYTHON="$(PY)" bash tests/demo.sh demo

test: $(READY) ## all tests (ARGS="-k store" picks some)
	"$(PY)" -m pytest $(ARGS)

lint: $(READY) ## ruff, formatting, types
	"$(PY)" -m ruff check .
	"$(PY)" -m ruff format --check .
	"$(PY)" -m mypy

bench: $(READY) ## the measurements behind each claim about speed
	@for script in benchmarks/[a-z]*.py; do name=$$(basename "$$script" .py); echo "== $$name"; \
	    "$(PY)" -m "benchmarks.$$name" || exit; done

# For maintainers, with uv in the environment: solves requirements-dev.txt anew for every supported Python.
lock: $(READY)
	@{ sed -n '/^#/p' requirements.lock; echo "torch==2.11.0"; echo "torchvision==0.26.0"; } > .lock.in
	{ sed -n '/^#/p' .lock.in; "$(PY)" -m uv pip compile --quiet --universal --python-version 3.10 --no-header \
	    --no-annotate --constraints .lock.in requirements-dev.txt; } > .lock.out
	mv .lock.out requirements.lock; rm .lock.in

.PHONY: active
active:
	@"$(PY)" utils/environment.py

.venv/installed: requirements.lock
	@PYTHON="$(PYTHON)" bash .ci/venv.sh
	@touch $@
