"""From the samples of a harness to the scores of a row: the rule first, the judge where it decides
nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from msgspec import Struct

from zppo.data.question import Question
from zppo.grading import says_correct
from zppo.grading.boxes import last_boxed
from zppo.grading.graders import choice_letters
from zppo.prompting.prompts import PromptSet
from zppo.suites.harness import Sample, SamplesError, without_directives
from zppo.suites.table import METRIC, OWN_JUDGE, RULE_OR_JUDGE, Row
from zppo_actors.evaluator.evaluator import Grading
from zppo_actors.suites.asked import AskedModel


class Scored(Struct, frozen=True):
    score: float
    judged: bool = False


class Scoring:
    """How one row is scored. Without a judge what the rule does not find right is wrong."""

    def __init__(
        self, row: Row, prompts: PromptSet, grading: Grading, judge: AskedModel | None
    ) -> None:
        self._row = row
        self._prompts = prompts
        self._grading = grading
        self._judge = judge

    async def score(self, samples: Sequence[Sample]) -> dict[str, Scored]:
        """Question -> score, of those that the metric speaks of. Raises SamplesError, ModelGone."""
        row = self._row
        if row.metric and all(sample.score is None for sample in samples):
            raise SamplesError(f"{row.harness}'s samples hold no number at {row.metric!r}")
        if row.scoring in (METRIC, OWN_JUDGE):
            return {one.id: Scored(_lawful(one, row)) for one in samples if one.score is not None}
        tasks = [asyncio.create_task(self._decide(sample)) for sample in samples]
        try:
            scored = await asyncio.gather(*tasks)
        finally:  # the first failure ends the others
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return {sample.id: one for sample, one in zip(samples, scored, strict=True)}

    async def _decide(self, sample: Sample) -> Scored:
        if await self._right(sample):
            return Scored(1.0)
        if self._judge is None or self._settled(sample) or not sample.response:
            return Scored(0.0)
        return Scored(float(await self._judged_right(self._judge, sample)), judged=True)

    async def _right(self, sample: Sample) -> bool:
        if self._row.scoring != RULE_OR_JUDGE:
            return (sample.score or 0.0) >= 1.0
        for gold in sample.gold:
            question = Question(id=sample.id, text="", answer=gold, grader=self._row.grader)
            if (await self._grading.grade(sample.response, question)).reward >= 1.0:
                return True
        return False

    def _settled(self, sample: Sample) -> bool:
        """Whether the rule has said that the answer is wrong, and not only that it found nothing:
        it names letters of a choice, and others."""
        answer = last_boxed(sample.response)
        return (
            self._row.scoring == RULE_OR_JUDGE
            and self._row.grader == "choice"
            and bool(choice_letters(answer or ""))
        )

    async def _judged_right(self, judge: AskedModel, sample: Sample) -> bool:
        """The judge is shown the final answer, or the whole response where there is no box."""
        question = Question(
            id=sample.id,
            text=without_directives(sample.question, self._row.directives),
            answer=" or ".join(sample.gold),
        )
        shown = last_boxed(sample.response) or sample.response
        prompt = self._prompts.compare(question, shown)
        messages = [{"role": one.role, "content": one.content} for one in prompt.messages]
        return says_correct((await judge.ask(messages)).text)


def _lawful(sample: Sample, row: Row) -> float:
    """Raises SamplesError for a score that is no share."""
    score = sample.score or 0.0
    if not 0.0 <= score <= 1.0:
        raise SamplesError(
            f"{row.harness} gives {sample.id} the score {score:g} at {row.metric!r}; expected 0 "
            "to 1"
        )
    return score
