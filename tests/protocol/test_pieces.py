"""Frames in pieces: the same again, or refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zppo_protocol.errors import ProtocolError
from zppo_protocol.limits import JOINT_BYTES, MAX_FRAMES, PIECE_BYTES, Limits
from zppo_protocol.pieces import cut, join, most_pieces

FRAMES = st.lists(st.binary(max_size=40), min_size=1, max_size=MAX_FRAMES)
LIMITS = Limits(header_bytes=1000, payload_bytes=4000)


def views(pieces: list[bytes | bytearray | memoryview]) -> list[memoryview]:
    return [memoryview(piece) for piece in pieces]


@given(FRAMES, st.integers(1, 50))
def test_what_was_cut_is_put_together(frames: list[bytes], piece: int) -> None:
    pieces = cut(frames, piece)
    assert max(map(len, pieces[1:]), default=0) <= piece
    assert len(pieces) <= most_pieces(LIMITS, piece)
    assert join(views(pieces), LIMITS, piece) == frames


@given(FRAMES, st.integers(1, 50), st.data())
def test_what_nobody_cut_is_refused_or_read_as_something(
    frames: list[bytes], piece: int, data: st.DataObject
) -> None:
    pieces = [bytes(one) for one in cut(frames, piece)]
    where = data.draw(st.integers(0, len(pieces) - 1))
    pieces[where : where + data.draw(st.integers(0, 2))] = data.draw(
        st.lists(st.binary(max_size=60), max_size=2)
    )
    try:
        found = join(views(list(pieces)), LIMITS, piece) if pieces else []
    except ProtocolError:
        return
    assert [bytes(one) for one in cut(found, piece)] == pieces if pieces else found == []


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (b"", "a table of 0 bytes is that of no message"),
        (bytes(7), "a table of 7 bytes is that of no message"),
        (bytes(8 * (MAX_FRAMES + 1)), "a table of 520 bytes is that of no message"),
        (b"\xff" * 8, "a message of 18446744073709551615 bytes is over the limit"),
        (b"\x04" + bytes(7), "a message of 2 pieces came in 3"),
    ],
)
def test_a_table_that_lies(table: bytes, sentence: str) -> None:
    with pytest.raises(ProtocolError, match=sentence):
        join(views([table, b"abcd", b"ef"]), LIMITS)


def test_header_and_payload_may_come_in_one_frame() -> None:
    frame = bytes(1000 + JOINT_BYTES + 4000)
    assert join(views(cut([frame])), LIMITS) == [frame]
    with pytest.raises(ProtocolError, match="a message of 5017 bytes is over the limit"):
        join(views(cut([frame + b"x"])), LIMITS)


def test_a_frame_that_fits_is_not_copied() -> None:
    frame = bytes(PIECE_BYTES)
    [found] = join(views(cut([frame])), Limits())
    assert found.obj is frame
