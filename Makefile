# `make` lists the targets. A fresh machine needs Python 3.11+ with pip, and make.

VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -c constraints.txt
TORCH  := $(shell sed -n '/^torch==/p' constraints.txt)
HOME_OF_TESTS := $(CURDIR)/.test-home
MODEL  := smollm2-135m

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PIP_REQUIRE_VIRTUALENV := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve test check format docs bench pin clean model-of-tests

# Not a target of its own: a failure is then one line, not one for each make in between.
define CHECKS
@$(BIN)/ruff format --check --quiet . || { echo "run: make format"; exit 1; }
@$(BIN)/ruff check --quiet .
@$(BIN)/mypy
@$(BIN)/lint-imports --no-logo
endef

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

serve: $(VENV)/.serve ## Start Fort Point (PORT, default 8080; FORTPOINT_HOME, default ~/.fortpoint)
	@exec $(BIN)/fortpoint serve

test: $(VENV)/.dev model-of-tests ## Everything: format, lint, types, import contracts, the whole suite
	$(CHECKS)
	@env -u FORTPOINT_HOME -u PORT $(BIN)/pytest

check: $(VENV)/.dev ## The fast loop: lint, types, import contracts, tests without the model
	$(CHECKS)
	@env -u FORTPOINT_HOME -u PORT $(BIN)/pytest -m "not model"

format: $(VENV)/.dev ## Format the code and mend what ruff can mend
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

docs: $(VENV)/.serve ## Rewrite docs/configuration.md and the README's help blocks
	@$(BIN)/python scripts/update_docs.py

bench: ## List the benchmarks, one script for each claim
	@for script in benchmarks/*.py; do \
	  test -e "$$script" || { echo "no benchmarks yet"; break; }; \
	  printf '  %-44s %s\n' "$(BIN)/python $$script" \
	    "$$(sed -n '1s/^[^"]*"""\([^"]*\).*/\1/p' "$$script")"; \
	done

pin: $(VENV)/.dev ## Rewrite constraints.txt from what .venv has
	@$(BIN)/python -m pip install -q -e '.[dev]' --no-build-isolation
	@$(BIN)/python scripts/pin_dependencies.py

clean: ## Remove .venv, the tests' home and all caches (never FORTPOINT_HOME)
	@rm -rf $(VENV) .test-home build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache \
	  .hypothesis .import_linter_cache .schemathesis
	@find src tests benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} +

model-of-tests: $(VENV)/.dev
	@FORTPOINT_HOME=$(HOME_OF_TESTS) $(BIN)/fortpoint model pull $(MODEL)

# The first python that is new enough and can make a virtual environment. Each is run, not
# only found: a version manager's shim may exist for a version that it does not have.
$(BIN)/python:
	@for python in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	      >/dev/null 2>&1; then \
	    echo "[1/3] making $(VENV) with $$("$$python" --version 2>&1)"; \
	    "$$python" -m venv --clear $(VENV); exit; \
	  fi; \
	done; \
	echo "Fort Point needs Python 3.11 or newer with pip and venv, and found:" >&2; \
	(python3 --version 2>&1 || echo "no python3") | sed -n '1s/^/  /p' >&2; \
	echo "Install it (on Debian: apt install python3 python3-venv) and run make again." >&2; \
	exit 1

# torch comes first and by plain pip: PIP_FIND_LINKS and pip's own settings choose its build.
$(VENV)/.serve: pyproject.toml constraints.txt | $(BIN)/python
	@echo "[2/3] installing $(TORCH), the largest part (1 to 3 minutes the first time)"
	@$(PIP) $(if $(MAKE_TERMOUT),,-qq) $(TORCH) $$(sed -n '/^setuptools==/p' constraints.txt)
	@echo "[3/3] installing the other dependencies (about 1 minute the first time)"
	@$(PIP) -qq --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.serve
	@echo "installing what the checks and tests need (about 1 minute the first time)"
	@$(PIP) -qq --no-build-isolation -e '.[dev]'
	@touch $@
