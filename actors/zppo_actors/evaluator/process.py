"""The process of an evaluation: builds the engines of one order, lets an `Evaluator` ask, and
prints the report.

Started as `python -m zppo_actors evaluate ORDER` (JSON, `zppo.evaluation.order`). Each result is
written as soon as it is known, so a stopped evaluation leaves whole lines behind. Standard output
carries the report and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TextIO

import msgspec

from zppo.config.served import ServedModel
from zppo.data.corpus import load_questions
from zppo.errors import EXIT_FAILED, EXIT_INTERRUPTED, UserError
from zppo.evaluation.order import EvaluationOrder
from zppo.evaluation.report import EvaluationReport, report_text
from zppo_actors import engines
from zppo_actors.engines import Engine, EngineSpec
from zppo_actors.evaluator.evaluator import EvaluationFailed, Evaluator, Grading
from zppo_actors.process import private_stdout


def main(arguments: list[str]) -> int:
    """Carry out one order; returns the exit code. Raises UserError."""
    order = msgspec.json.decode(arguments[0], type=EvaluationOrder)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a background job inherits it as ignored
    logging.getLogger("zppo").setLevel(logging.ERROR)  # what went wrong is counted in the report
    with private_stdout() as stdout:
        try:
            report = asyncio.run(evaluate(order))
        except KeyboardInterrupt:
            print(f"stopped; {_left_behind(order)}", file=sys.stderr)
            return EXIT_INTERRUPTED
        except EvaluationFailed as error:
            print(f"{error}; {_left_behind(order)}", file=sys.stderr)
            return EXIT_FAILED
        stdout.write(_json(report) if order.json else report_text(report))
    return 0


async def evaluate(order: EvaluationOrder) -> EvaluationReport:
    """Ask all questions and sum up. Raises UserError, or EvaluationFailed when the engine cannot
    answer."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    corpus = load_questions(order.data.train, order.data, Path.cwd(), unpack=True)
    questions = corpus.questions[: order.limit]
    async with AsyncExitStack() as stack:
        out = stack.enter_context(_open(order.out)) if order.out is not None else None
        engine = _build(order.served)
        stack.push_async_callback(engine.close)
        judge = _build(order.judge) if order.judge is not None else None
        if judge is not None:
            stack.push_async_callback(judge.close)
        grading = stack.enter_context(Grading(order.grader_seconds, order.data.train))
        try:
            return await Evaluator(order, engine, judge, grading, out).run(questions)
        except* EvaluationFailed as errors:
            raise _first(errors) from None


def _build(served: ServedModel) -> Engine:
    return engines.create(EngineSpec(served=served, device=served.device(0)))


def _open(path: str) -> TextIO:
    try:
        return open(path, "x", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: {path!r} cannot be written ({error.strerror})") from None


def _first(errors: BaseExceptionGroup[EvaluationFailed]) -> EvaluationFailed:
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


def _json(report: EvaluationReport) -> str:
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n"


def _left_behind(order: EvaluationOrder) -> str:
    return "nothing was written" if order.out is None else f"what was answered is in {order.out}"
