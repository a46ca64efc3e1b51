"""The pictures and videos of a row find their places in its turns.

A row says where one belongs by a part of a message, or by a mark in its words, one for each; or it
does not, and they come first. Which of these it was cannot be seen afterwards: those that only come
before the last turn have no `PLACE` (`zppo_protocol.places`), and no white space follows them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeAlias

from zppo.data.media import Cell
from zppo.data.text import RowError
from zppo.errors import count_of
from zppo_protocol.places import PLACE, without_places

IMAGE, VIDEO = "<image>", "<video>"
"""What data sets write into the words where a picture, or a video, belongs."""
Entry: TypeAlias = Any
"""A picture of a row, which is a Cell, or else a video as its column holds it."""
NOUNS = {IMAGE: "picture", VIDEO: "video"}
_FIRST = re.compile(rf"[{PLACE}\s]*")


def set_places(
    turns: Sequence[str], inside: Sequence[Entry], free: Sequence[Entry], name: str
) -> tuple[list[str], list[Entry]]:
    """The turns with a place for each picture and video, and these in the order of their places; or
    the turns without places, if all come before the last turn.

    `inside` have places in `turns` already, `free` have none. `name` is what the row calls the
    turns. Raises RowError for marks that are not one for each, and for a last turn without words.
    """
    if not inside and not free:
        return list(turns), []
    texts = _without_first(turns)
    if texts != turns:
        inside, free = [], [*inside, *free]
    marked = [mark for mark in (IMAGE, VIDEO) if _is_marked(mark, texts, inside, free, name)]
    kinds = {mark: iter([one for one in free if mark_of(one) == mark]) for mark in marked}
    waiting = {PLACE: iter(inside), **kinds}
    order = list[Entry]()

    def place(found: re.Match[str]) -> str:
        order.append(next(waiting[found[0]]))
        return PLACE

    *earlier, last = (re.sub("|".join(waiting), place, text) for text in texts)
    first = [one for one in free if mark_of(one) not in marked]
    before = "".join(earlier).count(PLACE)
    order[before:before] = first
    if not without_places(last).strip():
        raise RowError(f"{name} is empty but for {mark_of(order[-1])}")
    return _without_first([*earlier, PLACE * len(first) + last]), order


def mark_of(entry: Entry) -> str:
    return IMAGE if isinstance(entry, Cell) else VIDEO


def _without_first(turns: Sequence[str]) -> list[str]:
    """The turns without places if all of these come before the words of the last turn."""
    *earlier, last = turns
    begin = _FIRST.match(last)
    assert begin is not None, "it matches nothing at all, too"
    words = last[begin.end() :]
    moved = PLACE in last and not any(PLACE in text for text in (*earlier, words))
    return [*earlier, words if moved else last]


def _is_marked(
    mark: str, texts: Sequence[str], inside: Sequence[Entry], free: Sequence[Entry], name: str
) -> bool:
    """Whether the words say where the pictures (or videos) belong. Raises RowError where they
    should and do not."""
    count, placed, wanted = (
        sum(text.count(mark) for text in texts),
        sum(mark_of(one) == mark for one in inside),
        sum(mark_of(one) == mark for one in free),
    )
    if not count or not placed + wanted:
        return False
    noun = NOUNS[mark]
    if placed:
        raise RowError(
            f"{name} holds {mark} in its words and {noun}s as parts; expected one of the two"
        )
    if count != wanted:
        times = "once" if count == 1 else f"{count} times"
        raise RowError(
            f"{name} holds {mark} {times} and the row has {count_of(wanted, noun)}; "
            f"expected one for each {noun}, or none"
        )
    return True
