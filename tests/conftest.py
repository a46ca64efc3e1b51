"""What all tests share: one thread per library, a runtime folder of their own, a watch over what
they leave behind."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Twenty busy processes beside a test make the start of vLLM take many minutes; that is no fault.
os.environ.setdefault("VLLM_ENGINE_READY_TIMEOUT_S", "2400")
# Read when Triton is first imported (transformers does that): kernels run in its interpreter,
# without a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import psutil
import pytest

# How long an example takes, and how long it takes to be drawn, says more about the machine than
# about the code.
hypothesis.settings.register_profile(
    "zppo", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("zppo")

LEAVE_SECONDS = 60.0


VLLM_SECONDS = 2400.0


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)


LONGEST_FIRST = (
    "tests/integration/test_run.py",
    "tests/actors/engines/vllm/test_vllm_run.py",
    "tests/integration/test_methods_run.py",
    "tests/actors/engines/vllm/test_vllm_engine.py",
    "tests/zppo/test_compare_run.py",
    "tests/integration/",
    "tests/actors/engines/",
    "tests/actors/",
    "tests/kernels/",
    "tests/zppo/training/",
)
"""Files and folders of tests in the order in which workers take them; all others come after. What
takes minutes begins first, so that the workers end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start vLLM's engine have a limit of their own; the longest come first."""
    for item in items:
        if item.get_closest_marker("vllm") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(VLLM_SECONDS))
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    found = (turn for turn, name in enumerate(LONGEST_FIRST) if item.nodeid.startswith(name))
    return next(found, len(LONGEST_FIRST))


@pytest.fixture(scope="session", autouse=True)
def runtime_base() -> Iterator[Path]:
    """A base for runtime folders that no other test process uses; short, because socket paths
    are."""
    shared = Path("/dev/shm")
    folder = Path(
        tempfile.mkdtemp(prefix="zt-", dir=shared if os.access(shared, os.W_OK) else None)
    )
    before = os.environ.get("ZPPO_RUNTIME_DIR")
    os.environ["ZPPO_RUNTIME_DIR"] = str(folder)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
    if before is None:
        del os.environ["ZPPO_RUNTIME_DIR"]
    else:
        os.environ["ZPPO_RUNTIME_DIR"] = before


@pytest.fixture(autouse=True)
def hygiene(runtime_base: Path) -> Iterator[None]:
    """Fail a test that leaves a child process or a runtime folder behind."""
    me = psutil.Process()
    before = set(me.children(recursive=True))
    yield
    new = [child for child in me.children(recursive=True) if child not in before]
    _, alive = psutil.wait_procs(new, timeout=LEAVE_SECONDS)
    commands = [_command(child) for child in alive]
    for child in alive:
        child.kill()
    folders = _left_folders(runtime_base)
    for name in folders:
        shutil.rmtree(runtime_base / name, ignore_errors=True)
    assert not commands, f"processes left behind: {commands}"
    assert not folders, f"runtime folders left behind: {folders}"


@pytest.fixture(autouse=True)
def process_wide() -> Iterator[None]:
    """A command that is called in the process of the tests takes its signals and its log over; the
    next test has them as they were."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    log = logging.getLogger("zppo")
    level, handlers = log.level, list(log.handlers)
    yield
    log.setLevel(level)
    for handler in [handler for handler in log.handlers if handler not in handlers]:
        log.removeHandler(handler)
        handler.close()
    for number, action in before.items():
        if signal.getsignal(number) != action:
            signal.signal(number, action)


def _left_folders(base: Path) -> list[str]:
    """The runtime folders that stay. Whoever has outlived its supervisor is no child of ours, and may
    be about to remove one."""
    deadline = time.monotonic() + LEAVE_SECONDS
    while (folders := sorted(path.name for path in base.glob("zppo-*"))) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.05)
    return folders


def _command(child: psutil.Process) -> str:
    try:
        return " ".join(child.cmdline())
    except psutil.Error:
        return str(child.pid)


# ---- a small run on disk, for tests of the doors -------------------------------------------------

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "max_position_embeddings": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 16,
}
TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"<eos>": 0, "<unk>": 1}, "unk_token": "<unk>"},
}
"""One token a word."""
TOPOLOGY = """\
run: {name: small, directory: small-run, steps: 4}
data: {train: train.jsonl, max_prompt_tokens: 24}
student: {model: student, sampling: {max_new_tokens: 8}}
teacher: {model: teacher, sampling: {max_new_tokens: 8}}
scheduler: {new_questions: 2}
"""


def write_model(folder: Path) -> None:
    """A folder that looks like a model to everything that does not load it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    header = json.dumps({"w": {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]}}).encode()
    (folder / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(32)
    )


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a topology, questions and two model folders; it is the current folder."""
    for name in ("student", "teacher"):
        write_model(tmp_path / name)
    rows = [
        {"id": f"q{i}", "question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(6)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "topology.yaml").write_text(TOPOLOGY)
    monkeypatch.chdir(tmp_path)
    return tmp_path
