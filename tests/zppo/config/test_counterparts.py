"""Names of other tools: each leads to a setting that exists, and says so in one sentence."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from zppo.config.counterparts import ABSENT, COUNTERPARTS
from zppo.config.load import load, setting_names
from zppo.errors import UserError

BASE = "data: {train: q.jsonl}\nstudent: {model: m}\n"


def test_every_counterpart_is_a_setting() -> None:
    assert {one.ours for one in COUNTERPARTS} <= set(setting_names())


def test_no_name_means_two_things() -> None:
    names = [name for one in COUNTERPARTS for name in f"{one.trl} {one.verl} {one.typed}".split()]
    names += [name for group in ABSENT.values() for name in group.split()]
    twice = {name for name, count in Counter(names).items() if count > 1}
    assert twice <= {name.rpartition(".")[2] for name in setting_names()}


NAMES = [
    ("lr: 1", "lr (it is called 'optimizer.learning_rate' here, constant)"),
    (
        "optimizer: {lr: 1}",
        "optimizer.lr (it is called 'optimizer.learning_rate' here, constant)",
    ),
    ("learning_rate: 1", "learning_rate (it is called 'optimizer.learning_rate' here, constant)"),
    (
        "batch_size: 8",
        (
            "batch_size (it is called 'scheduler.new_questions' here, counted in questions, each with "
            "method.group_size responses)"
        ),
    ),
    (
        "method: {num_generations: 8}",
        "method.num_generations (it is called 'method.group_size' here)",
    ),
    ("method: {epsilon: 0.2}", "method.epsilon (it is called 'method.clip_low' here)"),
    (
        "use_vllm: true",
        "use_vllm (it is called 'actors.rollout.engine' here, transformers or vllm)",
    ),
    (
        "wandb: true",
        (
            "wandb (it is called 'sinks.wandb' here, also sinks.trackio, sinks.mlflow and "
            "sinks.tensorboard)"
        ),
    ),
    ("beta: 0.04", "beta (it is called 'method.kl_coefficient' here, 0 is off)"),
    ("reward_funcs: []", "reward_funcs (it is called 'data.reward' here)"),
    ("lora: {rank: 8}", "lora (LoRA is not built, all weights are trained)"),
    (
        "actor_rollout_ref: {rollout: {n: 8}}",
        ("actor_rollout_ref (docs/from_verl.md has our names for the settings of verl's sections)"),
    ),
    ("optimizer: {beta: 0.9}", "optimizer.beta (did you mean 'beta2'?)"),
]


@pytest.mark.parametrize(("text", "sentence"), NAMES)
def test_a_name_of_another_tool_in_the_file(text: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(BASE + text + "\n")
    with pytest.raises(UserError) as caught:
        load(file)
    assert str(caught.value) == f"{file}:3: there is no setting {sentence}"


OVERRIDES = [
    (
        "actor_rollout_ref.rollout.n",
        "actor_rollout_ref (it is called 'method.group_size' here)",
    ),
    (
        "actor_rollout_ref.rollout.tensor_model_parallel_size",
        "actor_rollout_ref (it is called 'actors.rollout.engine_args' here, arguments of the "
        "engine, by its own names)",
    ),
    ("data.train_files", "data.train_files (it is called 'data.train' here)"),
    ("max_steps", "max_steps (it is called 'run.steps' here, counted in rollout steps, each of "
     "method.updates_per_step updates)"),
    ("warmup_ratio", "warmup_ratio (the learning rate is constant)"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "sentence"), OVERRIDES)
def test_a_name_of_another_tool_in_an_override(path: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(BASE)
    with pytest.raises(UserError) as caught:
        load(file, [f"{path}=3"])
    assert str(caught.value) == f"--set {path}=3: there is no setting {sentence}"
