# The two commands are `make quickstart` and `make test`. Both make the virtual environment on first use, install the
# pinned dependencies into it, and reuse it while pyproject.toml and requirements.lock stay as they are.

PYTHON ?= python3
VENV ?= .venv
RUN := runs/quickstart
WORKERS := 2
BIN := $(VENV)/bin

.PHONY: quickstart test lint check-python clean

quickstart: $(VENV)/.installed
	@if [ -e "$(RUN)" ]; then echo "$(RUN) exists already; look at it with '$(BIN)/zppo report $(RUN)', or remove it" >&2; exit 2; fi
	$(BIN)/python -m zppo.launch --topology examples/quickstart.yaml --set run.directory=$(RUN)
	$(BIN)/python -m zppo.report $(RUN)

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

check-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "zppo needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true); name another one with PYTHON=..." >&2; \
		exit 2; }

$(VENV)/.installed: pyproject.toml requirements.lock | check-python
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev]'
	@touch $@
