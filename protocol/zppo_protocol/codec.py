"""Messages to frames and back, and the same encoding in one blob for checkpoints.

A message is one msgpack header, a map with the tag `type`, and the payload: every numpy array in
the order of the header, each padded to 8 bytes. So the header need not say where an array lies,
only what it is: one of one axis is the whole number 4·length + dtype, any other the list of its
dtype and its lengths, where a dtype is its place in `DTYPES`. The payload is one frame, or several
end to end: an array of at least `LARGE` bytes has one of its own, so that it is sent from where it
lies (a copy of it where somebody else may write there); the padding behind the last array of a
frame may be left out. A header below `LARGE` bytes and what lies before the first array of such
size are one frame, since each frame costs more than its copy: the length of the header, 8 bytes
that begin with a 0, the header, padded to 8 bytes, and the payload.
Invariants: `decode` raises nothing but `ProtocolError`, whatever the bytes; `decode(encode(m))`
equals `m`; and `encode` refuses what `decode` would refuse, so a mistake shows at its origin and
never as a lost answer.

Arrays that come out are views into the payload and keep their frame alive; copy what is to be
changed or kept long. They are read-only: those of a blob from the start, those of a message once
they were checked (`arrays`).
"""

from __future__ import annotations

import math
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
DTYPE_NAMES = ("i4", "i8", "f4", "u1")
DTYPES: tuple[np.dtype[Any], ...] = tuple(np.dtype(f"<{name}") for name in DTYPE_NAMES)
"""What an array may hold; on the wire a dtype is its place here, two bits."""
CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
CODE_BITS, CODE_MASK = 2, 3
SHIFTS = [dtype.itemsize.bit_length() - 1 for dtype in DTYPES]
"""An element has two to the power of this many bytes."""
LENGTH = struct.Struct(">Q")
BLOB = struct.Struct("<8sQ")
BLOB_MAGIC, FIRST_MAGIC = b"ZPPO\x00\x00\x00\x02", b"ZPPO\x00\x00\x00\x01"
DEFAULT_LIMITS = Limits()
PADDINGS = [bytes(count) for count in range(ALIGNMENT)]
REFUSALS = (ValueError, TypeError, OverflowError, RecursionError, NotImplementedError)
"""All that msgspec and the hooks raise; ValueError covers msgspec's own and UnicodeEncodeError."""
SHAPES = {message: shape_of(message) for message in get_args(AnyMessage)}


def encode(message: AnyMessage, limits: Limits = DEFAULT_LIMITS) -> list[Buffer]:
    """Return the frames of `message`; large arrays of it are frames as they are, unless somebody
    could write them. Raises ProtocolError if `decode` would not accept them."""
    shape = SHAPES.get(type(message))
    if shape is None:
        raise ProtocolError(f"cannot be sent: {type(message).__name__} is no message")
    try:
        # Arrays were checked when the message was built and cannot be written since; the types of
        # the other fields were not.
        checked = msgspec.convert(message, shape, from_attributes=True)
    except REFUSALS as error:
        raise ProtocolError(f"cannot be sent: {error}") from error
    header, payload = _OWN.writer.write(checked)
    _check_sizes(len(header), payload.size, limits)
    return payload.frames(header)


def decode(frames: Sequence[Buffer], limits: Limits = DEFAULT_LIMITS) -> AnyMessage:
    """Return the message in `frames`; its arrays are read-only views of the payload. Raises
    ProtocolError only."""
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise ProtocolError(f"a message has 1 to {MAX_FRAMES} frames, got {len(frames)}")
    header, payload = _parted(frames)
    _check_sizes(len(header), sum(map(len, payload)), limits)
    message: AnyMessage = _OWN.messages.read(header, payload)
    return message


def dumps(value: Any) -> bytes:
    """Return `value`, any msgspec-encodable value with numpy arrays in it, as one blob for `loads`.

    Layout: 8 bytes of magic and version, the header's length (u64), the header, zeros up to a
    multiple of 8, payload. Raises ProtocolError for what msgspec or the dtype allow-list cannot
    represent.
    """
    header, payload = _OWN.writer.write(value)
    return b"".join([BLOB.pack(BLOB_MAGIC, len(header)), *_padded(header), *payload.pieces])


def loads(data: Buffer, type: type[T]) -> T:
    """Return the `type` that `dumps` wrote; arrays are read-only views of `data`. Raises
    ProtocolError only."""
    view = memoryview(data).cast("B").toreadonly()
    if len(view) < BLOB.size:
        raise ProtocolError(f"a blob has at least {BLOB.size} bytes, got {len(view)}")
    magic, header_bytes = BLOB.unpack(view[: BLOB.size])
    if magic not in (BLOB_MAGIC, FIRST_MAGIC):
        raise ProtocolError("this is not a blob of this version")
    payload_start = BLOB.size + _aligned(header_bytes)
    if payload_start > len(view):
        raise ProtocolError(
            f"the blob is cut off: its header needs {payload_start} bytes, got {len(view)}"
        )
    reader = _FirstReader(type) if magic == FIRST_MAGIC else _Reader(type)
    value: T = reader.read(view[BLOB.size : BLOB.size + header_bytes], [view[payload_start:]])
    return value


class _Writer:
    """Writes headers, and sets aside the arrays that it meets. One thread only."""

    def __init__(self) -> None:
        self._encode_into = msgspec.msgpack.Encoder(enc_hook=self._reference).encode_into
        self._header = bytearray()
        self._payload = _Payload()

    def write(self, value: Any) -> tuple[bytearray, _Payload]:
        """The header, until the next call, and what belongs to it. Raises ProtocolError for what
        msgspec or the list of dtypes cannot represent."""
        if len(self._header) >= LARGE:
            self._header = _unless_held(self._header)
        try:
            self._encode_into(value, self._header)
            return self._header, self._payload
        except REFUSALS as error:
            raise ProtocolError(f"cannot be sent: {error}") from error
        finally:
            self._payload = _Payload()

    def _reference(self, value: Any) -> int | list[int]:
        if not isinstance(value, np.ndarray):
            raise NotImplementedError(f"a value of type {type(value).__name__}")
        code = CODES.get(value.dtype)
        if code is None:
            value = value.astype(value.dtype.newbyteorder("<"))
            code = CODES.get(value.dtype)
        if code is None or value.ndim > MAX_DIMENSIONS:
            raise ProtocolError(f"an array of {value.dtype.name} with shape {value.shape}")
        self._payload.add(value)
        return value.size << CODE_BITS | code if value.ndim == 1 else [code, *value.shape]


class _Payload:
    """The arrays of a header in its order; `pieces` joined are `size` bytes."""

    __slots__ = ("_large", "pieces", "size")

    def __init__(self) -> None:
        self.pieces: list[Any] = []
        self.size = 0
        self._large: list[tuple[int, int]] = []
        """Place among the pieces, and in the payload."""

    def add(self, array: np.ndarray) -> None:
        size = array.nbytes
        if size >= LARGE:
            self._large.append((len(self.pieces), self.size))
        if size:  # no bytes, no piece: of an empty one of two axes there is no view as bytes
            self.pieces.append(np.ascontiguousarray(array))
        if padding := -size % ALIGNMENT:
            self.pieces.append(PADDINGS[padding])
        self.size += size + padding

    def frames(self, header: bytearray) -> list[Buffer]:
        """Large arrays as they are, and what lies between them joined; a short header is joined
        with what lies before the first of them."""
        large = self._large[:MOST_LARGE]
        start, done = large[0] if large else (len(self.pieces), self.size)
        if done and len(header) < LARGE:
            head = [LENGTH.pack(len(header)), *_padded(header)]
            size = LENGTH.size + _aligned(len(header)) + done
            frames = [_joined([*head, *self.pieces[:start]], size)]
        else:
            frames, start, done = [_on_its_way(header)], 0, 0
        for place, offset in large:
            if done < offset:
                frames.append(_joined(self.pieces[start:place], offset - done))
            array: np.ndarray = self.pieces[place]
            frames.append(array.data.cast("B") if _is_fixed(array) else array.tobytes())
            padding = -array.nbytes % ALIGNMENT  # is not sent
            start, done = place + 1 + (padding > 0), offset + array.nbytes + padding
        if done < self.size:
            frames.append(_joined(self.pieces[start:], self.size - done))
        return frames


class _Reader:
    """Reads values of one type; hands out views of the payload in the order in which the header
    names them: end to end, no gap, no overlap. One thread only."""

    __slots__ = ("_cursor", "_decode", "_end", "_frame", "_left")

    def __init__(self, type: Any) -> None:
        self._decode = msgspec.msgpack.Decoder(type, dec_hook=self._array).decode
        self._left: Sequence[Buffer]
        self._frame: Buffer
        self._forget()

    def read(self, header: Buffer, payload: Sequence[Buffer]) -> Any:
        self._left = payload
        try:
            value = self._decode(header)
            rest = max(0, self._end - self._cursor)
            if self._left:
                rest += sum(map(len, self._left))
        except (ValueError, RecursionError) as error:
            # ValueError covers DecodeError and UnicodeDecodeError.
            raise ProtocolError(f"not a message: {error}") from error
        finally:
            self._forget()
        if rest:
            raise ProtocolError(f"{rest} bytes lie behind the arrays of the header")
        return value

    def _forget(self) -> None:
        """A frame lives as long as its arrays, and no longer."""
        self._left = ()
        self._frame, self._cursor, self._end = b"", 0, 0

    def _array(self, type_: type, reference: Any) -> np.ndarray:
        if type_ is not np.ndarray:
            raise ProtocolError(f"no value of type {type_.__name__} can be read")
        if type(reference) is int and reference >= 0:
            code, count, shape = reference & CODE_MASK, reference >> CODE_BITS, None
        else:
            code, shape = _checked_reference(reference)
            count = math.prod(shape)
        size, begin = count << SHIFTS[code], self._cursor
        if begin + size > self._end:
            begin = self._in_next_frame(size)
        self._cursor = begin + size + ALIGNMENT - 1 & -ALIGNMENT  # `_aligned` without the call
        # `np.ndarray` would hold the owner of the frame alone: that could be resized or changed.
        flat = np.frombuffer(self._frame, DTYPES[code], count, begin)
        return flat if shape is None else _shaped(flat, shape)

    def _in_next_frame(self, size: int) -> int:
        """Where an array begins that is not in what is left of this frame."""
        if not size:  # nowhere: the frame may end without the padding of its last array
            return self._end
        if self._cursor < self._end or not self._left:
            raise ProtocolError(
                f"an array of {size} bytes does not lie in the "
                f"{max(0, self._end - self._cursor)} bytes that are left of a frame"
            )
        frame, *self._left = self._left
        self._frame, self._cursor, self._end = _placed(frame), 0, len(frame)
        return 0 if size <= self._end else self._in_next_frame(size)


class _FirstReader(_Reader):
    """For blobs of the first version, in which an array was `[name of dtype, lengths, offset]`; its
    offset, too, followed from the order."""

    def _array(self, type_: type, reference: Any) -> np.ndarray:
        match reference:
            case [str(name), list(shape), int()] if name in DTYPE_NAMES:
                return super()._array(type_, [DTYPE_NAMES.index(name), *shape])
        raise ProtocolError("an array is [dtype, shape, offset]")


class _Own(threading.local):
    """What one thread has for itself: building a reader costs more than most messages."""

    def __init__(self) -> None:
        self.writer = _Writer()
        self.messages = _Reader(AnyMessage)


_OWN = _Own()


class _Space(threading.local):
    """Memory that large frames of one thread are joined in, one after the other."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def take(self, size: int) -> memoryview:
        """`size` bytes that nobody else reads."""
        self._bytes = _unless_held(self._bytes)
        if len(self._bytes) < size:
            self._bytes = bytearray(size)
        return memoryview(self._bytes)[:size]


_SPACE = _Space()


def _joined(pieces: Sequence[Any], size: int) -> Buffer:
    """Arrays and paddings end to end, `size` bytes in all."""
    if size < REUSED:
        return b"".join(pieces)
    space, begin = _SPACE.take(size), 0
    for piece in pieces:
        raw = memoryview(piece).cast("B")
        end = begin + len(raw)
        space[begin:end] = raw
        begin = end
    return space.toreadonly()


def _unless_held(memory: bytearray) -> bytearray:
    """Memory to use again, or new where somebody has it.

    Fresh memory costs several times what is copied into it: the kernel hands it out page by page.
    A frame is a view of it, and while anybody has one (ZeroMQ until the frame has gone, an array
    that was read from it) Python refuses to resize the memory.
    """
    try:
        memory.append(0)
        memory.pop()
    except BufferError:
        return bytearray()
    return memory


def _on_its_way(header: bytearray) -> Buffer:
    """A header as a frame, whose memory `_Writer` uses again."""
    return bytes(header) if len(header) < LARGE else memoryview(header).toreadonly()


def _padded(header: bytearray) -> tuple[bytearray, bytes]:
    """A header and what lies between it and the payload."""
    return header, PADDINGS[-len(header) % ALIGNMENT]


def _parted(frames: Sequence[Buffer]) -> tuple[Buffer, Sequence[Buffer]]:
    """The header and the payload of a message. Raises ProtocolError."""
    first, *others = frames
    if not len(first) or first[0]:  # a header is a map, which no 0 begins
        return first, others
    if len(first) < LENGTH.size:
        raise ProtocolError(f"a length has {LENGTH.size} bytes, got {len(first)}")
    (size,) = LENGTH.unpack_from(first)
    view, end = memoryview(first), LENGTH.size + size
    if end > len(view):
        left = len(view) - LENGTH.size
        raise ProtocolError(f"a header of {size} bytes does not fit into {left}")
    return view[LENGTH.size : end], [view[_aligned(end) :], *others]


def _is_fixed(owner: Any) -> bool:
    """Whether nobody can write an array while it is on its way: it may be a view of another that is
    not read-only."""
    while isinstance(owner, np.ndarray):
        if owner.flags.writeable:
            return False
        owner = owner.base
    return owner is None or isinstance(owner, bytes | memoryview)


def _placed(frame: Buffer) -> Buffer:
    """The bytes of a frame, aligned: the transport may place a small payload anywhere inside its
    receive buffer."""
    if len(frame) < ALIGNMENT or not np.frombuffer(frame, np.int64, 1).flags.aligned:
        return bytes(frame)
    return frame


_NUMBERS = {int}
"""The types in a list of whole numbers; a bool is none."""


def _checked_reference(reference: Any) -> tuple[int, list[int]]:
    if type(reference) is not list or {*map(type, reference)} != _NUMBERS or min(reference) < 0:
        raise ProtocolError("an array is 4·length + dtype or [dtype, lengths…], in whole numbers")
    code, *shape = reference
    if code >= len(DTYPES):
        raise ProtocolError(f"an array's dtype is a number below {len(DTYPES)}")
    if len(shape) > MAX_DIMENSIONS:
        raise ProtocolError(f"an array has at most {MAX_DIMENSIONS} dimensions")
    return code, shape


def _shaped(flat: np.ndarray, shape: list[int]) -> np.ndarray:
    try:
        return flat.reshape(shape)
    except (ValueError, OverflowError) as error:
        # no elements, but a length beyond any machine's
        raise ProtocolError(f"an array of shape {shape}") from error


def _check_sizes(header: int, payload: int, limits: Limits) -> None:
    if header > limits.header_bytes:
        raise _over_the_limit("header", header, limits.header_bytes)
    if payload > limits.payload_bytes:
        raise _over_the_limit("payload", payload, limits.payload_bytes)


def _over_the_limit(what: str, size: int, limit: int) -> ProtocolError:
    return ProtocolError(f"a {what} of {size} bytes is over the limit of {limit}")


def _aligned(size: int) -> int:
    return size + ALIGNMENT - 1 & -ALIGNMENT
