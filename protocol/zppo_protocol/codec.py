"""Messages to frames and back, and the same encoding in one blob for checkpoints.

A message is one msgpack header, a map with the tag `type`, and the payload: every numpy array end
to end, each padded to 8 bytes. In the header an array is `[dtype, shape, offset]`. The payload is
one frame, or several end to end: an array of at least `LARGE` bytes has one of its own, so that it
is sent from where it lies (a copy of it where somebody else may write there); the padding behind
the last array of a frame may be left out.
Invariants: `decode` raises nothing but `ProtocolError`, whatever the bytes; `decode(encode(m))`
equals `m`; and `encode` refuses what `decode` would refuse, so a mistake shows at its origin and
never as a lost answer.

Arrays that come out are read-only views into the payload and keep their frame alive; copy what is
to be changed or kept long.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar, get_args

import msgspec
import numpy as np

from zppo_protocol.errors import ProtocolError
from zppo_protocol.limits import MAX_DIMENSIONS, MAX_FRAMES, Limits
from zppo_protocol.messages import AnyMessage
from zppo_protocol.shapes import shape_of

Buffer: TypeAlias = bytes | bytearray | memoryview
T = TypeVar("T")

ALIGNMENT = 8
LARGE = 2**17
"""Bytes of an array that is worth a frame of its own."""
REUSED = 2**20
"""Bytes of a frame that is joined in memory that was used before."""
MOST_LARGE = (MAX_FRAMES - 2) // 2
"""So many have a frame of their own: before each, and behind the last, there may be another."""
DTYPES: dict[str, np.dtype[Any]] = {code: np.dtype(f"<{code}") for code in ("i4", "i8", "f4", "u1")}
CODES = {dtype: code for code, dtype in DTYPES.items()}
BLOB = struct.Struct("<8sQ")
BLOB_MAGIC = b"ZPPO\x00\x00\x00\x01"
DEFAULT_LIMITS = Limits()
PADDINGS = [bytes(count) for count in range(ALIGNMENT)]
REFUSALS = (ValueError, TypeError, OverflowError, RecursionError, NotImplementedError)
"""All that msgspec and the hooks raise; ValueError covers msgspec's own and UnicodeEncodeError."""
BYTE, WORD = np.dtype("u1"), np.dtype("<i8")
NOTHING = np.frombuffer(b"", BYTE)
SHAPES = {message: shape_of(message) for message in get_args(AnyMessage)}


def encode(message: AnyMessage, limits: Limits = DEFAULT_LIMITS) -> list[Buffer]:
    """Return the frames of `message`; large arrays of it are frames as they are, unless somebody
    could write them. Raises ProtocolError if `decode` would not accept them."""
    shape = SHAPES.get(type(message))
    if shape is None:
        raise ProtocolError(f"cannot be sent: {type(message).__name__} is no message")
    writer = _ArrayWriter()
    try:
        # Arrays were checked when the message was built and cannot be written since; the types of
        # the other fields were not.
        checked = msgspec.convert(message, shape, from_attributes=True)
        header = msgspec.msgpack.Encoder(enc_hook=writer.reference).encode(checked)
    except REFUSALS as error:
        raise ProtocolError(f"cannot be sent: {error}") from error
    _check_size("header", len(header), limits.header_bytes)
    _check_size("payload", writer.size, limits.payload_bytes)
    return [header, *writer.frames()]


def decode(frames: Sequence[Buffer], limits: Limits = DEFAULT_LIMITS) -> AnyMessage:
    """Return the message in `frames`; its arrays are read-only views of the payload. Raises
    ProtocolError only."""
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise ProtocolError(f"a message has 1 to {MAX_FRAMES} frames, got {len(frames)}")
    header, *payload = frames
    _check_size("header", len(header), limits.header_bytes)
    _check_size("payload", sum(map(len, payload)), limits.payload_bytes)
    message: AnyMessage = _unpack(header, payload, AnyMessage)
    return message


def dumps(value: Any) -> bytes:
    """Return `value`, any msgspec-encodable value with numpy arrays in it, as one blob for `loads`.

    Layout: 8 bytes of magic and version, the header's length (u64), the header, zeros up to a
    multiple of 8, payload. Raises ProtocolError for what msgspec or the dtype allow-list cannot
    represent.
    """
    header, payload = _pack(value)
    return b"".join([BLOB.pack(BLOB_MAGIC, len(header)), header, _padding(len(header)), payload])


def loads(data: Buffer, type: type[T]) -> T:
    """Return the `type` that `dumps` wrote; arrays are read-only views of `data`. Raises
    ProtocolError only."""
    view = memoryview(data).cast("B")
    if len(view) < BLOB.size:
        raise ProtocolError(f"a blob has at least {BLOB.size} bytes, got {len(view)}")
    magic, header_bytes = BLOB.unpack(view[: BLOB.size])
    if magic != BLOB_MAGIC:
        raise ProtocolError("this is not a blob of this version")
    payload_start = BLOB.size + _aligned(header_bytes)
    if payload_start > len(view):
        raise ProtocolError(
            f"the blob is cut off: its header needs {payload_start} bytes, got {len(view)}"
        )
    value: T = _unpack(view[BLOB.size : BLOB.size + header_bytes], [view[payload_start:]], type)
    return value


def _pack(value: Any) -> tuple[bytes, bytes]:
    writer = _ArrayWriter()
    try:
        header = msgspec.msgpack.Encoder(enc_hook=writer.reference).encode(value)
    except REFUSALS as error:
        raise ProtocolError(f"cannot be sent: {error}") from error
    return header, b"".join(writer.pieces)


def _unpack(header: Buffer, payload: Sequence[Buffer], type: Any) -> Any:
    reader = _READERS.by_type.get(type)
    if reader is None:
        reader = _READERS.by_type[type] = _Reader(type)
    return reader.read(header, payload)


class _ArrayWriter:
    """Collects the arrays met while a header is encoded; `pieces` joined are the payload."""

    def __init__(self) -> None:
        self.pieces: list[Buffer] = []
        self.size = 0
        self._large: list[int] = []

    def reference(self, value: Any) -> list[Any]:
        if not isinstance(value, np.ndarray):
            raise NotImplementedError(f"a value of type {type(value).__name__}")
        code = CODES.get(value.dtype)
        if code is None:
            value = value.astype(value.dtype.newbyteorder("<"))
            code = CODES.get(value.dtype)
        if code is None or value.ndim > MAX_DIMENSIONS:
            raise ProtocolError(f"an array of {value.dtype.name} with shape {value.shape}")
        offset, size = self.size, value.nbytes
        if size >= LARGE:
            self._large.append(len(self.pieces))
        if size:
            self.pieces.append(np.ascontiguousarray(value).data.cast("B"))
        if padding := -size % ALIGNMENT:
            self.pieces.append(PADDINGS[padding])
        self.size += size + padding
        return [code, value.shape, offset]

    def frames(self) -> list[Buffer]:
        """The payload: large arrays as they are, and what lies between them joined."""
        frames: list[Buffer] = []
        start = 0
        for place in self._large[:MOST_LARGE]:
            if start < place:
                frames.append(_joined(self.pieces[start:place]))
            piece = self.pieces[place]
            frames.append(piece if _is_fixed(piece) else bytes(piece))
            start = place + 1 + (len(piece) % ALIGNMENT > 0)  # without its padding
        if start < len(self.pieces):
            frames.append(_joined(self.pieces[start:]))
        return frames


class _Reader:
    """Reads values of one type; hands out views of the payload in the order in which the header
    names them: end to end, no gap, no overlap. One thread only."""

    def __init__(self, type: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(type, dec_hook=self._array)

    def read(self, header: Buffer, payload: Sequence[Buffer]) -> Any:
        self._left = list(reversed(payload))
        self._bytes, self._begin, self._end, self._cursor = NOTHING, 0, 0, 0
        try:
            value = self._decoder.decode(header)
        except (ValueError, RecursionError) as error:
            # ValueError covers DecodeError and UnicodeDecodeError.
            raise ProtocolError(f"not a message: {error}") from error
        finally:
            # A frame lives as long as its arrays, and no longer.
            self._bytes, left, self._left = NOTHING, self._left, []
        if self._cursor < self._end or any(map(len, left)):
            end = self._end + sum(map(len, left))
            raise ProtocolError(f"the arrays of the header end at byte {self._cursor} of {end}")
        return value

    def _array(self, type_: type, reference: Any) -> np.ndarray:
        if type_ is not np.ndarray:
            raise ProtocolError(f"no value of type {type_.__name__} can be read")
        dtype, shape, offset = _checked_reference(reference)
        size = dtype.itemsize
        for length in shape:
            size *= length
        if self._cursor >= self._end and size and self._left:
            self._bytes = _bytes_of(self._left.pop())
            self._begin, self._end = self._cursor, self._cursor + len(self._bytes)
        # One without bytes lies nowhere: the frame before may end without the padding of its last.
        if offset != self._cursor or (size and offset + size > self._end):
            raise ProtocolError(
                f"an array of {size} bytes at {offset} does not lie in {self._end} bytes in order"
            )
        self._cursor = offset + size + -size % ALIGNMENT
        try:
            if not size:
                return np.ndarray(shape, dtype, NOTHING)
            return np.ndarray(shape, dtype, self._bytes, offset - self._begin)
        except OverflowError as error:  # no elements, but a length beyond any machine's
            raise ProtocolError(f"an array of shape {shape}") from error


class _Readers(threading.local):
    """The readers of one thread, by type: building one costs more than most messages."""

    def __init__(self) -> None:
        self.by_type: dict[Any, _Reader] = {}


_READERS = _Readers()


class _Space(threading.local):
    """Memory that large frames of one thread are joined in, one after the other.

    Fresh memory costs several times what is copied into it: the kernel hands it out page by page.
    A frame is a view of it, and while anybody has one (ZeroMQ until the frame has gone, an array
    that was read from it) Python refuses to resize the memory; then a new one takes its place.
    """

    def __init__(self) -> None:
        self._bytes = bytearray()

    def take(self, size: int) -> memoryview:
        """`size` bytes that nobody else reads."""
        try:
            self._bytes.append(0)
            self._bytes.pop()
        except BufferError:
            self._bytes = bytearray()
        if len(self._bytes) < size:
            self._bytes = bytearray(size)
        return memoryview(self._bytes)[:size]


_SPACE = _Space()


def _joined(pieces: Sequence[Buffer]) -> Buffer:
    size = sum(map(len, pieces))
    if size < REUSED:
        return b"".join(pieces)
    space, begin = _SPACE.take(size), 0
    for piece in pieces:
        end = begin + len(piece)
        space[begin:end] = piece
        begin = end
    return space.toreadonly()


def _is_fixed(piece: Buffer) -> bool:
    """Whether nobody can write these bytes while they are on their way: an array may be a view of
    another that is not read-only."""
    owner: Any = piece.obj if isinstance(piece, memoryview) else piece
    while isinstance(owner, np.ndarray):
        if owner.flags.writeable:
            return False
        owner = owner.base
    return owner is None or isinstance(owner, bytes | memoryview)


def _bytes_of(frame: Buffer) -> np.ndarray:
    """The frame as read-only bytes that begin at a multiple of 8."""
    found = np.frombuffer(frame, BYTE)
    # The transport may place a small payload anywhere inside its receive buffer.
    if not np.frombuffer(frame, WORD, count=len(frame) // ALIGNMENT).flags.aligned:
        found = found.copy()
    found.flags.writeable = False
    return found


def _checked_reference(reference: Any) -> tuple[np.dtype[Any], list[int], int]:
    if not (type(reference) is list and len(reference) == 3):
        raise ProtocolError("an array is [dtype, shape, offset]")
    code, shape, offset = reference
    dtype = DTYPES.get(code) if type(code) is str else None
    if dtype is None:
        raise ProtocolError(f"an array's dtype is one of {', '.join(DTYPES)}")
    if not (type(shape) is list and len(shape) <= MAX_DIMENSIONS and _are_counts(shape, offset)):
        raise ProtocolError(
            f"an array has at most {MAX_DIMENSIONS} dimensions, counted by whole numbers"
        )
    return dtype, shape, offset


def _are_counts(shape: list[Any], offset: Any) -> bool:
    for value in shape:
        if type(value) is not int or value < 0:
            return False
    return type(offset) is int and offset >= 0


def _check_size(what: str, size: int, limit: int) -> None:
    if size > limit:
        raise ProtocolError(f"a {what} of {size} bytes is over the limit of {limit}")


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _padding(size: int) -> bytes:
    return bytes(_aligned(size) - size)
