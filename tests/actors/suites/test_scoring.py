"""Scores of a row whose harness scores: the judge behind its parser, and numbers that are none."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from openai_server import Server, running
from suite_helpers import knows

from zppo.plan.engines.openai import OpenAIArguments
from zppo.prompting.prompts import PromptSet
from zppo.suites.harness import Sample, SamplesError
from zppo.suites.table import Row
from zppo_actors.evaluator.evaluator import Grading
from zppo_actors.suites.asked import JUDGE_DECODING, AskedModel
from zppo_actors.suites.journal import Journal
from zppo_actors.suites.scoring import Scored, Scoring


def sample(number: int, response: str, score: float | None) -> Sample:
    return Sample(
        id=str(number), question="Which?\nBe brief.", gold=["B"], response=response, score=score
    )


def scored(scoring: str, *samples: Sample, judge: AskedModel | None = None) -> list[Scored]:
    told: dict[str, Any] = {"short": "A", "family": "F", "harness": "lmms-eval", "task": ["t"]}
    row = Row(**told, scoring=scoring, metric="acc.score", directives=["Be brief\\."])  # type: ignore[arg-type]

    async def body() -> list[Scored]:
        with Grading(5.0, "") as grading:
            found = await Scoring(row, PromptSet(), grading, judge).score(samples)
        if judge is not None:
            await judge.close()
        return [*found.values()]

    return asyncio.run(body())


def test_the_judge_is_asked_where_the_parser_found_nothing_right(tmp_path: Path) -> None:
    with running(Server(models=("judge",))) as server:
        server.default = knows({}, "correct")
        arguments = OpenAIArguments(base_url=server.base_url)
        journal = Journal(tmp_path / "verdicts.jsonl")
        judge = AskedModel("the judge", "judge", arguments, JUDGE_DECODING, 0, journal)
        answers = [sample(0, "B", 1.0), sample(1, "the second", 0.0), sample(2, "", 0.0)]
        assert scored("R+J", *answers, judge=judge) == [
            Scored(1.0), Scored(1.0, judged=True), Scored(0.0),
        ]  # fmt: skip
        [request] = server.requests
        words = request.body["messages"][0]["content"]
        assert "\nthe second\n" in words and "Which?\n" in words and "Be brief" not in words


def test_without_a_judge_the_parser_decides() -> None:
    assert scored("R+J", sample(0, "B", 1.0), sample(1, "b?", 0.0)) == [Scored(1.0), Scored(0.0)]


def test_the_metric_alone_and_the_questions_that_it_speaks_of() -> None:
    answers = [sample(0, "x", 0.3), sample(1, "y", None), sample(2, "z", 1.0)]
    assert scored("Det", *answers) == [Scored(0.3), Scored(1.0)]


@pytest.mark.parametrize(
    ("scoring", "score", "said"),
    [
        ("Det", 87.5, "lmms-eval gives 0 the score 87.5 at 'acc.score'; expected 0 to 1"),
        ("BJ", -1.0, "lmms-eval gives 0 the score -1 at 'acc.score'; expected 0 to 1"),
        ("R+J", None, "lmms-eval's samples hold no number at 'acc.score'"),
    ],
)
def test_numbers_that_are_no_scores(scoring: str, score: float | None, said: str) -> None:
    with pytest.raises(SamplesError) as error:
        scored(scoring, sample(0, "x", score))
    assert str(error.value) == said
