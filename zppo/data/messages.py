"""A conversation as rows hold it, a list of `{role, content}`, read into checked turns.

The invariant: what passes is a chat that every template can be given: perhaps a system message,
then turns of user and assistant in alternation, the last one of the user. Content is text, or a
list of parts: `{type: text, text: …}`, and in all but the system message pictures and videos, each
of which becomes a `PLACE` among the words.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from msgspec import Struct

from zppo.data.media import Cell, cell_of, picture_entries
from zppo.data.places import IMAGE, VIDEO
from zppo.data.sources.jsonl import kind_of
from zppo.data.text import MAX_TEXT, RowError, words
from zppo_protocol.places import PLACE
from zppo_protocol.values import ChatMessage

MAX_TURNS = 1000
ROLES = ("system", "user", "assistant")
_OTHER_MEDIA = ("image_url", "video_url", "input_image", "audio")


class Conversation(Struct, frozen=True):
    """Its turns, and what stands at their places in order: a picture, or `IMAGE` or `VIDEO` for the
    next one of the row's own column."""

    turns: list[ChatMessage]
    inside: list[Cell | str]


def read_conversation(value: Sequence[Any], name: str) -> Conversation:
    """A conversation whose last turn is the user's. `name` is what holds it. Raises RowError."""
    if not 0 < len(value) <= MAX_TURNS:
        raise RowError(f"{name} has {len(value)} messages; expected 1 to {MAX_TURNS}")
    read = [_message(one, f"message {i} of {name}") for i, one in enumerate(value, start=1)]
    turns = [turn for turn, _ in read]
    _check_order(turns, name)
    length = sum(len(turn.content) for turn in turns)
    if length > MAX_TEXT:
        raise RowError(f"{name} has {length} characters; at most {MAX_TEXT} are taken")
    return Conversation(turns, [one for _, inside in read for one in inside])


def _named(keys: Iterable[str]) -> str:
    return " and ".join(map(repr, sorted(map(str, keys))))


def _message(value: Any, name: str) -> tuple[ChatMessage, list[Cell | str]]:
    """A turn, and what stands at its places."""
    if not isinstance(value, dict):
        raise RowError(f"{name} is a {kind_of(value)}; expected {{role, content}}")
    role = value.get("role")
    if role not in ROLES:
        raise RowError(f"{name} has the role {role!r}; expected system, user or assistant")
    parts = _content(value.get("content"), name)
    inside = [part for kind, part in parts if kind != "text"]
    if inside and role == "system":
        raise RowError(
            f"{name} is a system message with a picture or video; expected those in messages of "
            "user and assistant"
        )
    content = "".join(str(part) if kind == "text" else PLACE for kind, part in parts).strip()
    if not content:
        raise RowError(f"{name} ({role}) is empty")
    return ChatMessage(role=role, content=content), inside


def _content(value: Any, name: str) -> list[tuple[str, Cell | str]]:
    """The parts of a message, each behind its type. Tables fill absent keys of parts with nulls."""
    if isinstance(value, str):
        return [("text", words(value, name))]
    if value is None or not isinstance(value, list):
        raise RowError(
            f"{name} has a {kind_of(value)} as content; expected text or a list of parts"
        )
    return [_part(part, name) for part in value]


def _part(value: Any, name: str) -> tuple[str, Cell | str]:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "image":
        return kind, _picture(value, name)
    if kind == "video":
        return kind, _video(value, name)
    if kind in _OTHER_MEDIA:
        raise RowError(
            f"{name} holds a part of the type {kind!r}, which cannot be read; expected parts of "
            "text, and pictures as {type: image}"
        )
    text = value.get("text") if isinstance(value, dict) else None
    if kind != "text" or not isinstance(text, str):
        raise RowError(f"{name} holds a part {str(value)[:40]!r}; expected {{type: text, text: …}}")
    return kind, words(text, name)


def _video(part: dict[str, Any], name: str) -> str:
    held = [key for key in part if key not in ("type", "text") and picture_entries(part[key])]
    if held:
        raise RowError(
            f"{name} has a video with {_named(held)}; expected {{type: video}} for the next video "
            "of the row"
        )
    return VIDEO


def _picture(part: dict[str, Any], name: str) -> Cell | str:
    """The picture of a part; `IMAGE` where it is the next one of the row."""
    given = {key: one for key, one in part.items() if key not in ("type", "text")}
    held = {key: one for key, one in given.items() if picture_entries(one)}
    if not held:
        return IMAGE
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
