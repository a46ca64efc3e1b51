"""A corpus from raw rows to a score: built by `zppo build-data` from a table in the Hub's layout and
from JSONL, trained on for two steps and evaluated on, with the real commands."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from zppo.config.topology import DataConfig
from zppo.data.corpus import load_questions
from zppo.records.rollouts import read_step, step_files
from zppo.records.summary import summarise

EXAMPLES = Path(__file__).parents[2] / "examples"
SECONDS = 900
RECIPE = """
sources:
  tables:
    columns: {question: question, answer: answer, images: image, reward_type: kind}
    graders: {number: math, text: exact}
  lines:
    columns: {question: question, answer: answer}
filters: {max_prompt_tokens: 64}
"""

pytestmark = pytest.mark.slow


def zppo(*arguments: object) -> str:
    command = [sys.executable, "-P", "-m", "zppo", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def raw_sets(folder: Path) -> None:
    """Forty questions of the quickstart: half a table with a column of pictures that has none, half
    JSON lines, four of which are in both."""
    text = (EXAMPLES / "quickstart" / "train.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()[:40]]
    pictures = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "question": pa.array([row["question"] for row in rows[:22]]),
        "answer": pa.array([row["answer"] for row in rows[:22]]),
        "kind": pa.array(["number", "text"] * 11),
        "image": pa.array([None, {"bytes": None, "path": None}] * 11, pictures),
    }
    (folder / "tables" / "data").mkdir(parents=True)
    pq.write_table(pa.table(columns), folder / "tables" / "data" / "train-00000-of-00001.parquet")
    (folder / "lines").mkdir()
    (folder / "lines" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[18:]))
    (folder / "recipe.yaml").write_text(RECIPE)


def test_built_trained_on_and_evaluated(tmp_path: Path) -> None:
    raw_sets(tmp_path)
    quickstart, out, run = EXAMPLES / "quickstart", tmp_path / "corpus", tmp_path / "run"
    report = json.loads(
        zppo(
            *("build-data", "--json", "--recipe", tmp_path / "recipe.yaml", "--out", out),
            *("--tables", tmp_path / "tables", "--lines", tmp_path / "lines"),
            *("--tokenizer", quickstart / "student", "--templates", quickstart / "templates"),
        )
    )
    assert (report["rows"], report["kept"]) == (44, 40)
    assert [(rule["rule"], rule["rows"]) for rule in report["dropped"]] == [("duplicate", 4)]

    corpus = load_questions(str(out), DataConfig(train=str(out)), Path())
    graders = Counter(question.grader for question in corpus.questions)
    assert (graders, corpus.bad_rows) == ({"math": 29, "exact": 11}, [])

    given = {
        "run.directory": run,
        "run.steps": 2,
        "data.train": out,
        "scheduler.new_questions": 8,
        "scheduler.max_staleness": 1,
        "data.heldout": "null",
        "evaluation.every": "null",
        "actors.rollout.count": 1,
        "sinks.tensorboard": "false",
    }
    settings = [part for name, value in given.items() for part in ("--set", f"{name}={value}")]
    zppo("launch", EXAMPLES / "quickstart.yaml", *settings)
    summary = summarise(run)
    assert (summary["steps"], summary["trained_twice"], summary["lost"]) == (2, 0, 0)
    built = {json.loads(line)["id"] for line in (out / "train.jsonl").read_text().splitlines()}
    rows = [row for path in step_files(run / "rollouts") for row in read_step(path)]
    assert len({row["question_id"] for row in rows}) >= 16
    assert {row["question_id"] for row in rows} <= built

    order = ("--model", run, "--data", out, "--limit", 8, "--samples", 1, "--json")
    assert json.loads(zppo("evaluate", *order))["questions"] == 8
