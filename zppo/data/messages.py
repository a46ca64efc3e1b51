"""A conversation as rows hold it, a list of `{role, content}`, read into checked turns.

The invariant: what passes is a chat that every template can be given: perhaps a system message,
then turns of user and assistant in alternation, the last one of the user. Content is text, or a
list of parts `{type: text, text: …}`; the last message may have parts that are pictures as well,
before or after its words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from msgspec import Struct

from zppo.data.media import Cell, cell_of, picture_entries
from zppo.data.sources.jsonl import kind_of
from zppo.data.text import MAX_TEXT, RowError, clean
from zppo_protocol.values import ChatMessage

MAX_TURNS = 1000
ROLES = ("system", "user", "assistant")
MARK = "<image>"
"""What some data sets write into the words where a picture belongs."""
_MARKS = re.compile(rf"(?:\s*{MARK})*\s*")
_OTHER_MEDIA = ("image_url", "video", "video_url", "input_image", "audio")


class Conversation(Struct, frozen=True):
    """Its turns, and the pictures of the last one in their order; None: the next one of the row's
    own column."""

    turns: list[ChatMessage]
    pictures: list[Cell | None]


def read_conversation(value: Sequence[Any], name: str) -> Conversation:
    """A conversation whose last turn is the user's. `name` is what holds it. Raises RowError."""
    if not 0 < len(value) <= MAX_TURNS:
        raise RowError(f"{name} has {len(value)} messages; expected 1 to {MAX_TURNS}")
    read = [_message(one, f"message {i} of {name}") for i, one in enumerate(value, start=1)]
    turns = [turn for turn, _ in read]
    _check_order(turns, name)
    early = next((i for i, (_, pictures) in enumerate(read[:-1], start=1) if pictures), None)
    if early is not None:
        raise RowError(
            f"message {early} of {name} holds a picture; expected pictures in the last message only"
        )
    length = sum(len(turn.content) for turn in turns)
    if length > MAX_TEXT:
        raise RowError(f"{name} has {length} characters; at most {MAX_TEXT} are taken")
    return Conversation(turns, read[-1][1])


def without_marks(text: str, pictures: int, name: str) -> str:
    """The words of a question about so many pictures, at least one, without the marks `<image>`
    before or behind them; these stand for the pictures, which models are shown anyway. Raises
    RowError."""
    marks = text.count(MARK)
    if not marks:
        return text
    if marks != pictures:
        raise RowError(
            f"{name} holds {MARK} {_times(marks)} and the row has {pictures} "
            f"picture{'s' * (pictures > 1)}; expected one for each picture, or none"
        )
    begin = _MARKS.match(text)
    assert begin is not None, "it matches nothing at all, too"
    words = text[begin.end() :].rstrip()
    while words.endswith(MARK):
        words = words.removesuffix(MARK).rstrip()
    if not words:
        raise RowError(f"{name} is empty but for {MARK}")
    if MARK in words:
        raise RowError(
            f"{name} holds {MARK} between words; expected it before or behind them, because models "
            "are shown pictures before the words"
        )
    return words


def _named(keys: Iterable[str]) -> str:
    return " and ".join(map(repr, sorted(map(str, keys))))


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _message(value: Any, name: str) -> tuple[ChatMessage, list[Cell | None]]:
    """A turn and its pictures."""
    if not isinstance(value, dict):
        raise RowError(f"{name} is a {kind_of(value)}; expected {{role, content}}")
    role = value.get("role")
    if role not in ROLES:
        raise RowError(f"{name} has the role {role!r}; expected system, user or assistant")
    parts = _content(value.get("content"), name)
    content = "".join(part for part in parts if isinstance(part, str)).strip()
    if not content:
        raise RowError(f"{name} ({role}) is empty")
    said = [i for i, part in enumerate(parts) if isinstance(part, str) and part.strip()]
    if not all(isinstance(part, str) for part in parts[said[0] : said[-1]]):
        raise RowError(
            f"{name} has a picture between its words; expected pictures before or behind them, "
            "because models are shown pictures before the words"
        )
    return ChatMessage(role=role, content=content), [p for p in parts if not isinstance(p, str)]


def _content(value: Any, name: str) -> list[str | Cell | None]:
    """Words and pictures of a message. Tables fill absent keys of parts with nulls."""
    if isinstance(value, str):
        return [clean(value, name)]
    if value is None or not isinstance(value, list):
        raise RowError(
            f"{name} has a {kind_of(value)} as content; expected text or a list of parts"
        )
    return [_part(part, name) for part in value]


def _part(value: Any, name: str) -> str | Cell | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "image":
        return _picture(value, name)
    if kind in _OTHER_MEDIA:
        raise RowError(
            f"{name} holds a part of the type {kind!r}, which cannot be read; expected parts of "
            "text, and pictures as {type: image}"
        )
    text = value.get("text") if isinstance(value, dict) else None
    if kind != "text" or not isinstance(text, str):
        raise RowError(f"{name} holds a part {str(value)[:40]!r}; expected {{type: text, text: …}}")
    return clean(text, name)


def _picture(part: dict[str, Any], name: str) -> Cell | None:
    """The picture of a part; None where it is the next one of the row."""
    given = {key: one for key, one in part.items() if key not in ("type", "text")}
    held = {key: one for key, one in given.items() if picture_entries(one)}
    if not held:
        return None
    alone = set(held) == {"image"}
    cell = cell_of(held["image"] if alone else held)
    if cell is None or not (alone or set(held) <= {"path", "bytes"}):
        raise RowError(
            f"{name} has a picture with {_named(held)}; expected {{type: image}} for the next "
            "picture of the row, or with its path or bytes"
        )
    return cell


def _check_order(turns: Sequence[ChatMessage], name: str) -> None:
    roles = [turn.role for turn in turns]
    if roles[-1] != "user":
        raise RowError(f"{name} ends with a message of the {roles[-1]}; expected the user's")
    if "system" in roles[1:]:
        place = roles.index("system", 1) + 1
        raise RowError(f"message {place} of {name} is a system message; expected it to come first")
    spoken = roles[1:] if roles[0] == "system" else roles
    if spoken[0] != "user":
        raise RowError(f"{name} begins with a message of the assistant; expected the user's")
    if any(one == other for one, other in pairwise(spoken)):
        raise RowError(
            f"{name} has two messages of one role in a row; expected user and assistant in turn"
        )
