"""Messages to frames and back, and the same encoding in one blob for checkpoints.

A message is one msgpack header, a map with the tag `type`, and at most one payload frame that holds
every numpy array end to end, each padded to 8 bytes. In the header an array is `[dtype, shape,
offset]`. Invariants: `decode` raises nothing but `ProtocolError`, whatever the bytes;
`decode(encode(m))` equals `m`; and `encode` refuses what `decode` would refuse, so a mistake shows
at its origin and never as a lost answer.

Arrays that come out are read-only views into the payload and keep it alive; copy what is to be
changed or kept long.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

import msgspec
import numpy as np

from zppo_protocol.errors import ProtocolError
from zppo_protocol.limits import MAX_DIMENSIONS, MAX_FRAMES, Limits
from zppo_protocol.messages import AnyMessage

Buffer: TypeAlias = bytes | bytearray | memoryview
T = TypeVar("T")

ALIGNMENT = 8
DTYPES: dict[str, np.dtype[Any]] = {code: np.dtype(f"<{code}") for code in ("i4", "i8", "f4", "u1")}
CODES = {dtype: code for code, dtype in DTYPES.items()}
BLOB = struct.Struct("<8sQ")
BLOB_MAGIC = b"ZPPO\x00\x00\x00\x01"
DEFAULT_LIMITS = Limits()


def encode(message: AnyMessage, limits: Limits = DEFAULT_LIMITS) -> list[bytes]:
    """Return the one or two frames of `message`. Raises ProtocolError if `decode` would not accept
    them."""
    header, payload = _pack(message)
    frames = [header, payload] if payload else [header]
    decode(frames, limits)
    return frames


def decode(frames: Sequence[Buffer], limits: Limits = DEFAULT_LIMITS) -> AnyMessage:
    """Return the message in `frames`; its arrays are read-only views of the payload. Raises
    ProtocolError only."""
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise ProtocolError(f"a message has one or two frames, got {len(frames)}")
    header, payload = frames[0], frames[1] if len(frames) > 1 else b""
    _check_size("header", len(header), limits.header_bytes)
    _check_size("payload", len(payload), limits.payload_bytes)
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
    value: T = _unpack(view[BLOB.size : BLOB.size + header_bytes], view[payload_start:], type)
    return value


def _pack(value: Any) -> tuple[bytes, bytes]:
    writer = _ArrayWriter()
    try:
        header = msgspec.msgpack.Encoder(enc_hook=writer.reference).encode(value)
    except (ValueError, TypeError, OverflowError, RecursionError, NotImplementedError) as error:
        raise ProtocolError(f"cannot be sent: {error}") from error
    return header, b"".join(writer.pieces)


def _unpack(header: Buffer, payload: Buffer, type: Any) -> Any:
    reader = _ArrayReader(payload)
    try:
        value = msgspec.msgpack.Decoder(type, dec_hook=reader.array).decode(header)
    except (
        ValueError,
        RecursionError,
    ) as error:  # ValueError covers DecodeError and UnicodeDecodeError
        raise ProtocolError(f"not a message: {error}") from error
    reader.finish()
    return value


class _ArrayWriter:
    """Collects the arrays met while a header is encoded; `pieces` joined are the payload."""

    def __init__(self) -> None:
        self.pieces: list[bytes | memoryview] = []
        self.size = 0

    def reference(self, value: Any) -> list[Any]:
        if not isinstance(value, np.ndarray):
            raise NotImplementedError(f"a value of type {type(value).__name__}")
        array = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
        code = CODES.get(array.dtype)
        if code is None or value.ndim > MAX_DIMENSIONS:
            raise ProtocolError(f"an array of {value.dtype.name} with shape {value.shape}")
        offset = self.size
        padding = _padding(array.nbytes)
        self.pieces += [array.reshape(-1).view(np.uint8).data, padding]
        self.size += array.nbytes + len(padding)
        return [code, list(value.shape), offset]


class _ArrayReader:
    """Hands out views of one payload in the order in which the header names them: end to end, no
    gap, no overlap."""

    def __init__(self, payload: Buffer) -> None:
        base = np.frombuffer(payload, dtype=np.uint8)
        # The transport may place a small payload anywhere inside its receive buffer.
        self.base = base if base.ctypes.data % ALIGNMENT == 0 else base.copy()
        self.base.flags.writeable = False
        self.cursor = 0

    def array(self, type_: type, reference: Any) -> np.ndarray:
        if type_ is not np.ndarray:
            raise ProtocolError(f"no value of type {type_.__name__} can be read")
        dtype, shape, offset = _checked_reference(reference)
        size = dtype.itemsize
        for length in shape:
            size *= length
        if offset != self.cursor or offset + size > len(self.base):
            raise ProtocolError(
                f"an array of {size} bytes at {offset} does not lie in {len(self.base)} bytes in "
                "order"
            )
        self.cursor = offset + _aligned(size)
        return self.base[offset : offset + size].view(dtype).reshape(shape)

    def finish(self) -> None:
        if self.cursor != len(self.base):
            raise ProtocolError(
                f"the arrays of the header end at byte {self.cursor} of {len(self.base)}"
            )


def _checked_reference(reference: Any) -> tuple[np.dtype[Any], list[int], int]:
    if not (isinstance(reference, list) and len(reference) == 3):
        raise ProtocolError("an array is [dtype, shape, offset]")
    code, shape, offset = reference
    dtype = DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise ProtocolError(f"an array's dtype is one of {', '.join(DTYPES)}")
    if not (
        isinstance(shape, list)
        and len(shape) <= MAX_DIMENSIONS
        and all(map(_is_count, [*shape, offset]))
    ):
        raise ProtocolError(
            f"an array has at most {MAX_DIMENSIONS} dimensions, counted by whole numbers"
        )
    return dtype, shape, offset


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _check_size(what: str, size: int, limit: int) -> None:
    if size > limit:
        raise ProtocolError(f"a {what} of {size} bytes is over the limit of {limit}")


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _padding(size: int) -> bytes:
    return bytes(_aligned(size) - size)
