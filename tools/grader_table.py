"""Accuracy of our grader `math` and of its peers on tables of answer pairs, as a Markdown table.

    pip install mathruler pylatexenc    # optional; math-verify comes with zppo
    python tools/grader_table.py [--misses]

A pair is a gold answer, the content of a box, and whether a careful reader calls it right.
`answer_pairs.tsv` is what our grader is held to by the tests; `answer_pairs_more.tsv` and, later,
`answer_pairs_blind.tsv` were written down before any grader saw them and measure. Each grader sees
the response as in training, a sentence with the answer in a box, in a process that is killed when
it takes too much processor time.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from zppo.errors import Parser, run_command
from zppo.grading import grade

TABLES = Path(__file__).parents[1] / "tests/zppo/grading"
HELD_TO, MEASURED, BLIND = "answer_pairs.tsv", "answer_pairs_more.tsv", "answer_pairs_blind.tsv"
OURS = "math"
SECONDS = 5
"""Of processor time, for one pair."""
PATIENCE_SECONDS = 120
"""On the clock, for one pair or the start."""
MAX_MEMORY = 4 * 2**30
VERDICTS: dict[bytes, bool | None] = {b"0": False, b"1": True, b"2": None}
Grader = Callable[[str, str], bool]
"""(response, gold answer) -> right?"""


class Pair(NamedTuple):
    section: str
    gold: str
    answer: str
    right: bool

    @property
    def response(self) -> str:
        return rf"So the answer is \boxed{{{self.answer}}}."


class Score(NamedTuple):
    """Counts over one table."""

    pairs: int
    right: int
    false_right: int
    false_wrong: int
    failed: int


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--misses", action="store_true", help="also list the pairs that our grader gets wrong"
    )
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable(logging.ERROR)
    if arguments.child is not None:
        name, table, first = arguments.child
        return child(name, table, int(first))
    misses = []
    print("| grader | pairs | right | false right | false wrong | no answer in 5 s, or an error |")
    print("|---|---|---|---|---|---|")
    for name in graders():
        for table in (HELD_TO, MEASURED, BLIND):
            pairs = list(read_pairs(TABLES / table))
            verdicts = decide_all(name, table, len(pairs))
            print(row(name, table, measure(pairs, verdicts)), flush=True)
            if name == OURS:
                misses += [
                    p
                    for p, verdict in zip(pairs, verdicts, strict=True)
                    if bool(verdict) != p.right
                ]
    if arguments.misses:
        for pair in misses:
            print(
                f"{pair.section}: gold {pair.gold!r}, answer {pair.answer!r}, should be "
                f"{pair.right}"
            )
    return 0


def row(name: str, table: str, score: Score) -> str:
    """One line of the Markdown table."""
    right = f"{score.right} ({100 * score.right / score.pairs:.1f} %)"
    cells = [
        name,
        f"{score.pairs} (`{table}`)",
        right,
        score.false_right,
        score.false_wrong,
        score.failed,
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def read_pairs(path: Path) -> Iterator[Pair]:
    """The pairs of a table; lines that begin with `# ` name the sections."""
    section = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            section = line[2:]
        else:
            gold, answer, verdict = line.split("\t")
            yield Pair(section, gold, answer, {"yes": True, "no": False}[verdict])


# ---- graders -------------------------------------------------------------------------------------


def graders() -> dict[str, Grader]:
    """Our grader and the peers that are installed."""
    found: dict[str, Grader] = {OURS: ours, "math-verify": math_verify_alone}
    if importlib.util.find_spec("mathruler") and importlib.util.find_spec("pylatexenc"):
        found["mathruler"] = mathruler
    else:
        print(
            "mathruler is not installed (pip install mathruler pylatexenc) and is left out",
            file=sys.stderr,
        )
    return found


def ours(response: str, gold: str) -> bool:
    return grade(response, gold, "math").reward == 1.0


def math_verify_alone(response: str, gold: str) -> bool:
    """As its documentation shows it: both sides parsed with the default settings, the gold answer
    as a formula."""
    from math_verify import parse, verify

    parsed_gold = parse(f"${gold}$", parsing_timeout=None)
    return bool(verify(parsed_gold, parse(response, parsing_timeout=None), timeout_seconds=None))


def mathruler(response: str, gold: str) -> bool:
    """As the authors of ZPPO use it."""
    from mathruler.grader import extract_boxed_content, grade_answer

    return bool(grade_answer(extract_boxed_content(response), gold))


# ---- measuring -----------------------------------------------------------------------------------


def measure(pairs: list[Pair], verdicts: list[bool | None]) -> Score:
    """Count; a pair without a verdict earns nothing, like a wrong answer."""
    wrong = [
        pair for pair, verdict in zip(pairs, verdicts, strict=True) if bool(verdict) != pair.right
    ]
    return Score(
        pairs=len(pairs),
        right=len(pairs) - len(wrong),
        false_right=sum(not pair.right for pair in wrong),
        false_wrong=sum(pair.right for pair in wrong),
        failed=verdicts.count(None),
    )


def decide_all(name: str, table: str, count: int) -> list[bool | None]:
    """Verdicts on all pairs of a table, from child processes that are killed where they hang."""
    verdicts: list[bool | None] = []
    while len(verdicts) < count:
        command = [sys.executable, __file__, "--child", name, table, str(len(verdicts))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as child:
            assert child.stdout is not None
            if _next_word(child.stdout) != b"+":
                raise RuntimeError(f"the grader {name} does not start")
            verdict = _next_word(child.stdout)
            while verdict in VERDICTS:
                verdicts.append(VERDICTS[verdict])
                verdict = _next_word(child.stdout)
            child.kill()
        if len(verdicts) < count:
            verdicts.append(None)
    return verdicts


def _next_word(stream: IO[bytes]) -> bytes:
    """The next byte, or nothing if the child ended or takes too long."""
    ready, _, _ = select.select([stream], [], [], PATIENCE_SECONDS)
    return stream.read(1) if ready else b""


def child(name: str, table: str, first: int) -> int:
    """Print `+`, then a digit per pair: 1 right, 0 wrong, 2 an error."""
    grader = graders()[name]
    stdout = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    grader(r"\boxed{(x+1)^2}", "x^2+2x+1")  # loads what it needs
    stdout.write(b"+")
    for pair in list(read_pairs(TABLES / table))[first:]:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its default action ends this process
        try:
            stdout.write(b"1" if grader(pair.response, pair.gold) else b"0")
        except Exception:
            stdout.write(b"2")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
