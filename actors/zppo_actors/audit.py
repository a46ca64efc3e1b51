"""The process of an audit: grades completions whose truth is known, as a grader actor would, and
prints what it found.

Started as `python -m zppo_actors audit ORDER` (JSON, `zppo.grade`). Standard output carries the
report alone.
"""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path

import msgspec

from zppo.data.audit import AuditOrder, Case, Verdict, report_text, report_values, run
from zppo.data.corpus import load_questions
from zppo.errors import EXIT_FAILED, EXIT_INTERRUPTED
from zppo_actors.grading.handle import GradeWorker, worker_command
from zppo_actors.grading.own import OwnOrder
from zppo_actors.process import private_stdout


def main(arguments: list[str]) -> int:
    """Carry out one order; returns 0 if nothing was graded wrongly, else 1. Raises UserError."""
    order = msgspec.json.decode(arguments[0], type=AuditOrder)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a background job inherits it as ignored
    logging.getLogger("zppo").setLevel(logging.ERROR)  # what timed out is counted in the report
    questions = load_questions(order.data.train, order.data, Path.cwd()).questions[: order.limit]
    rewards = OwnOrder(entries=order.data.reward) if order.data.reward else None
    worker = GradeWorker(order.grader_seconds, worker_command(order.data.train, rewards=rewards))

    def grading(case: Case) -> Verdict:
        question = case.question
        grade = worker.grade(
            case.response, question.answer, question.grader, question.text, question.row
        )
        right = None if grade.failed else grade.reward >= order.correct_reward
        return Verdict(right, grade.note)

    with private_stdout() as stdout:
        try:
            audit = run(order.data.train, questions, order.seed, grading)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return EXIT_INTERRUPTED
        finally:
            worker.close()
        text = (
            msgspec.json.format(msgspec.json.encode(report_values(audit)), indent=2).decode() + "\n"
        )
        stdout.write(text if order.json else report_text(audit))
    return 0 if audit.sound else EXIT_FAILED
