"""One raw row → one checked `Question`.

The invariant: what passes can be trained on: it has a text, a gold answer that its grader can find
met, an id and readable pictures. What does not is a `RowError` with one reason.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import msgspec

from zppo.config.rewards import REWARD, REWARD_AND_TEACHER, parts_of, rule_of
from zppo.config.topology import JUDGE, DataConfig
from zppo.data.media import Cell, PictureReader, cell_of, picture_entries
from zppo.data.messages import MARK, read_conversation, without_marks
from zppo.data.pictures import PixelBounds
from zppo.data.question import Question
from zppo.data.sources import Source
from zppo.data.sources.jsonl import kind_of
from zppo.data.sources.layouts import Wanted, paths_of, picture_column, settle, value_of
from zppo.data.text import RowError, as_text, bounded
from zppo.errors import UserError, nearest, sendable
from zppo.grading import GRADERS, get_grader
from zppo.grading.rewards import needs_row
from zppo_protocol.errors import ProtocolError
from zppo_protocol.values import (
    ChatMessage,
    Media,
    PictureReference,
    VideoReference,
    pictures_of,
)

MAX_ID = 200
"""Characters of an id: group ids are built from it and must fit a protocol name."""
MAX_ROW = 262_144
"""Characters of a row's columns as JSON: they travel with every question."""
_WRITTEN_OUT = re.compile(r"""\[\s*\{\s*['"](?:role|content)['"]\s*:""")
"""A conversation that was turned into text on its way into a file."""
_NAMES = {"question": "the question", "answer": "the gold answer"}


class RowReader:
    """Reads the rows of one source, whose grader is `grader` where a row names none."""

    def __init__(self, source: Source, config: DataConfig, *, unpack: bool = False) -> None:
        """`unpack`: write the pictures that lie inside a table into files. Raises UserError for
        settings that contradict each other or the source."""
        self._source = source
        self._pictures = PictureReader(
            Path(config.media_folder) if config.media_folder else source.folder,
            PixelBounds(config.min_pixels, config.max_pixels),
            named_by_content=source.named_by_content,
            unpack=unpack,
        )
        self._columns = source.columns.names
        self._parts = parts_of(config.reward)
        _check_settings(source, config)
        self._grader = source.grader or grader_of(config)
        rules = [part.use for part in self._parts if part.use in GRADERS]
        self._rules = rules if self._parts else [self._grader]
        for name in self._rules:
            get_grader(name)

    def read(self, row: Mapping[str, Any]) -> Question:
        """Raises RowError."""
        earlier, text, inside = self._asked(row)
        answer = self._gold(row)
        cells = self._cells(row, inside)
        text = self._words(earlier, text, len(cells))
        media: tuple[Media, ...] = (
            *self._shown(cells, f"the images ({self._picture_column(row)!r})"),
            *self._videos(row),
        )
        grader = self._own_grader(row)
        for name in self._rules_of(grader):
            if not get_grader(name).usable(answer):
                raise RowError(
                    f"the gold answer is {answer[:40]!r}, which the grader {name!r} can never meet"
                )
        return Question(
            id=self._id(row, text, earlier, media),
            text=text,
            answer=answer,
            media=media,
            grader=grader or self._grader,
            row=_as_json(row) if needs_row(self._parts) else "",
            earlier=earlier,
            own_grader=grader is not None,
        )

    # ---- what is asked ---------------------------------------------------------------------------

    def _asked(
        self, row: Mapping[str, Any]
    ) -> tuple[tuple[ChatMessage, ...], str, list[Cell | None]]:
        """The turns before the last one, the last one, and its pictures."""
        value, name = self._required(row, "question"), self._name("question")
        inside = list[Cell | None]()
        if isinstance(value, list):
            conversation = read_conversation(value, name)
            *earlier, last = conversation.turns
            text, inside = last.content, conversation.pictures
        else:
            earlier, text = [], bounded(as_text(value, name), name)
            if _WRITTEN_OUT.match(text):
                raise RowError(
                    f"{name} is a list of messages written as text; expected the list itself, in "
                    "JSONL, JSON or Parquet"
                )
        system = self._system(row)
        if system and earlier and earlier[0].role == "system":
            raise RowError(
                f"{name} begins with a system message, and the system prompt "
                f"({self._columns['system_prompt']!r}) is another; expected one of them"
            )
        return (*system, *earlier), text, inside

    def _words(self, earlier: Sequence[ChatMessage], text: str, pictures: int) -> str:
        """The last turn without the marks of its pictures."""
        if not pictures:
            return text
        name = self._name("question")
        if any(MARK in turn.content for turn in earlier):
            raise RowError(f"{name} holds {MARK} before its last message; expected it only there")
        return without_marks(text, pictures, name)

    def _system(self, row: Mapping[str, Any]) -> list[ChatMessage]:
        value, name = self._optional(row, "system_prompt", "the system prompt")
        if value is None:
            return []
        return [ChatMessage(role="system", content=bounded(as_text(value, name), name))]

    def _id(
        self,
        row: Mapping[str, Any],
        text: str,
        earlier: Sequence[ChatMessage],
        media: Sequence[Media],
    ) -> str:
        """The row's own id, or one made from what is asked, so that moving rows about does not
        rename them."""
        column = self._columns["id"]
        value = value_of(row, column)
        if value is None:
            turns = [part for turn in earlier for part in (turn.role, turn.content)]
            content = "\0".join([*turns, text, *(one.sha256 for one in pictures_of(media))])
            return f"{self._source.stem}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        name = as_text(value, f"the id ({column!r})")
        if not name.strip() or len(name) > MAX_ID or not name.isprintable():
            raise RowError(
                f"the id ({column!r}) is {name[:40]!r}; expected 1 to {MAX_ID} printable characters"
            )
        return name

    # ---- how it is graded ------------------------------------------------------------------------

    def _gold(self, row: Mapping[str, Any]) -> str:
        """The gold answer; empty where no reward reads it and the row has none."""
        if "answer" in self._source.columns.optional and (
            value_of(row, self._columns["answer"]) is None
        ):
            return ""
        name = self._name("answer")
        return bounded(as_text(self._required(row, "answer"), name), name)

    def _rules_of(self, own: str | None) -> list[str]:
        """The rules that must be able to meet the gold answer."""
        if own is None:
            return self._rules
        part = rule_of(own)[1]
        return [p.use for p in self._parts if p.name == part and p.use in GRADERS] or (
            [] if self._parts else [own]
        )

    def _own_grader(self, row: Mapping[str, Any]) -> str | None:
        value, name = self._optional(row, "grader", "the grader")
        if value is None or (self._parts and "grader" not in self._source.columns.chosen):
            return None
        grader = as_text(value, name)
        if self._parts:
            return self._own_part(grader, name)
        if grader == JUDGE != self._grader:
            raise RowError(
                f"{name} is {JUDGE!r}, which asks the teacher; expected data.grader {JUDGE!r} too"
            )
        if grader not in GRADERS:
            raise RowError(f"{name} is {grader[:40]!r}{nearest(grader, GRADERS)}")
        return grader

    def _own_part(self, part: str, name: str) -> str:
        """The grader of a row that names the one part of data.reward that counts for it."""
        found = {one.name: one for one in self._parts}
        if part not in found:
            raise RowError(f"{name} is {part[:40]!r}{nearest(part, found)}")
        return f"{REWARD_AND_TEACHER if found[part].of_teacher else REWARD}:{part}"

    # ---- pictures --------------------------------------------------------------------------------

    def _cells(self, row: Mapping[str, Any], inside: Sequence[Cell | None]) -> list[Cell]:
        """The pictures of a row, in order: those of its column, among which those of the last
        message have their places."""
        column = self._picture_column(row)
        name, value = f"the images ({column!r})", value_of(row, column)
        own = [cell_of(entry) for entry in picture_entries(value)]
        found = [cell for cell in own if cell is not None]
        if len(found) != len(own):
            raise RowError(
                f"{name} are a {kind_of(value)}; expected a path or a list of paths, or bytes in "
                "the cells of a table"
            )
        if not inside:
            return found
        if inside.count(None) != len(found):
            raise RowError(
                f"{self._name('question')} has {inside.count(None)} parts {{type: image}} for "
                f"the row's pictures, and {name} hold {len(found)}; expected as many"
            )
        following = iter(found)
        return [next(following) if cell is None else cell for cell in inside]

    def _picture_column(self, row: Mapping[str, Any]) -> str:
        """Where this row has its pictures: rows of JSONL need not be alike, and the first may have
        none."""
        chosen = "images" in self._source.columns.chosen
        return self._columns["images"] if chosen else picture_column(row)

    def _shown(self, cells: Sequence[Cell], name: str) -> Iterator[PictureReference]:
        for cell in cells:
            yield self._pictures.read(cell, name)

    def _videos(self, row: Mapping[str, Any]) -> Iterator[VideoReference]:
        column = self._columns["videos"]
        value = value_of(row, column)
        entries = value if isinstance(value, list) else [] if value is None else [value]
        for entry in entries:
            yield self._video(entry, f"the videos ({column!r})")

    def _video(self, value: object, name: str) -> VideoReference:
        """A video as `{frames: paths of its pictures, seconds: when each is shown}`."""
        frames = value.get("frames") if isinstance(value, dict) else None
        seconds = value.get("seconds") if isinstance(value, dict) else None
        if not _all(frames, str) or not _all(seconds, (int, float)):
            raise RowError(
                f"{name} hold {str(value)[:40]!r}; expected {{frames: [paths of pictures], "
                "seconds: [when each is shown]}"
            )
        try:
            return VideoReference(
                frames=tuple(self._pictures.read(Cell(None, path), name) for path in frames),
                seconds=tuple(map(float, seconds)),
            )
        except ProtocolError as error:
            raise RowError(f"a video of {name} cannot be read: {error}") from None

    # ---- columns ---------------------------------------------------------------------------------

    def _name(self, field: str) -> str:
        return f"{_NAMES[field]} ({self._columns[field]!r})"

    def _required(self, row: Mapping[str, Any], field: str) -> Any:
        column = self._columns[field]
        value = value_of(row, column)
        if value is None:
            raise RowError(f"{self._name(field)} is missing{self._why_missing(row, column)}")
        return value

    def _why_missing(self, row: Mapping[str, Any], column: str) -> str:
        """The layout of this row, if it has another than the source; else the nearest column."""
        columns = self._source.columns
        fields = {field: columns.names[field] for field in columns.chosen}
        other = settle(Wanted(fields=fields, optional=columns.optional), row)
        there = all(value_of(row, name) is not None for name in other.required.values())
        if there and other.layout != columns.layout:
            return (
                f": the row is laid out as {other.layout}, and the first one as {columns.layout}; "
                "expected one layout in a source"
            )
        known = list(paths_of(row))
        hint = "" if columns.fits else "; name its column in data.fields"
        return f"{nearest(column, known)}{hint}" if known and column not in known else ""

    def _optional(self, row: Mapping[str, Any], field: str, what: str) -> tuple[Any, str]:
        """The value of a field that is read only where data.fields names its column, and what to
        call it."""
        column = self._columns.get(field)
        return (None, what) if column is None else (value_of(row, column), f"{what} ({column!r})")


def grader_of(config: DataConfig) -> str:
    """The grader of questions whose source brings none."""
    if not config.reward:
        return config.grader
    of_teacher = any(part.of_teacher for part in parts_of(config.reward))
    return REWARD_AND_TEACHER if of_teacher else REWARD


def _check_settings(source: Source, config: DataConfig) -> None:
    get_grader(config.grader)
    least, most = config.min_pixels, config.max_pixels
    if least is not None and most is not None and least > most:
        raise UserError(f"data.min_pixels is {least}; expected at most {most}, data.max_pixels")
    if config.reward and source.grader is not None:
        raise UserError(
            f"data.reward: {source.name!r} brings its own rule, {source.grader!r}; expected no "
            "reward"
        )


def _as_json(row: Mapping[str, Any]) -> str:
    """All columns as JSON, for rewards; what JSON cannot carry, pictures in the table for example,
    is left out."""
    columns = {
        name: plain
        for name, value in row.items()
        if sendable(name) == name and (plain := _plain(value)) is not ...
    }
    text = msgspec.json.encode(columns).decode()
    if len(text) > MAX_ROW:
        raise RowError(
            f"its columns make {len(text)} characters of JSON; at most {MAX_ROW} go with a "
            "question to rewards, so leave columns out of the file"
        )
    return text


def _plain(value: object) -> Any:
    """A value of a column as JSON can carry it, or `...` where it cannot."""
    try:
        plain = msgspec.to_builtins(value, builtin_types=(bytes,))
        msgspec.json.encode(plain)
        return ... if _holds_bytes(plain) else plain
    except (TypeError, ValueError, OverflowError, RecursionError):
        return ...


def _holds_bytes(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_bytes, value.values()))
    if isinstance(value, list):
        return any(map(_holds_bytes, value))
    return isinstance(value, bytes)


def _all(value: object, kind: type | tuple[type, ...]) -> TypeGuard[list[Any]]:
    """Whether a value is a list of something, and of that kind only."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, kind) for one in value)
