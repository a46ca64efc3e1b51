"""Procedural questions of the package `reasoning-gym`:
`reasoning_gym:TASK?size=…&seed=…&split=…&SETTING=…`.

The source yields `size` different questions, in an order that depends on the specification alone.
Streams of different seeds are unrelated. `split=train` and `split=heldout` divide the questions of
a task by a hash of their text, so that the two never share one, whatever their seeds. Each question
is scored by the task's own rule (`zppo.grading`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from msgspec import Struct

from zppo.config.topology import REASONING_GYM
from zppo.data.sources.base import RawRow, Source, same_words
from zppo.data.sources.layouts import Wanted, settle
from zppo.errors import UserError, nearest
from zppo.grading.procedural import gold_entry
from zppo.grading.reasoning_gym_tasks import build_task, parse_specification, quiet
from zppo_protocol.values import seed_of

MAX_SIZE = 10_000_000
MAX_ROUNDS = 50
"""Each round draws `size` questions; easy settings repeat themselves, and held-out questions are
one in ten."""
HELD_OUT_SHARE = 10
SPLITS = ("all", "train", "heldout")


class Specification(Struct, frozen=True, kw_only=True):
    """A parsed specification; `settings` are those of the task itself, as text."""

    text: str
    task: str
    size: int = 1000
    seed: int = 0
    split: str = "all"
    settings: Mapping[str, str] = {}

    @property
    def grader(self) -> str:
        """Name of the rule that scores its questions; settings belong to it, since some rules
        depend on them."""
        query = urlencode(self.settings)
        return f"{REASONING_GYM}:{self.task}{'?' if query else ''}{query}"


def open_reasoning_gym(text: str) -> Source:
    """Open `reasoning_gym:TASK?…`. Raises UserError for an unknown task or setting, or if the
    package is missing."""
    specification = read_specification(text)
    first = _stream(specification, 0)
    return Source(
        name=text,
        stem=specification.task,
        folder=Path(),
        unit="question",
        rows=_rows(specification, first),
        columns=settle(Wanted(), ("question", "answer")),
        grader=specification.grader,
    )


def read_specification(text: str) -> Specification:
    """Take a specification apart; settings of the task are left to the task. Raises UserError."""
    task, query = parse_specification(text.partition(":")[2], text)
    split = query.pop("split", "all")
    if split not in SPLITS:
        raise UserError(f"{text}: split is {split!r}{nearest(split, SPLITS)}")
    return Specification(
        text=text,
        task=task,
        size=_whole(query.pop("size", "1000"), "size", 1, MAX_SIZE, text),
        seed=_whole(query.pop("seed", "0"), "seed", 0, 2**63 - 1, text),
        split=split,
        settings=query,
    )


def _whole(text: str, name: str, low: int, high: int, where: str) -> int:
    if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
        raise UserError(
            f"{where}: {name} is {text!r}; expected a whole number from {low} to {high}"
        )
    return int(text)


def _stream(specification: Specification, number: int) -> Any:
    """The task's questions of one round. Its own seeds count up by one per question, so ours are
    spread out first."""
    seed = seed_of(specification.seed, str(number), size=4) >> 1
    return build_task(
        specification.task, specification.settings, seed, specification.size, specification.text
    )


def _rows(specification: Specification, first: Any) -> Iterator[RawRow]:
    """`size` different questions, then the end. Raises UserError if the task has not so many."""
    seen: set[str] = set()
    for number in range(MAX_ROUNDS):
        drawn_before = len(seen)
        stream = first if number == 0 else _stream(specification, number)
        for index in range(specification.size):
            row = _draw(stream, index, specification, seen)
            if row is not None:
                row["id"] = (
                    f"{specification.task}-{specification.seed}"
                    f"-{number * specification.size + index}"
                )
                yield len(seen), row
            if len(seen) == specification.size:
                return
        if len(seen) == drawn_before:
            break
    raise UserError(
        f"{specification.text}: only {len(seen)} different questions were found; expected "
        f"{specification.size}: "
        "lower size, or widen the settings of the task"
    )


def _draw(
    stream: Any, index: int, specification: Specification, seen: set[str]
) -> dict[str, Any] | None:
    """The question at `index`; None if it was seen, belongs to the other split, or could not be
    made."""
    with quiet():
        try:
            entry = stream[index]
        except (
            ValueError,
            RuntimeError,
            IndexError,
        ):  # a task may fail to find a puzzle within its tries
            return None
    words = same_words(str(entry["question"]))
    if words in seen or not _belongs(words, specification.split):
        return None
    seen.add(words)
    return {"question": str(entry["question"]), "answer": gold_entry(entry)}


def _belongs(words: str, split: str) -> bool:
    held_out = hashlib.blake2b(words.encode(), digest_size=8).digest()[-1] % HELD_OUT_SHARE == 0
    return split == "all" or held_out == (split == "heldout")
