r"""Make short arithmetic word problems with worked solutions: training, held-out and lesson
questions.

    python tools/make_arithmetic.py --out models/arithmetic

A question is a story in one to three steps; each step adds, takes away or doubles. The worked
solution has one line for each step and ends in `\boxed{...}`. `train.jsonl` and `heldout.jsonl` are
for reinforcement learning, `lessons.jsonl` (with the solutions) for `tools/make_teacher.py`. No
question stands in two files or twice in one, and a seed gives the same bytes everywhere:
`examples/smollm2` holds the first two files.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from zppo.config.options import counting, positive
from zppo.errors import Parser, run_command
from zppo.records.atomic_file import written_whole

NAMES = ("Ada", "Ben", "Eva", "Ivan", "Kim", "Lea", "Max", "Noor", "Omar", "Tom")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps")
MOST = 20_000
"""Questions of a file."""
LARGEST = 99
"""Numbers stay below 100, so that a line of a solution has at most ten tokens."""


class Story(Struct, frozen=True):
    """Sentences of one kind of story; `{n}` is a number, `{who}` a name, `{what}` a kind of
    thing."""

    start: str
    more: str
    less: str
    double: str
    ask: str


STORIES = (
    Story(
        "{who} has {n} {what}.",
        "{who} gets {n} more.",
        "{who} gives away {n}.",
        "Then {who} doubles the number.",
        "How many {what} does {who} have?",
    ),
    Story(
        "A box holds {n} {what}.",
        "{who} puts {n} in.",
        "{who} takes {n} out.",
        "{who} doubles what is in it.",
        "How many {what} are in the box?",
    ),
    Story(
        "A shop has {n} {what}.",
        "It buys {n}.",
        "It sells {n}.",
        "It doubles its stock.",
        "How many {what} are in the shop?",
    ),
)


class Problem(Struct, frozen=True):
    question: str
    solution: str
    answer: int


def make_problem(steps: int, rng: random.Random) -> Problem:
    """One story with `steps` calculations."""
    story = rng.choice(STORIES)
    names = {"who": rng.choice(NAMES), "what": rng.choice(THINGS)}
    total = rng.randint(3, 40)
    sentences, lines = [story.start.format(n=total, **names)], []
    for _ in range(steps):
        sentence, line, total = make_step(story, total, rng)
        sentences.append(sentence.format(**names) if "{" in sentence else sentence)
        lines.append(line)
    question = " ".join([*sentences, story.ask.format(**names)])
    return Problem(question, "\n".join([*lines, f"\\boxed{{{total}}}"]), total)


def make_step(story: Story, total: int, rng: random.Random) -> tuple[str, str, int]:
    """A sentence (its names still open), its line of the solution, and the new total; between 1 and
    LARGEST."""
    kinds = (
        ["more"] * (total <= LARGEST - 2)
        + ["less"] * (total >= 3)
        + ["double"] * (2 * total <= LARGEST)
    )
    kind = rng.choice(kinds)
    if kind == "double":
        return story.double, f"{total}*2={2 * total}", 2 * total
    number = rng.randint(2, min(40, LARGEST - total if kind == "more" else total - 1))
    new = total + number if kind == "more" else total - number
    sign, sentence = ("+", story.more) if kind == "more" else ("-", story.less)
    return sentence.replace("{n}", str(number)), f"{total}{sign}{number}={new}", new


def distinct_problems(rng: random.Random) -> Iterator[Problem]:
    """Problems of one to three steps in turn, none twice."""
    seen: set[str] = set()
    while True:
        for steps in (1, 2, 3):
            problem = make_problem(steps, rng)
            if problem.question not in seen:
                seen.add(problem.question)
                yield problem


def write(path: Path, name: str, problems: list[Problem], *, solutions: bool) -> None:
    """One JSON object a line; the solution only where it is wanted, so that no trainer can read it
    by mistake."""
    with written_whole(path) as file:
        for index, problem in enumerate(problems):
            row = {
                "id": f"{name}-{index:04}",
                "question": problem.question,
                "answer": str(problem.answer),
            }
            line = json.dumps(row | ({"solution": problem.solution} if solutions else {})) + "\n"
            file.write(line.encode())


def make(out: Path, sizes: dict[str, int], seed: int) -> None:
    """Write the three files into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    problems = distinct_problems(random.Random(seed))
    for name, size in sizes.items():
        chosen = [next(problems) for _ in range(size)]
        write(out / f"{name}.jsonl", name, chosen, solutions=name == "lessons")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--train", type=positive, default=1200, help="training questions")
    parser.add_argument("--heldout", type=positive, default=240, help="held-out questions")
    parser.add_argument(
        "--lessons", type=positive, default=4800, help="questions with worked solutions"
    )
    parser.add_argument("--seed", type=counting, default=135)
    options = parser.parse_args(argv)
    sizes = {name: getattr(options, name) for name in ("heldout", "train", "lessons")}
    for name, size in sizes.items():
        if size > MOST:
            parser.error(f"--{name} is {size}; expected at most {MOST}")
    make(options.out, sizes, options.seed)
    print(
        f"wrote {', '.join(f'{size} {name}' for name, size in sizes.items())} questions to "
        f"{options.out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
