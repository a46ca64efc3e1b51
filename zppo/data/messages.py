"""A conversation as rows hold it, a list of `{role, content}`, read into checked turns.

The invariant: what passes is a chat that every template can be given: perhaps a system message,
then turns of user and assistant in alternation, the last one of the user. Content is text, or a
list of parts `{type: text, text: …}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from zppo.data.sources.jsonl import kind_of
from zppo.data.text import MAX_TEXT, RowError, clean
from zppo_protocol.values import ChatMessage

MAX_TURNS = 1000
ROLES = ("system", "user", "assistant")
_PICTURES = ("image", "image_url", "video", "input_image")


def read_conversation(value: Sequence[Any], name: str) -> list[ChatMessage]:
    """The turns of a conversation; the last is the user's. `name` is what holds it. Raises
    RowError."""
    if not 0 < len(value) <= MAX_TURNS:
        raise RowError(f"{name} has {len(value)} messages; expected 1 to {MAX_TURNS}")
    turns = [_message(one, f"message {i} of {name}") for i, one in enumerate(value, start=1)]
    _check_order(turns, name)
    length = sum(len(turn.content) for turn in turns)
    if length > MAX_TEXT:
        raise RowError(f"{name} has {length} characters; at most {MAX_TEXT} are taken")
    return turns


def _message(value: Any, name: str) -> ChatMessage:
    if not isinstance(value, dict):
        raise RowError(f"{name} is a {kind_of(value)}; expected {{role, content}}")
    role = value.get("role")
    if role not in ROLES:
        raise RowError(f"{name} has the role {role!r}; expected system, user or assistant")
    content = _content(value.get("content"), name).strip()
    if not content:
        raise RowError(f"{name} ({role}) is empty")
    return ChatMessage(role=role, content=content)


def _content(value: Any, name: str) -> str:
    """The text of a message. Tables fill absent keys of parts with nulls."""
    if isinstance(value, str):
        return clean(value, name)
    if value is None or not isinstance(value, list):
        raise RowError(
            f"{name} has a {kind_of(value)} as content; expected text or a list of parts"
        )
    return "".join(_part(part, name) for part in value)


def _part(value: Any, name: str) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in _PICTURES:
        raise RowError(
            f"{name} holds a part of the type {kind!r}, and pictures in messages cannot be read "
            "yet; expected parts of text only"
        )
    text = value.get("text") if isinstance(value, dict) else None
    if kind != "text" or not isinstance(text, str):
        raise RowError(f"{name} holds a part {str(value)[:40]!r}; expected {{type: text, text: …}}")
    return clean(text, name)


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
