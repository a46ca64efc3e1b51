"""The SmolLM2 example as far as it can be checked without the model: topology, templates,
questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zppo.config import load as topologies
from zppo.data.question import Question
from zppo.data.sources.base import same_words
from zppo.grading import grade
from zppo.prompting.prompts import PromptSet

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
FILE = EXAMPLES / "smollm2.yaml"
CANDIDATES = ["7+5=12\n\\boxed{12}", "7-5=2\n\\boxed{2}"]


def questions(name: str) -> list[dict[str, str]]:
    return [
        json.loads(line)
        for line in (EXAMPLES / "smollm2" / name).read_text(encoding="utf-8").splitlines()
    ]


def prompts() -> PromptSet:
    return PromptSet(EXAMPLES / "smollm2" / "templates", topologies.load(FILE).data.system_prompt)


def test_topology_is_read_and_names_the_files_that_are_there() -> None:
    topology = topologies.load(FILE)
    assert topology.method.name == "zppo"
    assert (topology.run.steps or 0) >= 20
    for name in (topology.data.train, topology.data.heldout, topology.data.templates):
        assert name is not None and (EXAMPLES / name).exists()


def test_runs_of_every_method_differ_in_one_word() -> None:
    changed = topologies.load(FILE, ["method.name=grpo"])
    assert changed.method.name == "grpo"
    assert changed.optimizer == topologies.load(FILE).optimizer


def test_templates_are_whole_and_show_candidates_alike() -> None:
    prompts().validate()
    question = Question(
        id="q", text="Ada has 7 pens. Ada gets 5 more. How many pens does Ada have?", answer="12"
    )
    shown = prompts().bcq(question, CANDIDATES).messages[-1].content
    assert shown.index(CANDIDATES[0]) < shown.index(CANDIDATES[1])
    assert shown.endswith("\\boxed{answer}.")
    wrong = prompts().ncq(question, ["2", "3"], CANDIDATES[1:]).messages[-1].content
    assert "The answer is not 2 and not 3." in wrong


def test_no_question_is_both_trained_and_held_out() -> None:
    train, heldout = questions("train.jsonl"), questions("heldout.jsonl")
    words = [same_words(row["question"]) for row in [*train, *heldout]]
    assert len(set(words)) == len(words)
    assert (len(train), len(heldout)) == (1200, 240)


@pytest.mark.parametrize("name", ["train.jsonl", "heldout.jsonl"])
def test_every_answer_can_be_met(name: str) -> None:
    for row in questions(name)[:50]:
        assert grade(f"\\boxed{{{row['answer']}}}", row["answer"], "math").reward == 1.0
