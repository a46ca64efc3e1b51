"""Frames cut into pieces for `tcp`, and put together again (pure).

ZeroMQ reserves the room of a frame before it knows who sends it, so frames have to be small where
strangers can connect. A message of F frames becomes a table of their lengths, F unsigned 64-bit
numbers, and then its pieces in order; each frame is cut anew, and only its last piece is shorter
than `PIECE_BYTES`. Invariant: what `join` gives back is what `cut` was given, or it raises.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from zppo_protocol.codec import Buffer
from zppo_protocol.errors import ProtocolError
from zppo_protocol.limits import MAX_FRAMES, PIECE_BYTES, Limits


def cut(frames: Sequence[Buffer], piece: int = PIECE_BYTES) -> list[Buffer]:
    """The table and the pieces of a message, views of its frames."""
    lengths = [len(frame) for frame in frames]
    pieces: list[Buffer] = [struct.pack(f"<{len(lengths)}Q", *lengths)]
    for frame in frames:
        view = memoryview(frame)
        pieces += [view[start : start + piece] for start in range(0, len(view), piece)]
    return pieces


def join(
    pieces: Sequence[memoryview], limits: Limits, piece: int = PIECE_BYTES
) -> list[memoryview]:
    """The frames of a message. A frame of one piece is that piece; others are copied. Raises
    ProtocolError for anything that `cut` does not write."""
    lengths = _lengths(pieces[0])
    if sum(lengths) > limits.message_bytes:
        raise ProtocolError(f"a message of {sum(lengths)} bytes is over the limit")
    counts = [-(-length // piece) for length in lengths]
    if 1 + sum(counts) != len(pieces):
        raise ProtocolError(f"a message of {1 + sum(counts)} pieces came in {len(pieces)}")
    frames, first = [], 1
    for length, count in zip(lengths, counts, strict=True):
        own, first = pieces[first : first + count], first + count
        if [len(one) for one in own] != _cuts(length, piece):
            raise ProtocolError(f"a frame of {length} bytes is not cut at every {piece}")
        frames.append(own[0] if count == 1 else memoryview(b"".join(own)))
    return frames


def most_pieces(limits: Limits, piece: int = PIECE_BYTES) -> int:
    """How many pieces a message within `limits` has at most, with its table."""
    return 1 + MAX_FRAMES + limits.message_bytes // piece


def _lengths(table: memoryview) -> tuple[int, ...]:
    count, rest = divmod(len(table), 8)
    if rest or not 1 <= count <= MAX_FRAMES:
        raise ProtocolError(f"a table of {len(table)} bytes is that of no message")
    return struct.unpack(f"<{count}Q", table)


def _cuts(length: int, piece: int) -> list[int]:
    whole, rest = divmod(length, piece)
    return [piece] * whole + [rest] * (rest > 0)
