"""Asking questions and grading the answers: what an evaluation does between loading a model and its
report.

Questions are asked in the order of their source, enough at once to keep the engine busy. A response
that its grader does not find right goes to the judge, if there is one. A question that cannot be
asked counts as wrong and is reported; when nothing can be asked the evaluation stops instead of
calling the model bad.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TextIO

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from zppo.algorithm.window import EVALUATE
from zppo.config.topology import JUDGE, ModelConfig, is_procedural
from zppo.data.question import Question
from zppo.errors import count_of
from zppo.evaluation.order import EvaluationOrder
from zppo.evaluation.report import Answered, EvaluationReport, QuestionResult, Tally
from zppo.grading import judged, quick_grade, shown_gold
from zppo.plan.model_folder import special_tokens
from zppo.prompting.chat_template import for_template
from zppo.prompting.prompts import PromptSet
from zppo.records.metrics import response_lengths
from zppo_actors.engines import Engine, EngineError
from zppo_actors.grading.handle import GradeWorker, worker_command
from zppo_protocol.messages import GenerateTask
from zppo_protocol.samples import GroupSamples
from zppo_protocol.values import TIMED_OUT, Grade, Prompt, seed_of

HOPELESS = 3
"""So many questions that cannot be asked, and none that could, mean that something else is
wrong."""
ATTEMPTS = 3
"""Tries of a question whose failure may pass."""
POLL_SECONDS = 1.0

Judged = tuple[Grade, bool]
"""A grade, and whether the judge gave it."""


class EvaluationFailed(RuntimeError):
    """The engine cannot answer; the message is one sentence."""


class Grading:
    """The grading worker, used from one helper thread, so that a slow response never holds up the
    engine."""

    def __init__(self, timeout_seconds: float, source: str) -> None:
        self._worker = GradeWorker(timeout_seconds, worker_command(source))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grading")

    def __enter__(self) -> Grading:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._worker.close()

    async def grade(self, text: str, question: Question) -> Grade:
        """The grade of one response by the question's own rule."""
        quick = quick_grade(text, question.answer, question.grader)
        if quick is not None:
            return quick
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, self._grade, text, question
        )

    def _grade(self, text: str, question: Question) -> Grade:
        return self._worker.grade(text, question.answer, question.grader)


class Evaluator:
    """One evaluation. `out` receives a JSON line per question, in the order in which they are
    done."""

    def __init__(
        self,
        order: EvaluationOrder,
        engine: Engine,
        judge: Engine | None,
        grading: Grading,
        out: TextIO | None,
    ) -> None:
        data = order.data
        self._order = order
        self._engine = engine
        self._judge = None if is_procedural(data.train) else judge  # their own rules need no judge
        self._grading = grading
        self._out = out
        marks = special_tokens([order.judge.folder] if order.judge is not None else [])
        self._prompts = PromptSet.of(data, marks=marks)
        self._tally = Tally(samples=order.samples)
        self._last_failure = ""

    async def run(self, questions: list[Question]) -> EvaluationReport:
        """Ask all of them, about twice as many at once as the engine samples. Raises a group with
        EvaluationFailed."""
        start = time.monotonic()
        at_once = max(2, 2 * self._engine.capacity // self._order.samples)
        queue = iter(questions)
        with progress_bar() as bar:
            task = bar.add_task(self._order.label, total=len(questions))
            async with asyncio.TaskGroup() as group:
                for _ in range(min(at_once, len(questions))):
                    group.create_task(self._ask_from(queue, lambda: bar.advance(task)))
        return self._report(len(questions), time.monotonic() - start)

    async def _ask_from(self, queue: Iterator[Question], advance: Callable[[], None]) -> None:
        """Take one question after the other from the shared queue."""
        for question in queue:
            result = await self._ask(question)
            self._tally.add(result, TIMED_OUT)
            if self._out is not None:
                self._out.write(msgspec.json.encode(result).decode() + "\n")
                self._out.flush()
            self._check_hope()
            advance()

    async def _ask(self, question: Question) -> QuestionResult:
        try:
            samples = await self._sample(question)
        except EngineError as error:
            self._last_failure = str(error)
            return _result(question, [], str(error))
        lengths = response_lengths(samples)
        grades = [await self._grade(text, question) for text in samples.texts]
        return _result(question, _answered(samples, grades, lengths))

    async def _sample(self, question: Question) -> GroupSamples:
        """The samples of one question. Raises EngineError if it cannot be asked, EvaluationFailed
        if nothing can."""
        prompt, order = self._prompts.plain(question), self._order
        task = self._task(EVALUATE, question.id, prompt, order.samples, order.served.model)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self._engine.generate(task)
            except EngineError as error:
                if self._engine.broken is not None or (error.retryable and attempt == ATTEMPTS):
                    raise EvaluationFailed(
                        f"the question {question.id!r} could not be asked: {error}"
                    ) from error
                if not error.retryable:
                    raise
        raise AssertionError("the last attempt either returns or raises")

    async def _grade(self, text: str, question: Question) -> Judged:
        """By the rule of the question; by the judge where the rule does not find an answer
        right."""
        grade = await self._grading.grade(text, question)
        if self._judge is None or grade.reward >= 1.0 or grade.answer is None:
            return grade, False
        prompt = self._prompts.judge(question, text)
        digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=8).hexdigest()
        assert self._order.judge is not None
        task = self._task(JUDGE, f"{question.id}/{digest}", prompt, 1, self._order.judge.model)
        try:
            reply = (await self._judge.generate(task)).texts[0]
        except EngineError as error:
            return Grade(
                reward=0.0, answer=grade.answer, note=f"the judge failed: {error}"[:500]
            ), False
        return judged(reply, text), True

    def _task(
        self, kind: str, name: str, prompt: Prompt, n: int, model: ModelConfig
    ) -> GenerateTask:
        """A task for a model, whose seed follows from the order's seed and its own name."""
        task_id = f"{kind}/{name}"
        return GenerateTask(
            task_id=task_id,
            kind=kind,
            prompt=for_template(prompt, model.chat_template_kwargs),
            n=n,
            sampling=model.sampling,
            seed=seed_of(self._order.seed, task_id),
        )

    def _check_hope(self) -> None:
        tally = self._tally
        if tally.failed >= HOPELESS and tally.failed == len(tally.right):
            raise EvaluationFailed(
                f"none of the first {tally.failed} questions could be asked: {self._last_failure}"
            )

    def _report(self, questions: int, seconds: float) -> EvaluationReport:
        order, tally = self._order, self._tally
        notes = list(order.notes)
        if tally.failed:
            notes.append(
                f"{count_of(tally.failed, 'question')} could not be asked and "
                f"{'counts' if tally.failed == 1 else 'count'} as wrong; the last: "
                f"{self._last_failure}"
            )
        return EvaluationReport(
            model=order.label,
            data=order.data.train,
            engine=order.served.actor.engine,
            sampling=order.served.model.sampling,
            questions=questions,
            samples=order.samples,
            pass_at_1=tally.pass_at_1(),
            pass_at=tally.pass_at(),
            tokens_per_response=tally.tokens_per_response,
            cut_off=tally.share(tally.cut_off),
            unanswered=tally.share(tally.unanswered),
            failed=tally.failed,
            judged=tally.judged,
            timed_out=tally.timed_out,
            seconds=seconds,
            tokens_per_second=tally.tokens / seconds if tally.counted and seconds else None,
            notes=notes,
        )


def _answered(
    samples: GroupSamples, grades: list[Judged], lengths: list[int | None]
) -> list[Answered]:
    rows = zip(samples.texts, grades, samples.finish_reasons, lengths, strict=True)
    return [
        Answered(
            text=text,
            reward=grade.reward,
            answer=grade.answer,
            note=grade.note,
            finish_reason=reason,
            tokens=length,
            judged=by_judge,
        )
        for text, (grade, by_judge), reason, length in rows
    ]


def _result(
    question: Question, responses: list[Answered], failed: str | None = None
) -> QuestionResult:
    mean = sum(response.reward for response in responses) / len(responses) if responses else 0.0
    gold = shown_gold(question.answer, question.grader)
    return QuestionResult(
        id=question.id,
        question=question.words,
        gold=gold,
        responses=responses,
        mean=mean,
        failed=failed,
    )


def progress_bar() -> Progress:
    """On stderr, and only where somebody can see it move."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)
