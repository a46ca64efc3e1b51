"""The codec: every message survives the trip, and no bytes whatsoever raise anything but
ProtocolError."""

from __future__ import annotations

import math
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import inspect

from zppo_protocol import messages as m
from zppo_protocol.codec import (
    ALIGNMENT,
    BLOB_MAGIC,
    CODES,
    FIRST_MAGIC,
    LARGE,
    LENGTH,
    MOST_LARGE,
    REUSED,
    decode,
    dumps,
    encode,
    loads,
)
from zppo_protocol.errors import ProtocolError
from zppo_protocol.limits import MAX_FRAMES, Limits
from zppo_protocol.samples import GroupSamples, TokenScores, TrainGroup
from zppo_protocol.support import Support, support_of
from zppo_protocol.values import Grade, Media, PictureReference, VideoReference

MESSAGE_TYPES = get_args(m.AnyMessage)
TASK_FIELDS = inspect.type_info(m.GenerateTask).fields  # type: ignore[attr-defined]
SHORT = {"max_size": 4}
packed = msgspec.msgpack.encode
INT32, FLOAT32 = CODES[np.dtype("<i4")], CODES[np.dtype("<f4")]


# ---- any message, from its own type information --------------------------------------------------


@st.composite
def group_samples(draw: st.DrawFn) -> GroupSamples:
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    tokens = sum(lengths)
    cuts = (
        sorted(draw(st.sets(st.integers(1, max(1, tokens - 1)), max_size=3))) if tokens > 1 else []
    )
    counts = np.diff([0, *cuts, tokens]) if tokens else []
    int32 = st.integers(0, 2**31 - 1)
    floats = st.floats(-(2.0**99), 0.0, width=32, allow_subnormal=False)
    token_ids = draw(st.lists(int32, min_size=tokens, max_size=tokens))
    return GroupSamples(
        prompt_ids=np.array(draw(st.lists(int32, min_size=1, max_size=5)), np.int32),
        token_ids=np.array(token_ids, np.int32),
        log_probs=np.array(draw(st.lists(floats, min_size=tokens, max_size=tokens)), np.float32),
        offsets=np.cumsum([0, *lengths]).astype(np.int32),
        version_spans=np.array([(c, draw(st.integers(-1, 99))) for c in counts], np.int32).reshape(
            -1, 2
        ),
        texts=draw(st.lists(st.text(**SHORT), min_size=len(lengths), max_size=len(lengths))),
        finish_reasons=[draw(st.sampled_from(["stop", "length"])) for _ in lengths],
        support=draw(st.none() | supports(token_ids)),
        media_tokens=draw(st.just([]) | st.just([1])),
    )


@st.composite
def supports(draw: st.DrawFn, token_ids: list[int] | None = None) -> Support:
    """A set of up to 3 ids for each token, with the token in it."""
    if token_ids is None:
        token_ids = draw(st.lists(st.integers(0, 2**31 - 1), max_size=4))
    others = st.sets(st.integers(0, 2**31 - 1), max_size=2)
    return support_of([np.array(sorted({i} | draw(others)), np.int32) for i in token_ids])


@st.composite
def generate_tasks(draw: st.DrawFn) -> m.GenerateTask:
    fields = {field.name: values(field.type) for field in TASK_FIELDS}
    task = draw(st.builds(m.GenerateTask, **{**fields, "with_support": st.just(False)}))
    return msgspec.structs.replace(task, with_support=task.sampling.top_k > 0)


@st.composite
def token_scores(draw: st.DrawFn, tokens: int | None = None) -> TokenScores:
    """Rows of 0 to 3 tokens whose probabilities sum to less than 1; -1 fills up the shorter
    rows."""
    tokens = draw(st.integers(0, 6)) if tokens is None else tokens
    width = draw(st.integers(0, 3))
    ids = st.lists(st.integers(-1, 2**31 - 1), min_size=width, max_size=width)
    floats = st.lists(st.floats(-(2.0**99), -1.5, width=32), min_size=width, max_size=width)
    shape = (tokens, width)
    return TokenScores(
        token_ids=np.array([draw(ids) for _ in range(tokens)], np.int32).reshape(shape),
        log_probs=np.array([draw(floats) for _ in range(tokens)], np.float32).reshape(shape),
    )


@st.composite
def score_tasks(draw: st.DrawFn) -> m.ScoreTask:
    samples = draw(group_samples())
    return m.ScoreTask(
        task_id=draw(st.text(min_size=1, **SHORT)),
        prompt_ids=samples.prompt_ids,
        token_ids=samples.token_ids,
        offsets=samples.offsets,
        top_k=draw(st.integers(1, 4096)),
        temperature=draw(st.floats(0.01, 100.0)),
        media=[draw(media()) for _ in samples.media_tokens],
        media_tokens=samples.media_tokens,
    )


def media() -> st.SearchStrategy[Media]:
    return st.one_of(any_message(PictureReference), videos())


@st.composite
def videos(draw: st.DrawFn) -> VideoReference:
    frame = draw(any_message(PictureReference))
    seconds = sorted(draw(st.sets(st.floats(0.0, 1e9), min_size=1, max_size=3)))
    return VideoReference(frames=(frame,) * len(seconds), seconds=tuple(seconds))


@st.composite
def train_groups(draw: st.DrawFn) -> TrainGroup:
    samples = draw(group_samples())
    n = len(samples.finish_reasons)
    rewards = np.array(
        draw(st.lists(st.floats(0, 1, width=32, allow_subnormal=False), min_size=n, max_size=n)),
        np.float32,
    )
    name = st.text(min_size=1, **SHORT)
    return TrainGroup(
        group_id=draw(name),
        question_id=draw(name),
        kind="bcq",
        samples=samples,
        rewards=rewards,
        scores=draw(st.none() | token_scores(len(samples.token_ids))),
        media=[draw(media()) for _ in samples.media_tokens],
    )


def values(kind: inspect.Type) -> st.SearchStrategy[Any]:
    """Hypothesis values for a msgspec type: the bounds come from the messages themselves, so a new
    one is covered."""
    match kind:
        case inspect.StrType() if kind.pattern is not None:
            return st.from_regex(kind.pattern, fullmatch=True)
        case inspect.StrType():
            return st.text(min_size=kind.min_length or 0, **SHORT)
        case inspect.BytesType():
            return st.binary(max_size=64)
        case inspect.IntType():
            return st.integers(kind.ge if kind.ge is not None else -(2**63), kind.le or 2**63)
        case inspect.FloatType():
            low = kind.ge if kind.ge is not None else kind.gt
            exclude = kind.gt is not None
            return st.floats(
                low, kind.le, exclude_min=exclude, allow_nan=False, allow_infinity=False
            )
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
        case inspect.LiteralType():
            return st.sampled_from(kind.values)
        case inspect.ListType():
            return st.lists(values(kind.item_type), max_size=3)
        case inspect.TupleType():
            return st.tuples(*(values(part) for part in kind.item_types))
        case inspect.DictType():
            return st.dictionaries(values(kind.key_type), values(kind.value_type), max_size=3)
        case inspect.UnionType():
            return st.one_of([values(part) for part in kind.types])
        case inspect.StructType():
            return structs(kind)
    raise NotImplementedError(kind)


def structs(kind: inspect.StructType) -> st.SearchStrategy[Any]:
    special = {
        GroupSamples: group_samples,
        TrainGroup: train_groups,
        TokenScores: token_scores,
        m.ScoreTask: score_tasks,
        m.GenerateTask: generate_tasks,
        Support: supports,
        VideoReference: videos,
    }
    if kind.cls in special:
        return special[kind.cls]()
    return st.builds(kind.cls, **{field.name: values(field.type) for field in kind.fields})


def any_message(cls: type) -> st.SearchStrategy[Any]:
    return values(inspect.type_info(cls))


def plain(value: Any) -> Any:
    """The value with its arrays as (dtype, shape, list), which can be compared."""
    return msgspec.to_builtins(
        value, enc_hook=lambda array: (array.dtype.str, array.shape, array.tolist())
    )


def are_fixed(value: Any) -> bool:
    """Whether no array in a value can be written."""
    found: list[bool] = []
    msgspec.to_builtins(value, enc_hook=lambda array: found.append(array.flags.writeable))
    return found != [] and not any(found)


def example_result(texts: tuple[str, ...] = ("four", "5")) -> m.GenerateResult:
    samples = GroupSamples(
        prompt_ids=np.array([1, 2, 3], np.int32),
        token_ids=np.array([4, 5, 6, 7, 8], np.int32),
        log_probs=np.array([-0.5, -1.0, 0.0, -2.0, -0.25], np.float32),
        offsets=np.array([0, 2, 5], np.int32),
        version_spans=np.array([[4, 7], [1, 8]], np.int32),
        texts=list(texts),
        finish_reasons=["stop", "length"],
    )
    return m.GenerateResult(task_id="12/q-17/bcq", samples=samples)


def apart(message: m.AnyMessage) -> tuple[bytes, bytes]:
    """Header and payload of a message that came in one frame; so they may come as well."""
    [frame] = map(bytes, encode(message))
    header = LENGTH.size + int.from_bytes(frame[: LENGTH.size], "big")
    return frame[LENGTH.size : header], frame[header + -header % ALIGNMENT :]


# ---- what goes in comes out ----------------------------------------------------------------------


def test_the_union_holds_every_message() -> None:
    assert set(MESSAGE_TYPES) == set(m.Message.__subclasses__())


@pytest.mark.slow
@pytest.mark.parametrize("cls", MESSAGE_TYPES, ids=lambda cls: cls.__name__)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_every_message_survives_the_trip(cls: type, data: st.DataObject) -> None:
    message = data.draw(any_message(cls))
    assert plain(decode(encode(message))) == plain(message)
    assert plain(loads(dumps(message), cls)) == plain(message)


def test_a_message_with_small_arrays_is_one_frame_too() -> None:
    assert len(encode(m.Credits(count=3))) == 1
    header, payload = apart(example_result())
    assert len(payload) == 16 + 24 + 24 + 16 + 16
    assert b"\x07\x00\x00\x00" not in header, "numbers of arrays belong to the payload"


def test_header_and_payload_may_come_in_frames_of_their_own() -> None:
    message = example_result()
    assert plain(decode(apart(message))) == plain(decode(encode(message))) == plain(message)


@pytest.mark.parametrize(("length", "frames"), [(LARGE - 1000, 1), (LARGE, 2)])
def test_a_long_header_is_not_copied_into_another_frame(length: int, frames: int) -> None:
    messages = [example_result(("x" * length, text)) for text in "ab"]
    sent = [encode(message) for message in messages]
    assert list(map(len, sent)) == [frames] * 2
    for message, one in zip(messages, sent, strict=True):
        assert plain(decode(one)) == plain(message), "what is on its way stays as it is"


def test_memory_of_a_long_header_is_used_again() -> None:
    message = example_result(("x" * LARGE, ""))
    places = {np.frombuffer(encode(message)[0], np.uint8).ctypes.data for _ in range(9)}
    assert len(places) <= 2, "the second time it may have to grow"


def test_frames_stay_as_they_are_when_more_are_made() -> None:
    sent = [encode(m.Credits(count=count)) for count in (1, 2)]
    assert [decode(one) for one in sent] == [m.Credits(count=1), m.Credits(count=2)]


def test_arrays_cannot_be_written_wherever_they_came_in() -> None:
    for message in (example_result(), many([3, LARGE // 4])):
        assert are_fixed(decode([bytearray(frame) for frame in encode(message)]))
    blob = bytearray(dumps([np.arange(3)]))
    assert are_fixed(loads(blob, list[np.ndarray]))


def many(sizes: list[int]) -> m.TrainWindow:
    """A window whose groups have so many tokens; every value of an array is another."""
    groups = []
    for index, size in enumerate(sizes):
        samples = GroupSamples(
            prompt_ids=np.arange(3, dtype=np.int32) + index,
            token_ids=np.arange(size, dtype=np.int32) + index,
            log_probs=-np.arange(size, dtype=np.float32) - index,
            offsets=np.array([0, size], np.int32),
            version_spans=np.array([[size, index]] * (size > 0), np.int32).reshape(-1, 2),
            texts=[],
            finish_reasons=["stop"],
        )
        reward = np.array([index], np.float32)
        groups.append(TrainGroup(f"g{index}", "q", "plain", samples, reward))
    return m.TrainWindow(step=1, groups=groups)


@pytest.mark.parametrize(
    ("sizes", "frames"),
    [
        ([LARGE // 4 - 1], 1),
        ([LARGE // 4], 4),
        ([LARGE // 4 + 1, 5, LARGE // 4], 7),
        ([LARGE // 4 + 1] * 40, 48),
    ],
    ids=["none large", "two large", "odd sizes", "more than have a frame"],
)
def test_large_arrays_are_frames_as_they_are(sizes: list[int], frames: int) -> None:
    message = many(sizes)
    header, *payload = encode(message)
    assert 1 + len(payload) == frames <= MAX_FRAMES
    large = [
        group.samples.token_ids
        for group in message.groups
        if group.samples.token_ids.nbytes >= LARGE
    ]
    for array in large[:15]:
        assert any(np.shares_memory(array, np.frombuffer(frame, np.uint8)) for frame in payload)
    received = [header, *(bytes(frame) for frame in payload)]
    assert plain(decode(received)) == plain(message)
    for cut in range(1, len(received)):
        with pytest.raises(ProtocolError):
            decode(received[:cut])
        with pytest.raises(ProtocolError):
            decode([*received[:cut], received[cut][:-5], *received[cut + 1 :]])
        with pytest.raises(ProtocolError):
            decode([*received[:cut], received[cut] + bytes(8), *received[cut + 1 :]])
        with pytest.raises(ProtocolError):
            decode([*received[:cut], bytes(8), *received[cut:]][:MAX_FRAMES])


def test_a_large_view_of_what_can_be_written_is_copied() -> None:
    """Frames wait in a queue: what an engine writes meanwhile must not be sent."""
    size = LARGE // 4
    base = np.ones(2 * size, np.int32)
    whole = many([size]).groups[0].samples
    samples = msgspec.structs.replace(whole, token_ids=base[:size], texts=["a"])
    message = m.GenerateResult(task_id="t", samples=samples)
    frames = encode(message)
    before = plain(decode([bytes(frame) for frame in frames]))
    base[:] = 7
    assert plain(decode(frames)) == before
    sent, forwarded = (
        [np.frombuffer(frame, np.uint8) for frame in one]
        for one in (frames, encode(decode(frames)))
    )
    assert any(np.shares_memory(sent[2], frame) for frame in forwarded)


def test_what_came_over_a_socket_is_sent_on_from_where_it_lies() -> None:
    came = [zmq.Frame(frame).buffer for frame in encode(many([LARGE // 4]))]
    _, *payload = encode(decode(came))
    places = [
        {np.frombuffer(frame, np.uint8).ctypes.data for frame in one if len(frame) >= LARGE}
        for one in (came, payload)
    ]
    assert len(places[0]) == 2 and places[1] == places[0]


@pytest.mark.parametrize("size", [LARGE // 4, LARGE // 4 + 1])
def test_arrays_without_elements_may_stand_behind_a_large_one(size: int) -> None:
    """As with a long prompt whose responses are all empty."""
    samples = GroupSamples(
        prompt_ids=np.zeros(size, np.int32),
        token_ids=np.zeros(0, np.int32),
        log_probs=np.zeros(0, np.float32),
        offsets=np.zeros(2, np.int32),
        version_spans=np.zeros((0, 2), np.int32),
        texts=[""],
        finish_reasons=["stop"],
    )
    message = m.GenerateResult(task_id="t", samples=samples)
    assert plain(decode(encode(message))) == plain(message)


@pytest.mark.parametrize("size", [LARGE // 4 - 2, LARGE // 4], ids=["joined", "large"])
@pytest.mark.parametrize("count", [2, REUSED // LARGE, MOST_LARGE])
def test_groups_without_tokens_may_stand_among_others(size: int, count: int) -> None:
    """Whatever of the payload is joined, and in whichever memory."""
    message = many([0, *[size] * count, 0])
    assert plain(decode([bytes(frame) for frame in encode(message)])) == plain(message)


def test_arrays_are_read_only_views_of_the_payload() -> None:
    header, payload = apart(example_result())
    samples = decode([header, payload]).samples
    base = np.frombuffer(payload, np.uint8)
    for array in (samples.token_ids, samples.log_probs, samples.version_spans):
        assert np.shares_memory(array, base) and not array.flags.writeable


def test_a_payload_at_an_odd_address_still_gives_aligned_arrays() -> None:
    header, payload = apart(example_result())
    shifted = memoryview(b"x" + payload)[1:]
    decoded = decode([header, shifted])
    assert decoded.samples.token_ids.flags.aligned
    assert plain(decoded) == plain(example_result())


def test_arrays_need_not_be_contiguous_or_little_endian_to_be_written() -> None:
    value = {
        "rows": np.arange(12, dtype=np.int64).reshape(3, 4).T,
        "big": np.array([1.5, -2.0], ">f4"),
    }
    back = loads(dumps(value), dict[str, np.ndarray])
    assert np.array_equal(back["rows"], value["rows"]) and np.array_equal(back["big"], value["big"])


# ---- what is refused where it is made ------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (
            m.StepTrained(step=1, group_ids=[], metrics={"loss": float("nan")}, seconds=1.0),
            "metrics",
        ),
        (m.StepTrained(step=1, group_ids=[], metrics={}, seconds=float("inf")), "seconds"),
        (m.Goodbye(reason="x" * 20_001), "length <= 20000"),
        (m.Goodbye(reason="\ud800"), "surrogates"),
        (m.Credits(count=-1), ">= 0"),
        (m.Credits(count="3"), "Expected `int`"),
        (m.Credits(count=object()), "Expected `int`, got `object`"),
        (m.Goodbye(reason=b"bytes"), "Expected `str`, got `bytes`"),  # type: ignore[arg-type]
        (m.Credits(count=2**70), "cannot be sent"),
        ("hello", "str is no message"),
    ],
)
def test_encode_refuses_what_decode_would_refuse(message: Any, sentence: str) -> None:
    with pytest.raises(ProtocolError, match=sentence):
        encode(message)


@pytest.mark.parametrize(
    "message",
    [
        m.Heartbeat(progress=1),
        m.GradeTask("t", "1", ["a"], "math"),
        m.GradeTask("t", "1", ["a"], "math", question="What?"),
        m.GradeResult("t", [Grade(1.0), Grade(0.0, answer="3", parts={"length": 0.5})]),
    ],
)
def test_what_is_sent_is_what_msgspec_makes_of_the_message(message: m.AnyMessage) -> None:
    assert encode(message) == [packed(message)]


def test_what_was_checked_cannot_be_written_before_it_is_sent() -> None:
    samples = example_result().samples
    for array in (samples.prompt_ids, samples.token_ids, samples.log_probs, samples.offsets):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = -1


def test_a_field_of_a_value_inside_a_message_is_checked_when_it_is_sent() -> None:
    samples = msgspec.structs.replace(example_result().samples, texts=["four", 5])
    with pytest.raises(ProtocolError, match=r"Expected `str`, got `int` - at `\$.samples.texts"):
        encode(m.GenerateResult(task_id="t", samples=samples))


def test_a_payload_does_not_outlive_its_arrays_in_the_decoder() -> None:
    header, payload = apart(example_result())
    held = bytearray(payload)
    decode([header, held])
    held.extend(b"x")  # refused with BufferError while any view of it lives


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(2),
        np.zeros(2, np.float16),
        np.array(["a"]),
        np.array([None]),
        np.zeros((1, 1, 1), np.int32),
    ],
)
def test_arrays_off_the_allow_list_are_refused(array: np.ndarray) -> None:
    with pytest.raises(ProtocolError, match="cannot be sent"):
        dumps([array])


def test_limits_hold_for_both_frames_in_both_directions() -> None:
    message, small = example_result(), Limits(header_bytes=1000, payload_bytes=50)
    with pytest.raises(ProtocolError, match="a payload of 96 bytes is over the limit of 50"):
        encode(message, small)
    with pytest.raises(ProtocolError, match="a payload of 96 bytes is over the limit of 50"):
        decode(encode(message), small)
    with pytest.raises(ProtocolError, match=r"a header of \d+ bytes is over the limit of 100"):
        decode(encode(example_result(("x" * 200, ""))), Limits(header_bytes=100))


# ---- hostile bytes -------------------------------------------------------------------------------


def refused_or_fine(frames: list[Any]) -> None:
    """Decode; anything but a message or ProtocolError escapes and fails the test."""
    try:
        message = decode(frames)
    except ProtocolError:
        return
    assert isinstance(message, m.Message)


@pytest.mark.parametrize("count", [0, MAX_FRAMES + 1, 20_000])
def test_wrong_number_of_frames(count: int) -> None:
    with pytest.raises(ProtocolError, match=f"1 to {MAX_FRAMES} frames, got {count}"):
        decode([b"\x80"] * count)


def test_truncation_at_every_byte_is_refused() -> None:
    header, payload = apart(example_result())
    for cut in range(len(header)):
        with pytest.raises(ProtocolError):
            decode([header[:cut], payload])
    for cut in range(len(payload)):
        with pytest.raises(ProtocolError):
            decode([header, payload[:cut]])


def test_a_frame_of_header_and_payload_cut_or_extended_anywhere_is_refused() -> None:
    [frame] = map(bytes, encode(example_result()))
    for cut in range(len(frame)):
        with pytest.raises(ProtocolError):
            decode([frame[:cut]])
    for frames in ([frame + bytes(8)], [frame, bytes(8)], [frame[:-8], frame[-8:]]):
        with pytest.raises(ProtocolError):
            decode(frames)


@pytest.mark.parametrize(
    ("frame", "sentence"),
    [
        (b"", "not a message"),
        (bytes(7), "a length has 8 bytes, got 7"),
        (bytes(8), "not a message"),
        (b"\x00" * 7 + b"\x09" + bytes(8), "a header of 9 bytes does not fit into 8"),
        (b"\x00" + b"\xff" * 15, f"a header of {2**56 - 1} bytes does not fit into 8"),
    ],
)
def test_a_length_that_lies(frame: bytes, sentence: str) -> None:
    with pytest.raises(ProtocolError, match=sentence):
        decode([frame])


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(flips=st.lists(st.integers(0, 10_000), min_size=1, max_size=8))
def test_flipped_bits_in_a_frame_of_header_and_payload(flips: list[int]) -> None:
    broken = bytearray(encode(example_result())[0])
    for flip in flips:
        broken[flip // 8 % len(broken)] ^= 1 << flip % 8
    refused_or_fine([bytes(broken)])


def test_trailing_bytes_are_refused() -> None:
    header, payload = apart(example_result())
    for frames in (
        [header + b"\x00", payload],
        [header, payload + bytes(8)],
        [*encode(m.Credits(count=1)), b"\x00"],
    ):
        with pytest.raises(ProtocolError):
            decode(frames)


@pytest.mark.slow
def test_every_header_byte_replaced_by_every_other() -> None:
    header, payload = apart(example_result())
    for at in range(len(header)):
        for byte in range(0, 256, 3):
            refused_or_fine([header[:at] + bytes([byte]) + header[at + 1 :], payload])


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(flips=st.lists(st.integers(0, 10_000), min_size=1, max_size=8))
def test_flipped_bits_in_the_header(flips: list[int]) -> None:
    header, payload = apart(example_result())
    broken = bytearray(header)
    for flip in flips:
        broken[flip // 8 % len(broken)] ^= 1 << flip % 8
    refused_or_fine([bytes(broken), payload])


@settings(max_examples=300, deadline=None)
@given(header=st.binary(max_size=300), payload=st.none() | st.binary(max_size=64))
def test_random_bytes(header: bytes, payload: bytes | None) -> None:
    with pytest.raises(ProtocolError):
        decode([header] if payload is None else [header, payload])


msgpack_junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(**SHORT)
    | st.binary(**SHORT),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(**SHORT) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=8,
).map(packed) | st.sampled_from(
    [b"\x81\x80\x01", b"\x81\x91\x01\x01", b"\xc7\x0c\xff" + b"\xff" * 12, b"\xd4\x05\x00"]
)


def header_with(field: bytes, value: bytes) -> bytes:
    """The header of an empty-handed GenerateResult in which one array reference is replaced by raw
    msgpack."""
    fields = {
        b"prompt_ids": packed(4 * 1 + INT32),
        b"token_ids": packed(4 * 0 + INT32),
        b"log_probs": packed(4 * 0 + FLOAT32),
        b"offsets": packed(4 * 2 + INT32),
        b"version_spans": packed([INT32, 0, 2]),
        b"texts": packed([""]),
        b"finish_reasons": packed(["stop"]),
    }
    fields[field] = value
    body = b"".join(packed(key.decode()) + part for key, part in fields.items())
    samples = bytes([0x80 | len(fields)]) + body
    tag = packed("type") + packed("GenerateResult") + packed("task_id") + packed("t")
    return b"\x83" + tag + packed("samples") + samples


def test_the_hand_made_header_is_right_to_begin_with() -> None:
    message = decode([header_with(b"texts", packed(["x"])), bytes(16)])
    assert isinstance(message, m.GenerateResult) and message.samples.texts == ["x"]


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    field=st.sampled_from([b"prompt_ids", b"version_spans", b"texts", b"finish_reasons"]),
    value=msgpack_junk,
)
def test_junk_in_place_of_a_field(field: bytes, value: bytes) -> None:
    refused_or_fine([header_with(field, value), bytes(16)])


@pytest.mark.parametrize(
    "reference",
    [
        4 * 5 + INT32,
        4 * 1 + FLOAT32,
        2**64 - 1,
        -4 + INT32,
        -1,
        4.0,
        True,
        [],
        [INT32, True],
        [INT32, -1],
        [INT32, 2**53],
        [INT32, 2**64 - 1, 2**64 - 1],
        [INT32, 0, 2**53],
        [INT32, 0, 2**63],
        [INT32, 0, 2**64 - 1],
        [INT32, 2**52, 2**52],
        [INT32, 1, 1],
        [INT32, 1, 1, 1],
        [INT32, [1]],
        [4, 1],
        [-1, 1],
        ["i4", 1],
        [["i4"], 1],
        [True, 1],
        {"i4": 1},
        "i4",
        None,
    ],
    ids=repr,
)
def test_array_references_that_lie(reference: Any) -> None:
    with pytest.raises(ProtocolError):
        decode([header_with(b"prompt_ids", packed(reference)), bytes(16)])


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        (4 * 5 + INT32, "an array of 20 bytes does not lie in the 16 bytes that are left"),
        (-1, r"an array is 4·length \+ dtype or \[dtype, lengths…\], in whole numbers"),
        ([4, 1], "an array's dtype is a number below 4"),
        ([INT32, 1, 1, 1], "an array has at most 2 dimensions"),
        ([INT32, 0, 2**64 - 1], "an array of shape"),
    ],
)
def test_what_is_wrong_with_an_array_reference_is_said(reference: Any, sentence: str) -> None:
    with pytest.raises(ProtocolError, match=sentence):
        decode([header_with(b"prompt_ids", packed(reference)), bytes(16)])


def test_what_the_arrays_leave_of_the_payload_is_said() -> None:
    with pytest.raises(ProtocolError, match="24 bytes lie behind the arrays of the header"):
        decode([header_with(b"texts", packed([""])), bytes(16), bytes(24)])


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Of any dtype, up to two axes, any of them empty, now and then large or a stepped view."""
    dtype = draw(st.sampled_from(list(CODES)))
    shape = draw(st.lists(st.integers(0, 5) | st.just(LARGE // 8 + 1), max_size=2))
    if len(shape) == 2:
        shape[1] = min(shape[1], 5)
    step = draw(st.integers(1, 2))
    values = np.arange(step * math.prod(shape)) % 251
    return values.astype(dtype)[::step].reshape(shape)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(values=st.lists(arrays(), max_size=6))
def test_any_arrays_come_back_from_a_blob_as_they_were(values: list[np.ndarray]) -> None:
    found = loads(dumps(values), list[np.ndarray])
    assert [one.dtype for one in found] == [one.dtype for one in values]
    assert [one.shape for one in found] == [one.shape for one in values]
    assert all(map(np.array_equal, found, values))
    assert all(one.flags.aligned and not one.flags.writeable for one in found)


BOMBS = {
    "nested lists": b"\x91" * 1_000_000,
    "nested maps": b"\x81\xa1x" * 1_000_000,
    "nested in a field": header_with(b"prompt_ids", b"\x91" * 1_000_000),
    "huge array": b"\xdd\xff\xff\xff\xff",
    "huge map": b"\xdf\xff\xff\xff\xff",
    "huge text": b"\xdb\xff\xff\xff\xff",
    "huge bytes in a field": header_with(b"prompt_ids", b"\xc6\xff\xff\xff\xff"),
    "huge list in a field": header_with(b"prompt_ids", b"\xdd\xff\xff\xff\xff"),
    "huge text in a list": header_with(b"texts", b"\x91\xdb\xff\xff\xff\xff"),
    "huge extension": header_with(b"prompt_ids", b"\xc9\xff\xff\xff\xff\x05"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_fail_without_allocating(name: str) -> None:
    bomb = BOMBS[name]
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode([bomb, bytes(16)])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


def test_a_header_grows_at_most_72_fold_in_memory() -> None:
    header = header_with(b"prompt_ids", b"\xdd" + (100_000).to_bytes(4, "big") + b"\x90" * 100_000)
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode([header, bytes(16)])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 72 * len(header)


# ---- blobs ---------------------------------------------------------------------------------------


class State(msgspec.Struct):
    cursor: int
    groups: dict[str, TrainGroup]


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(
    cursor=st.integers(0, 2**40),
    groups=st.dictionaries(st.text(**SHORT), train_groups(), max_size=3),
)
def test_a_blob_holds_any_struct_with_arrays(cursor: int, groups: dict[str, TrainGroup]) -> None:
    state = State(cursor, groups)
    assert plain(loads(dumps(state), State)) == plain(state)


def test_a_blob_cut_or_extended_anywhere_is_refused() -> None:
    blob = dumps(example_result())
    for cut in range(len(blob)):
        with pytest.raises(ProtocolError):
            loads(blob[:cut], m.GenerateResult)
    with pytest.raises(ProtocolError):
        loads(blob + bytes(8), m.GenerateResult)


def test_a_blob_of_another_version_or_type_is_refused() -> None:
    blob = dumps(example_result())
    with pytest.raises(ProtocolError, match="not a blob of this version"):
        loads(b"ZPPO\x00\x00\x00\x03" + blob[8:], m.GenerateResult)
    with pytest.raises(ProtocolError, match="cut off"):
        loads(blob[:8] + b"\xff" * 8 + blob[16:], m.GenerateResult)
    with pytest.raises(ProtocolError):
        loads(blob, State)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=80), magic=st.sampled_from([BLOB_MAGIC, FIRST_MAGIC]))
def test_random_blobs(data: bytes, magic: bytes) -> None:
    with pytest.raises(ProtocolError):
        loads(magic + data, State)


def first_blob(references: list[Any], payload: bytes) -> bytes:
    """As the first version wrote a list of arrays."""
    header = packed(references)
    return (
        FIRST_MAGIC + len(header).to_bytes(8, "little") + header + bytes(-len(header) % 8) + payload
    )


def test_a_blob_of_the_first_version_is_read() -> None:
    flat, square = np.arange(3, dtype=np.int32), np.array([[1.5, -2.0]], np.float32)
    payload = flat.tobytes() + bytes(4) + square.tobytes()
    blob = first_blob([["i4", [3], 0], ["f4", [1, 2], 16]], payload)
    found = loads(blob, list[np.ndarray])
    assert np.array_equal(found[0], flat) and np.array_equal(found[1], square)
    for reference in (["f8", [1], 0], ["i4", [-1], 0], ["i4", 1, 0], ["i4", [1]], 4, [0, 3]):
        with pytest.raises(ProtocolError):
            loads(first_blob([reference], bytes(16)), list[np.ndarray])


def test_memory_of_a_frame_is_used_again_only_when_nobody_has_it() -> None:
    """A frame may wait in a queue, and arrays that were read from it may be kept."""
    messages = [many([LARGE // 4 - number] * 9) for number in (1, 2, 3)]
    read = decode(encode(messages[0]))
    frames, kept = encode(messages[1]), encode(messages[2])
    assert len(kept[0]) > REUSED
    for message, found in zip(messages, (read, decode(frames), decode(kept)), strict=True):
        assert plain(found) == plain(message)
    places = {np.frombuffer(encode(messages[0])[0], np.uint8).ctypes.data for _ in range(9)}
    assert len(places) <= 2, "the second time it may have to grow"


def test_memory_of_frames_is_not_shared_by_threads() -> None:
    message = many([LARGE // 4 - 1] * 9)
    with ThreadPoolExecutor(2) as pool:
        met = Barrier(2)

        def place(_: int) -> int:
            met.wait(60)
            frame = np.frombuffer(encode(message)[0], np.uint8)
            met.wait(60)
            return frame.ctypes.data

        assert len(set(pool.map(place, range(2)))) == 2
