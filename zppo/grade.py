"""`python -m zppo.grade --audit SOURCE`: how often the grader of a source errs, before anything is
trained on it.

Everything that can be wrong is checked first; then this process becomes the one with the grade
worker (`python -m zppo_actors audit`), because comparing mathematics may hang. Exit codes: 0 every
completion was graded as it is, 1 some were not, 2 a user error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from zppo.config.options import counting, data_settings, finite, pair, positive, seconds
from zppo.config.paths import absolute_use
from zppo.config.rewards import RewardConfig, parts_of
from zppo.config.strict_yaml import parse
from zppo.config.topology import is_procedural
from zppo.data.audit import AuditOrder
from zppo.data.corpus import load_questions
from zppo.errors import EXIT_USER_ERROR, Parser, UserError, become_actor, run_command
from zppo.grading.rewards import check_parts


def main(argv: Sequence[str] | None = None) -> int:
    """Check the order and become the auditing process. Returns 2 after a user error; else it does
    not return."""
    try:
        order = read_order(_parser().parse_args(argv))
        load_questions(order.data.train, order.data, Path.cwd())
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR
    become_auditor(order)


def become_auditor(order: AuditOrder) -> NoReturn:
    """Replace this process by the one that grades."""
    become_actor("audit", msgspec.json.encode(order).decode())


def read_order(arguments: argparse.Namespace) -> AuditOrder:
    """The order that the command line gives. Raises UserError."""
    if is_procedural(arguments.audit) and (arguments.field or arguments.grader):
        raise UserError(
            f"--audit is {arguments.audit!r}, which brings its own grader; expected no --grader or "
            "--field"
        )
    given = {
        "train": arguments.audit,
        "fields": dict(pair(text, "--field") for text in arguments.field),
        "grader": arguments.grader or "math",
        "max_bad_rows": arguments.max_bad_rows,
        "reward": _reward(arguments),
    }
    return AuditOrder(
        data=data_settings(given),
        limit=arguments.limit,
        seed=arguments.seed,
        grader_seconds=arguments.grader_seconds,
        json=arguments.json,
        correct_reward=arguments.correct_reward,
    )


def _reward(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The single entry of `data.reward` that --reward asks for. Raises UserError."""
    if arguments.reward is None:
        return []
    if arguments.grader is not None:
        raise UserError("zppo grade: expected --grader or --reward, not both")
    args = parse(arguments.reward_args, "--reward-args").data
    if not isinstance(args, dict):
        raise UserError(f"--reward-args is {arguments.reward_args!r}; expected a mapping")
    entry = RewardConfig(use=absolute_use("--reward", arguments.reward, Path.cwd()), args=args)
    parts = parts_of([entry])
    if parts[0].of_teacher:
        raise UserError(f"--reward is {entry.use!r}, which asks a teacher; expected another one")
    check_parts(parts)
    return [{"use": entry.use, "args": args}]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="zppo grade",
        description=(
            "Run a source's own gold answers, and completions that must earn nothing, through its "
            "grader."
        ),
        epilog=(
            "exit codes: 0 all graded as they are, 1 some were not, 2 user error (docs/grading.md)"
        ),
    )
    parser.add_argument(
        "--audit", required=True, metavar="SOURCE", help="file, folder, or reasoning_gym:TASK?…"
    )
    parser.add_argument(
        "--grader", help="math (default), exact, choice, or judge: its comparison as text"
    )
    parser.add_argument(
        "--reward",
        metavar="NAME",
        help="a reward in place of the grader: ./file.py:name, package.module:name, or built in",
    )
    parser.add_argument(
        "--reward-args", default="{}", metavar="MAPPING", help="its arguments, e.g. '{most: 10}'"
    )
    parser.add_argument(
        "--correct-reward", type=finite, default=1.0, metavar="R", help="least value that is right"
    )
    parser.add_argument(
        "--field", action="append", default=[], metavar="FIELD=COLUMN", help="e.g. question=problem"
    )
    parser.add_argument(
        "--limit", type=positive, default=200, metavar="N", help="only the first N questions (200)"
    )
    parser.add_argument(
        "--max-bad-rows", type=counting, default=0, metavar="N", help="rows that may be left out"
    )
    parser.add_argument(
        "--grader-seconds", type=seconds, default=5.0, metavar="S", help="limit of one grading (5)"
    )
    parser.add_argument(
        "--seed", type=counting, default=0, help="which other question's answer a completion takes"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
