"""One raw row → what the rules look at: its words first, its pictures later, because most rows are
dropped before a picture need be looked at.

What cannot be made of a row is a `Dropped`, which names the rule (`RULES`) and says why.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from zppo.curation.recipe import Recipe
from zppo.curation.shards import Shard
from zppo.data.media import Cell, cell_of, media_file, picture_entries, plain_format
from zppo.data.pictures import picture_header, picture_problem, size_problem
from zppo.data.places import IMAGE, set_places
from zppo.data.sources.base import same_words
from zppo.data.text import RowError, as_text, bounded
from zppo.errors import first_line
from zppo.grading import get_grader
from zppo_protocol.places import PLACE

RULES = {
    "bad_row": "no row that can be read",
    "not_listed": "of a sub-dataset that no tier lists",
    "earlier_source": "of a sub-dataset that an earlier source has",
    "question": "without a question that can be asked",
    "answer": "without a gold answer that can be met",
    "reward_type": "of a reward type without a grader",
    "pass_rate": "solved too often",
    "long_answer": "with a gold answer that is too long",
    "few_pictures": "with too few pictures",
    "unreadable_picture": "with a picture that cannot be read",
    "small_picture": "with a picture that is too small",
    "long_picture": "with a picture that the model's processor refuses",
    "long_prompt": "with a prompt that is too long",
    "duplicate": "the same question and pictures as another row",
    "cap": "above the cap of their sub-dataset",
}
"""Every reason for which a row is dropped, in the order in which they are looked for."""
LONGEST_PATH = 80


class Dropped(Exception):
    """A row is left out by the rule `rule`, because of `detail`."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(detail)
        self.rule = rule
        self.detail = detail


class Words(Struct, frozen=True, kw_only=True):
    """What a row says: `name` is the canonical name of its sub-dataset."""

    source: str
    name: str
    question: str
    answer: str
    grader: str
    pass_rate: float | None


class Picture(Struct, frozen=True, kw_only=True):
    """A picture by the SHA-256 (hex) of its bytes; sides in pixels."""

    sha256: str
    format: str
    width: int
    height: int

    @property
    def file(self) -> str:
        """Where a corpus keeps it, from its folder `media` on."""
        return media_file(self.sha256, self.format)


def canonical_name(row: Mapping[str, Any], shard: Shard, recipe: Recipe) -> str:
    """Of the row's sub-dataset; the source's name where the recipe names no column for it, or the
    row has no name there."""
    value = shard.value(row, "sub_dataset")
    named = recipe.names.canonical(str(value)) if isinstance(value, str | int) else ""
    return named or shard.source


def words_of(row: Mapping[str, Any], name: str, shard: Shard, recipe: Recipe) -> Words:
    """Raises Dropped where question, answer or grader cannot be had."""
    answer = _text(shard.value(row, "answer"), "answer", "the gold answer")
    grader = _grader(row, shard, recipe)
    if not get_grader(grader).usable(answer):
        raise Dropped("answer", f"{answer[:40]!r}, which the grader {grader!r} can never meet")
    return Words(
        source=shard.source,
        name=name,
        question=_question(row, shard, recipe.picture_mark),
        answer=answer,
        grader=grader,
        pass_rate=_pass_rate(shard.value(row, "pass_rate")),
    )


def pictures_of(row: Mapping[str, Any], shard: Shard) -> Iterator[tuple[Picture, bytes]]:
    """The pictures of a row, one at a time. Raises Dropped for one that cannot be read."""
    for entry in picture_entries(shard.value(row, "images")):
        data = _bytes(entry, shard)
        problem = picture_problem(data)
        if problem:
            raise Dropped("unreadable_picture", f"the image{_named(entry)} {problem}")
        kind, width, height = picture_header(data)
        sha = hashlib.sha256(data).hexdigest()
        yield (
            Picture(
                sha256=sha,
                format=plain_format(kind),
                width=width,
                height=height,
            ),
            data,
        )


def identity(words: Words, pictures: tuple[Picture, ...]) -> bytes:
    """What two rows are the same by, 32 bytes: the question up to case, width and white space, and
    what is in the pictures."""
    told = "\0".join([same_words(words.question), *(one.sha256 for one in pictures)])
    return hashlib.sha256(told.encode()).digest()


# ---- words ---------------------------------------------------------------------------------------


def _question(row: Mapping[str, Any], shard: Shard, mark: str) -> str:
    """With `IMAGE` where its pictures stand, if the row says so of each and they do not just come
    first."""
    value = shard.value(row, "question")
    pictures = picture_entries(shard.value(row, "images"))
    if isinstance(value, list):
        value = _only_turn(value)
    text = _text(value, "question", "the question")
    mark = mark or (IMAGE if pictures else "")  # a run would take it for one
    if not mark:
        return text
    text = text.replace(mark, IMAGE)
    words = re.sub(rf"[ \t]*{IMAGE}[ \t]*", " ", text)
    if text.count(IMAGE) == len(pictures) and words.strip():
        [placed], _ = set_places([text], [], [Cell()] * len(pictures), "the question")
        return placed.replace(PLACE, IMAGE)
    return _text(words, "question", "the question")


def _only_turn(messages: list[Any]) -> str:
    """The text of the one message of the user; a system message says how to answer, which is the
    run's to say. A part that is a picture is a mark; the pictures have their own column."""
    turns = [one for one in messages if not isinstance(one, dict) or one.get("role") != "system"]
    if len(turns) != 1 or not isinstance(turns[0], dict) or turns[0].get("role") != "user":
        raise Dropped("question", f"{len(turns)} turns; expected one message of the user")
    content = turns[0].get("content")
    if not isinstance(content, list):
        return _text(content, "question", "the question")
    parts = [
        IMAGE if part.get("type") == "image" else part.get("text")
        for part in content
        if isinstance(part, dict)
    ]
    return "".join(part for part in parts if isinstance(part, str))


def _text(value: object, rule: str, name: str) -> str:
    if value is None:
        raise Dropped(rule, f"{name} is missing")
    try:
        return bounded(as_text(value, name), name)
    except RowError as error:
        raise Dropped(rule, str(error)) from None


def _grader(row: Mapping[str, Any], shard: Shard, recipe: Recipe) -> str:
    config, kind = recipe.sources[shard.source], shard.value(row, "reward_type")
    if kind is None:
        return config.grader
    if not isinstance(kind, str) or kind not in config.graders:
        raise Dropped("reward_type", repr(kind)[:60])
    return config.graders[kind]


def _pass_rate(value: object) -> float | None:
    """A number, or None where the row has none that can be read."""
    try:
        return float(value) if isinstance(value, int | float | str) else None
    except (ValueError, OverflowError):
        return None


# ---- pictures ------------------------------------------------------------------------------------


def _bytes(entry: object, shard: Shard) -> bytes:
    """What is in a picture. Raises Dropped."""
    cell = cell_of(entry)
    if cell is None:
        raise Dropped(
            "unreadable_picture", f"the image is {repr(entry)[:40]}; expected path or bytes"
        )
    if cell.content is not None:
        return cell.content
    path = str(cell.path)
    try:
        places = [place / path for place in (shard.file.parent, shard.folder)]
        inside = [place for place in places if _lies_in(place, shard.folder)]
        if not inside:  # a data set must not pick from the other files of a machine
            raise Dropped("unreadable_picture", f"the image{_named(path)} lies outside the source")
        file = next((place for place in inside if place.is_file()), inside[0])
        problem = size_problem(file)
        if problem:
            raise Dropped("unreadable_picture", f"the image{_named(path)} {problem}")
        return file.read_bytes()
    except (OSError, ValueError) as error:  # a path too long, with a NUL, or not ours to read
        why = f"the image{_named(path)} cannot be read ({first_line(error)})"
        raise Dropped("unreadable_picture", why) from None


def _lies_in(file: Path, folder: Path) -> bool:
    """By their names: where the Hub's client keeps data sets, files are links to others outside."""
    return Path(os.path.abspath(file)).is_relative_to(os.path.abspath(folder))


def _named(entry: object) -> str:
    """A picture by its path, of which a long one keeps its end."""
    path = entry.get("path") if isinstance(entry, dict) else entry
    if not isinstance(path, str):
        return ""
    return f" {path!r}" if len(path) <= LONGEST_PATH else f" {'…' + path[-LONGEST_PATH:]!r}"
