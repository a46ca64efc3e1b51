"""One raw row → one checked `Question`.

The invariant: what passes can be trained on: it has a text, a gold answer that its grader can find
met, an id and readable pictures. What does not is a `RowError` with one reason.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import msgspec
from msgspec.structs import replace

from zppo.config.rewards import REWARD, REWARD_AND_TEACHER, parts_of, rule_of
from zppo.config.topology import JUDGE, DataConfig
from zppo.data.media import Cell, PictureReader, cell_of, picture_entries
from zppo.data.messages import read_conversation
from zppo.data.pictures import PixelBounds
from zppo.data.places import IMAGE, NOUNS, VIDEO, Entry, set_places
from zppo.data.question import Question
from zppo.data.sources import Source
from zppo.data.sources.jsonl import kind_of
from zppo.data.sources.layouts import (
    ONE_IMAGE,
    Wanted,
    paths_of,
    picture_column,
    settle,
    value_of,
)
from zppo.data.text import RowError, as_text, bounded
from zppo.data.unshown import unshown_column
from zppo.errors import UserError, nearest, sendable
from zppo.grading import GRADERS, get_grader
from zppo.grading.rewards import CODE, CodeArguments, needs_row
from zppo_protocol.errors import ProtocolError
from zppo_protocol.values import (
    MAX_FRAMES,
    MAX_MEDIA,
    MAX_SECONDS,
    ChatMessage,
    Media,
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
        self._video_name = f"the videos ({self._columns['videos']!r})"
        self._parts = parts_of(config.reward)
        self._needs_row = needs_row(self._parts)
        _check_settings(source, config)
        self._grader = source.grader or grader_of(config)
        rules = [part.use for part in self._parts if part.use in GRADERS]
        self._rules = rules if self._parts else [self._grader]
        for name in self._rules:
            get_grader(name)

    def read(self, row: Mapping[str, Any]) -> tuple[Question, str | None]:
        """The question, and the column of pictures or videos that it is asked without (see
        `_unshown`). Raises RowError."""
        turns, inside = self._asked(row)
        answer = self._gold(row)
        cells = self._cells(row)
        turns, media = self._shown(row, turns, inside, cells)
        *earlier, last = turns
        grader = self._own_grader(row)
        for name in self._rules_of(grader):
            if not get_grader(name).usable(answer):
                raise RowError(
                    f"the gold answer is {answer[:40]!r}, which the grader {name!r} can never meet"
                )
        self._check_tests(row, grader)
        question = Question(
            id=self._id(row, turns, media),
            text=last.content,
            answer=answer,
            media=media,
            grader=grader or self._grader,
            row=_as_json(row) if self._needs_row else "",
            earlier=tuple(earlier),
            own_grader=grader is not None,
        )
        return question, self._unshown(row, media, cells)

    def _unshown(
        self, row: Mapping[str, Any], media: Sequence[Media], cells: Sequence[Cell]
    ) -> str | None:
        """The column of pictures or videos of a row that shows none, or `image` where it holds
        others than those of its column, `cells`; None without one, or where the user has said what
        the columns are."""
        columns = self._source.columns
        if not columns.chosen.isdisjoint({"images", "videos"}):
            return None
        held = {**self._source.pictured, **row}
        if media:  # any other column may hold what they were made of
            others = picture_entries(held.get(ONE_IMAGE))
            held = {ONE_IMAGE: [one for one in others if cell_of(one) not in cells]}
        return unshown_column(held, {*columns.names.values(), self._picture_column(row)})

    # ---- what is asked ---------------------------------------------------------------------------

    def _asked(self, row: Mapping[str, Any]) -> tuple[list[ChatMessage], list[Cell | str]]:
        """The turns, the system message first if there is one, and what stands at their places."""
        value, name = self._required(row, "question"), self._name("question")
        inside = list[Cell | str]()
        if isinstance(value, list):
            conversation = read_conversation(value, name)
            turns, inside = conversation.turns, conversation.inside
        else:
            text = bounded(as_text(value, name), name)
            if _WRITTEN_OUT.match(text):
                raise RowError(
                    f"{name} is a list of messages written as text; expected the list itself, in "
                    "JSONL, JSON or Parquet"
                )
            turns = [ChatMessage(role="user", content=text)]
        system = self._system(row)
        if system and turns[0].role == "system":
            raise RowError(
                f"{name} begins with a system message, and the system prompt "
                f"({self._columns['system_prompt']!r}) is another; expected one of them"
            )
        return [*system, *turns], inside

    def _system(self, row: Mapping[str, Any]) -> list[ChatMessage]:
        value, name = self._optional(row, "system_prompt", "the system prompt")
        if value is None:
            return []
        return [ChatMessage(role="system", content=bounded(as_text(value, name), name))]

    def _id(
        self, row: Mapping[str, Any], turns: Sequence[ChatMessage], media: Sequence[Media]
    ) -> str:
        """The row's own id, or one made from what is asked, so that moving rows about does not
        rename them."""
        column = self._columns["id"]
        value = value_of(row, column)
        if value is None:
            *earlier, last = turns
            told = [part for turn in earlier for part in (turn.role, turn.content)]
            told += [last.content, *(one.sha256 for one in pictures_of(media))]
            content = "\0".join(told)
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

    def _check_tests(self, row: Mapping[str, Any], own: str | None) -> None:
        """What `code` runs behind a program must be there, or no response would have a reward."""
        for part in self._parts:
            if part.use != CODE or (own is not None and rule_of(own)[1] != part.name):
                continue
            column = part.args.get("tests", CodeArguments().tests)
            tests, run = row.get(column), f"the tests ({column!r}), which the reward {part.name!r}"
            if tests is None:
                near = "" if column in row else nearest(column, row)
                raise RowError(
                    f"{run} runs, are missing{near}; name their column in {part.setting}.args.tests"
                )
            if not isinstance(tests, str):
                raise RowError(f"{run} runs, are a {kind_of(tests)}; expected one text of Python")

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

    def _shown(
        self,
        row: Mapping[str, Any],
        turns: list[ChatMessage],
        inside: Sequence[Cell | str],
        cells: Sequence[Cell],
    ) -> tuple[list[ChatMessage], tuple[Media, ...]]:
        """The turns with the places of pictures and videos, and these in their order. A system
        message has no places, and what looks like a mark there is none."""
        columns: dict[str, Sequence[Entry]] = {IMAGE: cells, VIDEO: self._films(row)}
        if not inside and not any(columns.values()):
            return turns, ()
        self._check_as_many(row, inside, columns)
        following = {mark: iter(entries) for mark, entries in columns.items()}
        placed = [next(following[one]) if isinstance(one, str) else one for one in inside]
        free = [entry for entries in following.values() for entry in entries]
        begin = int(turns[0].role == "system")
        texts = [turn.content for turn in turns[begin:]]
        texts, order = set_places(texts, placed, free, self._name("question"))
        if len(order) > MAX_MEDIA:
            raise RowError(
                f"it has {len(order)} pictures and videos; at most {MAX_MEDIA} are taken"
            )
        spoken = zip(turns[begin:], texts, strict=True)
        return (
            [*turns[:begin], *(replace(turn, content=text) for turn, text in spoken)],
            tuple([self._medium(row, entry) for entry in order]),
        )

    def _check_as_many(
        self,
        row: Mapping[str, Any],
        inside: Sequence[Cell | str],
        columns: Mapping[str, Sequence[Entry]],
    ) -> None:
        """Raise RowError unless parts of messages take all of a column, or none of it is theirs."""
        pictures = [one for one in inside if one != VIDEO]
        for kind, name, parts, mark in (
            ("image", self._images(row), pictures, IMAGE),
            ("video", self._video_name, [one for one in inside if one == VIDEO], VIDEO),
        ):
            taken, held = parts.count(mark), len(columns[mark])
            if parts and taken != held:
                raise RowError(
                    f"{self._name('question')} has {taken} parts {{type: {kind}}} for the row's "
                    f"{NOUNS[mark]}s, and {name} hold {held}; expected as many"
                )

    def _cells(self, row: Mapping[str, Any]) -> list[Cell]:
        """The pictures of the row's column."""
        value = value_of(row, self._picture_column(row))
        found = list[Cell]()
        for entry in picture_entries(value):
            cell = cell_of(entry)
            if cell is None:
                raise RowError(
                    f"{self._images(row)} hold {str(entry)[:40]!r}; expected a path, {{image: "
                    "path}, a list of these, or bytes in the cells of a table"
                )
            found.append(cell)
        return found

    def _films(self, row: Mapping[str, Any]) -> list[Any]:
        """The videos of the row's column."""
        value = value_of(row, self._columns["videos"])
        return value if isinstance(value, list) else [] if value is None else [value]

    def _images(self, row: Mapping[str, Any]) -> str:
        return f"the images ({self._picture_column(row)!r})"

    def _picture_column(self, row: Mapping[str, Any]) -> str:
        """Where this row has its pictures: rows of JSONL need not be alike, and the first may have
        none."""
        chosen = "images" in self._source.columns.chosen
        return self._columns["images"] if chosen else picture_column(row)

    def _medium(self, row: Mapping[str, Any], entry: Entry) -> Media:
        if isinstance(entry, Cell):
            return self._pictures.read(entry, self._images(row))
        return self._video(entry, self._video_name)

    def _video(self, value: object, name: str) -> VideoReference:
        """A video as `{frames: paths of its pictures, seconds: when each is shown}`."""
        frames = value.get("frames") if isinstance(value, dict) else None
        seconds = value.get("seconds") if isinstance(value, dict) else None
        if not _all(frames, str) or not _all(seconds, (int, float)):
            raise RowError(
                f"{name} hold {str(value)[:40]!r}; expected {{frames: [paths of pictures], "
                "seconds: [when each is shown]}"
            )
        if len(frames) > MAX_FRAMES:
            raise RowError(
                f"a video of {name} has {len(frames)} frames; at most {MAX_FRAMES} are taken"
            )
        if not all(0 <= second <= MAX_SECONDS for second in seconds):
            raise RowError(
                f"a video of {name} has frames at other times than 0 to {MAX_SECONDS:.0f} seconds"
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
