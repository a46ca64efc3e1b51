"""The examples for GPUs as far as they can be checked without one: their settings, and room for
them in the plan."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from zppo.config import load as topologies
from zppo.config.served import served_student
from zppo.errors import UserError
from zppo.plan.engines.vllm import check_vllm_arguments
from zppo.plan.machine import GIB, Machine
from zppo.plan.make import make_plan
from zppo.plan.plan import Plan

ROOT = Path(__file__).resolve().parent.parent
FILE, PAGE = ROOT / "examples/one_gpu.yaml", ROOT / "docs/one_gpu.md"
EIGHT = ROOT / "examples/eight_gpus.yaml"
QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
}
QWEN3_4B = {**QWEN3, "hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32}
QWEN3_8B = {**QWEN3, "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32}
QWEN3_32B = {**QWEN3, "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 64}
QWEN3_SMALL = {**QWEN3, "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16}
QWEN3_2B = {**QWEN3_SMALL, "hidden_size": 2048}
CARD_80, CARD_24 = 78 * GIB, 23 * GIB
"""What is free on cards that are sold as 80 and 24 GB."""


def write_model(folder: Path, config: dict[str, Any], parameters: int, dtype: str = "BF16") -> None:
    """A folder that tells the plan the size of a model; its weights are a hole in a file."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    size = parameters * {"BF16": 2, "F8_E4M3": 1}[dtype]
    tensor = {"dtype": dtype, "shape": [parameters], "data_offsets": [0, size]}
    header = json.dumps({"w": tensor}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example next to models of the sizes that the page names."""
    monkeypatch.setenv("TEACHER_KEY", "secret")
    monkeypatch.setattr(
        "zppo.plan.checks.check_vllm_arguments", lambda *given: None
    )  # vLLM need not be installed
    write_model(tmp_path / "models/student", QWEN3_4B, 4_022_468_096)
    write_model(tmp_path / "models/small", QWEN3_SMALL, 751_632_384)
    write_model(tmp_path / "models/medium", QWEN3_2B, 2_031_739_904)
    return Path(shutil.copy(FILE, tmp_path / "one_gpu.yaml"))


def plan_of(file: Path, gpus: list[int], *overrides: str) -> Plan:
    machine = Machine(cores=16, memory=48 * GIB, shared=32 * GIB, gpus=gpus)
    return make_plan(topologies.load(file, overrides), 20_000, machine)


def overrides_of(section: str) -> list[str]:
    """The `--set` of the launch in a section of the page."""
    text = PAGE.read_text(encoding="utf-8").partition(f"**{section}.**")[2]
    launch = re.search(r"zppo launch (.*?)\n```", text, flags=re.DOTALL)
    assert launch is not None
    words = shlex.split(launch[1].replace("\\\n", " "))
    return [value for option, value in pairwise(words) if option == "--set"]


def test_settings_are_known_and_the_card_is_shared_on_purpose() -> None:
    topology = topologies.load(FILE)
    assert topology.method.name == "zppo"
    rollout, trainer = topology.actors.rollout, topology.actors.trainer
    assert rollout.devices == [trainer.device] == ["cuda:0"]
    assert {"gpu_memory_utilization", "kv_cache_memory_bytes"} <= set(rollout.engine_args)
    assert trainer.micro_batch_tokens == rollout.engine_args["max_model_len"]


def test_it_fits_a_card_of_80_gb(copied: Path) -> None:
    plan = plan_of(copied, [CARD_80])
    assert [entry.name for entry in plan.processes if entry.device == "cuda:0"] == [
        "trainer",
        "rollout-0",
    ]
    assert (plan.windows.steps, plan.notes) == (200, [])


def test_a_smaller_student_fits_a_card_of_24_gb(copied: Path) -> None:
    overrides = overrides_of("24 GB")
    assert plan_of(copied, [CARD_24], *overrides).windows.steps == 200
    with pytest.raises(UserError, match=r"the plan needs .* on cuda:0 but 23\.0 GiB are free"):
        plan_of(copied, [CARD_24], *overrides, "student.model=models/medium")


def test_eight_cards_of_80_gb_hold_ranks_engines_and_a_teacher_in_fp8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zppo.plan.checks.check_vllm_arguments", lambda *given: None)
    write_model(tmp_path / "models/student", QWEN3_8B, 8_190_735_360)
    fp8 = {**QWEN3_32B, "quantization_config": {"quant_method": "fp8"}}
    write_model(tmp_path / "models/teacher", fp8, 32_762_123_264, "F8_E4M3")
    write_model(tmp_path / "models/whole", QWEN3_32B, 32_762_123_264)
    file = Path(shutil.copy(EIGHT, tmp_path / "eight_gpus.yaml"))
    machine = Machine(cores=64, memory=128 * GIB, shared=64 * GIB, gpus=[CARD_80] * 8)

    plan = make_plan(topologies.load(file, []), 50_000, machine)
    needs = zip(plan.processes, plan.needs, strict=True)
    cards = [(one.device, one.role, round(need.device / GIB)) for one, need in needs if need.device]
    assert cards == [
        ("cuda:0", "trainer", 46),
        *((f"cuda:{i}", "rank", 46) for i in (1, 2, 3)),
        *((f"cuda:{i}", "rollout", 20) for i in (4, 5, 6)),
        ("cuda:7", "teacher", 36),
    ]

    wider = make_plan(topologies.load(file, ["teacher.model=models/whole"]), 50_000, machine)
    assert round(max(need.device for need in wider.needs) / GIB) == 67, "the same in bfloat16"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_knows_the_engine_arguments() -> None:
    check_vllm_arguments(served_student(topologies.load(FILE)))
