"""Methods for a few steps with real processes and the bundled models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from zppo.algorithm.methods import get_method, method_names
from zppo.config.load import load
from zppo.records import run_directory
from zppo.records.rollouts import read_step, step_files
from zppo.records.summary import read_lines, summarise

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.yaml"
SECONDS = 900
SETTINGS = {
    "run.steps": 2,
    "scheduler.new_questions": 12,
    "scheduler.max_staleness": 0,
    "data.heldout": "null",
    "evaluation.every": "null",
    "actors.rollout.count": 1,
    "sinks.tensorboard": "false",
}

pytestmark = pytest.mark.slow
ELSEWHERE = {
    "zppo": "with a cascade, below",
    "grpo": "on pictures, test_tower_run.py",
    "off_distill": "its groups are those of off_distill_replay, its local scores those of on_distill",
    "grpo_both": "its groups are those of zppo",
    "grpo_replay_bcq": "its groups are some of zppo's",
    "grpo_replay_ncq": "its groups are some of zppo's",
    "grpo_replay": "in a comparison, tests/zppo/test_compare_run.py",
    "off_distill_replay": "with remote scores, below",
    "on_distill_replay": "with remote scores, below",
}
"""Methods whose parts another run has. Which groups each of them trains is a property of its value,
tests/zppo/algorithm/test_methods.py."""


def run(directory: Path, method: str, launched: bool = False, **settings: Any) -> Path:
    """A finished run of the quickstart's models with this method. Only `launched` is behind the
    launcher's checks, which load the tokenizers and have tests of their own."""
    merged = {**SETTINGS, "run.directory": directory, "method.name": method, **settings}
    given = [f"{name}={value}" for name, value in merged.items()]
    if launched:
        command = [sys.executable, "-P", "-m", "zppo.launch", "--topology", str(QUICKSTART)]
        command += [part for setting in given for part in ("--set", setting)]
    else:
        run_directory.create(directory, load(QUICKSTART, given))
        command = [sys.executable, "-P", "-m", "zppo_actors", "supervisor", "--run", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    logs = "\n".join(
        f"{log.name}: {log.read_text()[-2000:]}"
        for log in sorted((directory / "logs").glob("*.log"))
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
    return directory


def check(directory: Path, method: str) -> None:
    """Both steps are trained once, by updates, on the rollouts that the method says."""
    value, summary = get_method(method), summarise(directory)
    assert (summary["steps"], summary["trained_twice"], summary["lost"]) == (2, 0, 0)
    lines = read_lines(directory / "metrics.jsonl")
    updates = {line["train/updates"] for line in lines}
    assert updates == ({1.0} if value.updates_per_step == 1 else {2.0}), updates
    assert all(line["train/tokens_trained"] > 0 for line in lines)
    assert all(("train/jsd" in line) == value.needs_scores for line in lines)
    rows = [row for path in step_files(directory / "rollouts") for row in read_step(path)]
    trained = {row["kind"] for row in rows if row["trained"]}
    plain = set() if method.startswith("off_distill") else {"plain"}
    teacher = {"teacher"} if value.teacher_tokens else set()
    assert trained == plain | teacher | {reformulator.kind for reformulator in value.reformulations}
    assert all(row["reward"] == 1.0 for row in rows if row["kind"] == "teacher" and row["trained"])


@pytest.mark.parametrize("method", sorted(set(method_names()) - set(ELSEWHERE)))
def test_a_method_runs(tmp_path: Path, method: str) -> None:
    check(run(tmp_path / "run", method), method)


@pytest.mark.parametrize("method", ["off_distill_replay", "on_distill_replay"])
def test_distillation_from_a_teacher_in_other_processes(tmp_path: Path, method: str) -> None:
    remote = {"teacher.scoring": "remote", "teacher.score_top_k": 8}
    check(run(tmp_path / "run", method, **remote), method)


def test_a_cascade_asks_the_second_teacher_where_the_first_fails(tmp_path: Path) -> None:
    """The first teacher is the student itself, which fails on most of its own hard questions."""
    models = QUICKSTART.parent / "quickstart"
    second = {
        "model": str(models / "teacher"),
        "dtype": "float32",
        "sampling": {"max_new_tokens": 24},
        "actor": {"engine": "transformers", "engine_args": {"max_sequences": 16}},
    }
    directory = run(
        tmp_path / "run",
        "zppo",
        **{"teacher.model": models / "student", "more_teachers": json.dumps([second])},
    )
    check(directory, "zppo")
    rows = [row for path in step_files(directory / "rollouts") for row in read_step(path)]
    first = [row["reward"] for row in rows if row["group_id"].endswith("/teacher")]
    other = [row["reward"] for row in rows if row["group_id"].endswith("/teacher-2")]
    assert other and len(other) < len(first)
    assert sum(other) / len(other) > 0.8 > sum(first) / len(first)


SOURCE = """
import json

def rows():
    for line in open({file!r}):
        row = json.loads(line)
        yield {{
            "prompt": [
                {{"role": "system", "content": "answer"}},
                {{"role": "user", "content": "3 * 4 mod 23 ?"}},
                {{"role": "assistant", "content": "12"}},
                {{"role": "user", "content": row["question"]}},
            ],
            "reward_model": {{"style": "rule", "ground_truth": row["answer"]}},
        }}
"""


def test_conversations_of_a_source_of_ones_own(tmp_path: Path) -> None:
    """Rows of verl's layout, given by a function in launcher and controller: every prompt to the
    student, plain or rewritten, keeps the earlier turns, and the teacher reads all of them."""
    file = QUICKSTART.parent / "quickstart" / "train.jsonl"
    (tmp_path / "mine.py").write_text(SOURCE.format(file=str(file)))
    directory = run(
        tmp_path / "run",
        "zppo",
        launched=True,
        **{"data.train": f"{tmp_path}/mine.py:rows", "data.system_prompt": "one"},
    )
    rows = [row for path in step_files(directory / "rollouts") for row in read_step(path)]
    golds = {row["question"]: row["answer"] for row in map(json.loads, file.open())}
    assert {row["kind"] for row in rows} >= {"plain", "teacher", "ncq"}
    for row in rows:
        before = "[system]\nanswer\n[user]\n3 * 4 mod 23 ?\n[assistant]\n12\n[user]\n"
        assert row["prompt"].startswith(f"{before}{row['question']} ?\n"), row["kind"]
        assert row["gold"] == golds[row["question"]]
    assert list(json.loads((directory / "run.json").read_text())["extensions"]) == [
        f"{tmp_path}/mine.py:rows"
    ]
