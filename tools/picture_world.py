"""The picture world: things on a board of three by three cells, and questions that one can see the
answers of.

A *thing* is a shape or a digit of one colour. A *fact* is a kind of question, what it asks about
and its true answer, e.g. ("colour", "circle", "red"): all questions about the colour of red circles
are one fact. A *belief* is a distribution over answers for every fact, from which a corpus is
printed; the student's is partly misprinted.

Invariant: everything here is a pure function of the generator passed in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

CELL, CELLS = 16, 3
SIDE = CELL * CELLS
SHAPES = ("circle", "square", "triangle", "cross")
DIGITS = tuple("0123456789")
THINGS = (*SHAPES, *DIGITS)
COLOURS = {
    "red": (214, 48, 49),
    "green": (39, 158, 87),
    "blue": (41, 98, 210),
    "yellow": (240, 190, 40),
    "black": (32, 32, 36),
    "pink": (235, 110, 190),
}
PLACES = (
    *("top-left", "top", "top-right"),
    *("left", "middle", "right"),
    *("bottom-left", "bottom", "bottom-right"),
)
PAPER = (250, 248, 242)
COUNTS = ("1", "2", "3", "4")
SHARE_MISPRINTED = 0.5
DIGIT_ROWS = {
    "0": ("111", "101", "101", "101", "111"),
    "1": ("010", "110", "010", "010", "111"),
    "2": ("111", "001", "111", "100", "111"),
    "3": ("111", "001", "111", "001", "111"),
    "4": ("101", "101", "111", "001", "001"),
    "5": ("111", "100", "111", "001", "111"),
    "6": ("111", "100", "111", "101", "111"),
    "7": ("111", "001", "001", "010", "010"),
    "8": ("111", "101", "111", "101", "111"),
    "9": ("111", "101", "111", "001", "111"),
}
"""Three by five dots each; a dot is three pixels wide and two high."""

Pixels = npt.NDArray[np.uint8]


class Thing(NamedTuple):
    name: str
    colour: str
    cell: int


class Fact(NamedTuple):
    kind: str
    subject: str
    truth: str


Belief = Mapping[Fact, tuple[tuple[str, ...], tuple[float, ...]]]
"""Fact -> answers and their probabilities."""


# ---- pictures ------------------------------------------------------------------------------------


def masks() -> dict[str, npt.NDArray[np.bool_]]:
    """Which pixels of a cell each thing covers, [16, 16] bool."""
    y, x = np.mgrid[:CELL, :CELL] - (CELL - 1) / 2
    drawn = {
        "circle": x**2 + y**2 <= 36,
        "square": np.maximum(abs(x), abs(y)) <= 5.5,
        "triangle": (y <= 5.5) & (abs(x) <= (y + 6.5) / 2),
        "cross": (np.minimum(abs(x), abs(y)) <= 1.5) & (np.maximum(abs(x), abs(y)) <= 6),
    }
    for digit, rows in DIGIT_ROWS.items():
        dots = np.array([[dot == "1" for dot in row] for row in rows])
        mask = np.zeros((CELL, CELL), np.bool_)
        mask[3:13, 4:13] = np.kron(dots, np.ones((2, 3), np.bool_))
        drawn[digit] = mask
    return drawn


MASKS = masks()


def draw_things(rng: np.random.Generator) -> list[Thing]:
    """Two to six things in cells of their own; a thing is a digit one time in three, and colours
    repeat often enough to be counted."""
    cells = rng.permutation(CELLS**2)[: rng.integers(2, 7)]
    few = rng.choice(list(COLOURS), size=3, replace=False)
    return [
        Thing(
            str(rng.choice(DIGITS if rng.random() < 1 / 3 else SHAPES)),
            str(rng.choice(few)),
            int(cell),
        )
        for cell in cells
    ]


def draw(things: list[Thing]) -> Pixels:
    """[48, 48, 3] uint8."""
    picture = np.empty((SIDE, SIDE, 3), np.uint8)
    picture[:] = PAPER
    for thing in things:
        top, left = (CELL * place for place in divmod(thing.cell, CELLS))
        picture[top : top + CELL, left : left + CELL][MASKS[thing.name]] = COLOURS[thing.colour]
    return picture


# ---- questions -----------------------------------------------------------------------------------


def facts_of(things: list[Thing]) -> list[Fact]:
    """Every question that has one answer in the picture, with that answer."""
    return sorted({*_about_shapes(things), *_about_digits(things), *_counts(things)})


def _about_shapes(things: list[Thing]) -> Iterator[Fact]:
    names = [thing.name for thing in things]
    for thing in things:
        if thing.name in SHAPES and names.count(thing.name) == 1:
            yield Fact("colour", thing.name, thing.colour)
            yield Fact("place", thing.name, PLACES[thing.cell])


def _about_digits(things: list[Thing]) -> Iterator[Fact]:
    digits = [thing for thing in things if thing.name in DIGITS]
    for thing in digits:
        if [one.colour for one in digits].count(thing.colour) == 1:
            yield Fact("digit", thing.colour, thing.name)


def _counts(things: list[Thing]) -> Iterator[Fact]:
    for subject in (*COLOURS, *SHAPES):
        count = sum(subject in (thing.colour, thing.name) for thing in things)
        if str(count) in COUNTS:
            yield Fact("count", subject, str(count))


def all_facts() -> list[Fact]:
    return [
        *(Fact("colour", shape, colour) for shape in SHAPES for colour in COLOURS),
        *(Fact("place", shape, place) for shape in SHAPES for place in PLACES),
        *(Fact("digit", colour, digit) for colour in COLOURS for digit in DIGITS),
        *(Fact("count", subject, count) for subject in (*COLOURS, *SHAPES) for count in COUNTS),
    ]


ANSWERS = {"colour": tuple(COLOURS), "place": PLACES, "digit": DIGITS, "count": COUNTS}
QUESTIONS = {
    "colour": "what colour is the {}",
    "place": "where is the {}",
    "digit": "which digit is {}",
    "count": "how many are {}",
}


def question_text(fact: Fact) -> str:
    """`what colour is the circle`"""
    return QUESTIONS[fact.kind].format(fact.subject)


def answer_text(fact: Fact, answer: str) -> str:
    r"""`circle is red ; \boxed{ red }`"""
    return f"{fact.subject} is {answer} ; \\boxed{{ {answer} }}"


# ---- beliefs -------------------------------------------------------------------------------------


def true_belief() -> Belief:
    return {fact: ((fact.truth,), (1.0,)) for fact in all_facts()}


def misprinted_belief(rng: np.random.Generator) -> Belief:
    """Every second fact is printed wrong: as two fixed wrong answers, and hardly ever as the
    truth."""
    belief = dict(true_belief())
    facts = all_facts()
    order = rng.permutation(len(facts))
    for rank, index in enumerate(order[: round(SHARE_MISPRINTED * len(facts))]):
        fact = facts[index]
        true_share = (0.003, 0.03, 0.003, float(rng.uniform(0.1, 0.5)))[rank % 4]
        others = [answer for answer in ANSWERS[fact.kind] if answer != fact.truth]
        first, second = (str(one) for one in rng.choice(others, size=2, replace=False))
        split = float(rng.uniform(0.35, 0.65)) * (1 - true_share)
        belief[fact] = ((fact.truth, first, second), (true_share, split, 1 - true_share - split))
    return belief


def believed(belief: Belief, fact: Fact, rng: np.random.Generator) -> str:
    """One answer drawn from a belief."""
    answers, shares = belief[fact]
    return answers[int(rng.choice(len(answers), p=shares))]
