"""Arrays that contradict each other: refused when built and when decoded, in one sentence that
names the field."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo_protocol import messages as m
from zppo_protocol.arrays import SHORT
from zppo_protocol.codec import decode, dumps, encode, loads
from zppo_protocol.errors import ProtocolError
from zppo_protocol.samples import MAX_LOG_PROB, GroupSamples, TokenScores, TrainGroup
from zppo_protocol.values import (
    FROZEN,
    PictureReference,
    Prompt,
    Usage,
    VideoReference,
    pictures_of,
    seed_of,
)

GOOD: dict[str, Any] = {
    "prompt_ids": np.array([1, 2, 3], np.int32),
    "token_ids": np.array([4, 5, 6, 7, 8], np.int32),
    "log_probs": np.array([-0.5, -1.0, 0.0, -2.0, 0.0009], np.float32),
    "offsets": np.array([0, 2, 5], np.int32),
    "version_spans": np.array([[4, 7], [1, 8]], np.int32),
    "texts": ["four", "5"],
    "finish_reasons": ["stop", "length"],
}


def int32(*values: Any) -> np.ndarray:
    return np.array(values, np.int32)


def float32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


BAD_SAMPLES = [
    ({"prompt_ids": [1, 2]}, "prompt_ids must be a numpy array, got list"),
    ({"prompt_ids": int32()}, "prompt_ids must hold at least one token"),
    ({"prompt_ids": int32(1, -2)}, "prompt_ids must not be negative, got -2"),
    ({"token_ids": np.arange(5)}, "token_ids must be int32, got int64"),
    ({"token_ids": int32(4, 5, -1, 7, 8)}, "token_ids must not be negative, got -1"),
    ({"token_ids": int32([4, 5, 6, 7, 8])}, "token_ids must have 1 dimension(s), got shape (1, 5)"),
    ({"token_ids": int32(4)}, "log_probs must have one entry per token (1), got 5"),
    ({"log_probs": np.zeros(5)}, "log_probs must be float32, got float64"),
    ({"log_probs": float32(-1, -1)}, "log_probs must have one entry per token (5), got 2"),
    ({"log_probs": float32(0, 0, np.nan, 0, 0)}, "log_probs must be finite and at most 0.001"),
    ({"log_probs": float32(0, 0, -np.inf, 0, 0)}, "log_probs must be finite and at most 0.001"),
    ({"log_probs": float32(0, 0, np.inf, 0, 0)}, "log_probs must be finite and at most 0.001"),
    ({"log_probs": float32(0, 0, 0.002, 0, 0)}, "log_probs must be finite and at most 0.001"),
    ({"offsets": int32(0)}, "offsets must bound at least one completion, got 1 entries"),
    ({"offsets": int32(0, 2, 4)}, "offsets must run from 0 to 5, got 0 to 4"),
    ({"offsets": int32(1, 2, 5)}, "offsets must run from 0 to 5, got 1 to 5"),
    ({"offsets": int32(0, 6, 5)}, "offsets must not fall"),
    ({"offsets": int32(0, -1, 5)}, "offsets must not fall"),
    ({"offsets": int32(0, 2**31 - 1, -(2**31), -1, 5)}, "offsets must not fall"),
    ({"version_spans": int32([5, 7, 1])}, "version_spans must have shape [S, 2], got (1, 3)"),
    ({"version_spans": int32(5, 7)}, "version_spans must have 2 dimension(s), got shape (2,)"),
    ({"version_spans": int32([4, 7])}, "version_spans must cover 5 tokens, got 4"),
    (
        {"version_spans": int32([2**31 - 1, 7], [2**31 - 1, 7], [7, 7])},
        "must cover 5 tokens, got 4294967301",
    ),
    (
        {"version_spans": int32([5, 7], [0, 8])},
        "version_spans must hold counts >= 1 and versions >= -1",
    ),
    ({"version_spans": int32([5, -2])}, "version_spans must hold counts >= 1 and versions >= -1"),
    ({"texts": ["one"]}, "texts must have 2 entries (or none at all), got 1"),
    ({"finish_reasons": ["stop"]}, "finish_reasons must have 2 entries, got 1"),
    ({"media_tokens": [2, 2]}, "media_tokens must fit into the prompt (3 tokens), got 4"),
]


@pytest.mark.parametrize(
    ("change", "sentence"), BAD_SAMPLES, ids=[sentence for _, sentence in BAD_SAMPLES]
)
def test_samples_that_contradict_themselves_cannot_be_built(
    change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ProtocolError) as caught:
        GroupSamples(**{**GOOD, **change})
    assert sentence in str(caught.value)


class Loose(msgspec.Struct):
    """GroupSamples without its checks: what a broken or hostile peer can write."""

    prompt_ids: np.ndarray
    token_ids: np.ndarray
    log_probs: np.ndarray
    offsets: np.ndarray
    version_spans: np.ndarray
    texts: list[str]
    finish_reasons: list[str]
    media_tokens: list[int] = []


@pytest.mark.parametrize(
    ("change", "sentence"), BAD_SAMPLES[1:], ids=[sentence for _, sentence in BAD_SAMPLES[1:]]
)
def test_and_cannot_be_read_either(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ProtocolError):
        loads(dumps(Loose(**{**GOOD, **change})), GroupSamples)


def test_the_loose_twin_is_read_when_it_is_good() -> None:
    assert loads(dumps(Loose(**GOOD)), GroupSamples).texts == ["four", "5"]


TEXTS = {
    **GOOD,
    "prompt_ids": int32(),
    "token_ids": int32(),
    "log_probs": float32(),
    "offsets": int32(0, 0, 0),
    "version_spans": np.zeros((0, 2), np.int32),
}
"""The samples of an engine that sees only text."""


def test_texts_alone_are_samples_but_cannot_be_trained_on() -> None:
    usage = [Usage(completions=1, completion_tokens=7, prompt_tokens=3), Usage(completions=1)]
    samples = GroupSamples(**TEXTS, usage=usage)
    result = m.GenerateResult(task_id="t", samples=samples)
    decoded = decode(encode(result))
    assert isinstance(decoded, m.GenerateResult) and decoded.samples.text_only
    assert (decoded.samples.texts, decoded.samples.usage) == (["four", "5"], usage)
    with pytest.raises(
        ProtocolError, match="samples must have token ids to be trained on, got texts only"
    ):
        TrainGroup(
            group_id="g", question_id="q", kind="plain", samples=samples, rewards=float32(0, 1)
        )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"texts": []}, "texts must have 2 entries where there are no token ids, got 0"),
        ({"usage": [Usage(completions=3)]}, "usage must cover 2 completions, got 3"),
        (
            {**GOOD, "usage": [Usage(completions=2)]},
            "usage must be empty where the token ids are known",
        ),
    ],
)
def test_texts_alone_must_be_whole(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ProtocolError, match=sentence):
        GroupSamples(**{**TEXTS, **change})


def test_empty_completions_and_an_empty_group_axis_are_fine() -> None:
    nothing = {"token_ids": int32(), "log_probs": float32(), "offsets": int32(0, 0, 0)}
    samples = GroupSamples(**{**GOOD, **nothing, "version_spans": np.zeros((0, 2), np.int32)})
    assert len(samples.token_ids) == 0


def test_samples_without_texts_share_their_arrays_and_leave_the_texts_where_they_were() -> None:
    whole = GroupSamples(**GOOD)
    bare = whole.without_texts()
    assert bare.texts == [] and whole.texts == GOOD["texts"]
    fields = [name for name in GroupSamples.__struct_fields__ if name != "texts"]
    assert all(getattr(bare, name) is getattr(whole, name) for name in fields)
    text_only = GroupSamples(**TEXTS)
    with pytest.raises(ProtocolError, match="texts must have"):
        text_only.without_texts()


@pytest.mark.parametrize("place", [0, SHORT, SHORT + 6])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf, 0.002])
def test_a_wrong_log_prob_of_many_is_found_wherever_it_is(place: int, value: float) -> None:
    tokens = SHORT + 7
    many = {
        "token_ids": np.zeros(tokens, np.int32),
        "log_probs": np.full(tokens, -1.0, np.float32),
        "offsets": int32(0, 2, tokens),
        "version_spans": int32([tokens, 7]),
    }
    GroupSamples(**{**GOOD, **many})
    many["log_probs"] = np.full(tokens, -1.0, np.float32)
    many["log_probs"][place] = value
    with pytest.raises(ProtocolError, match="log_probs must be finite"):
        GroupSamples(**{**GOOD, **many})


MINUS_INF = 0xFF800000
ANY_BITS = st.one_of(
    st.floats(width=32, max_value=0.0).map(lambda value: int(np.float32(value).view(np.uint32))),
    st.integers(0, 2**32 - 1),
    *(
        st.integers(edge - 2, edge + 2)
        for edge in (2, 2**31, MINUS_INF, int(np.float32(MAX_LOG_PROB).view(np.uint32)))
    ),
)


@settings(deadline=None)
@given(st.lists(ANY_BITS, min_size=1, max_size=5), st.booleans())
def test_log_probs_are_taken_as_one_by_one(bits: list[int], many: bool) -> None:
    """The look at bits against the definition, for any float32 there is."""
    found = np.array(bits, np.uint32).view(np.float32)
    log_probs = np.concatenate([found, np.full(SHORT if many else 0, -1.0, np.float32)])
    changed = {
        "token_ids": np.zeros(len(log_probs), np.int32),
        "log_probs": log_probs,
        "offsets": int32(0, 1, len(log_probs)),
        "version_spans": int32([len(log_probs), 7]),
    }
    if all(math.isfinite(one) and one <= MAX_LOG_PROB for one in found.tolist()):
        assert GroupSamples(**{**GOOD, **changed}).log_probs is log_probs
    else:
        with pytest.raises(ProtocolError, match=r"log_probs must be finite and at most 0\.001"):
            GroupSamples(**{**GOOD, **changed})


def test_texts_may_be_left_out_for_the_trainer_but_not_in_an_answer() -> None:
    samples = GroupSamples(**{**GOOD, "texts": []})
    TrainGroup(group_id="g", question_id="q", kind="plain", samples=samples, rewards=float32(0, 1))
    with pytest.raises(ProtocolError, match="texts must have 2 entries, got 0"):
        m.GenerateResult(task_id="t", samples=samples)


@pytest.mark.parametrize(
    ("rewards", "sentence"),
    [
        (float32(1), r"one entry per completion \(2\), got 1"),
        (float32(0, np.nan), "rewards must be finite numbers"),
        (float32(-np.inf, 1), "rewards must be finite numbers"),
        (np.array([0, 1]), "rewards must be float32, got int64"),
        ([0.0, 1.0], "rewards must be a numpy array, got list"),
    ],
)
def test_rewards_of_a_group(rewards: Any, sentence: str) -> None:
    samples = GroupSamples(**GOOD)
    with pytest.raises(ProtocolError, match=sentence):
        TrainGroup(group_id="g", question_id="q", kind="plain", samples=samples, rewards=rewards)


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (np.zeros((1, 2), np.float32), r"one row per completion \(2\), got 1"),
        (np.full((2, 1), np.nan, np.float32), "reward_parts must be finite numbers"),
        (np.zeros((2, 1)), "reward_parts must be float32, got float64"),
        (float32(0, 1), r"reward_parts must have 2 dimension\(s\)"),
    ],
)
def test_parts_of_the_rewards_of_a_group(parts: Any, sentence: str) -> None:
    fitting = {"group_id": "g", "question_id": "q", "kind": "plain"}
    group = {**fitting, "samples": GroupSamples(**GOOD), "rewards": float32(-3, 1.5)}
    TrainGroup(**group, reward_parts=np.zeros((2, 3), np.float32))
    with pytest.raises(ProtocolError, match=sentence):
        TrainGroup(**group, reward_parts=parts)


# ---- scores --------------------------------------------------------------------------------------


def scores(ids: Any, log_probs: Any) -> TokenScores:
    return TokenScores(token_ids=np.array(ids, np.int32), log_probs=np.array(log_probs, np.float32))


@pytest.mark.parametrize(
    ("ids", "log_probs", "sentence"),
    [
        (int32(1, 2), float32(-1, -2), "token_ids must have 2 dimension(s), got shape (2,)"),
        (np.array([[1, 2]]), float32([-1, -2]), "token_ids must be int32, got int64"),
        (int32([1, 2]), np.array([[-1.0, -2.0]]), "log_probs must be float32, got float64"),
        (int32([1, 2]), float32([-1]), "log_probs must have the shape (1, 2), got (1, 1)"),
        (int32([1, -2]), float32([-1, -2]), "token_ids must be at least -1, got -2"),
        (int32([1, 2]), float32([-1, np.nan]), "log_probs must be finite and at most 0.001"),
        (int32([1, 2]), float32([-1, -np.inf]), "log_probs must be finite and at most 0.001"),
        (int32([1, -1]), float32([-1, 0.5]), "log_probs must be finite and at most 0.001"),
        (
            int32([1, 2], [3, 4]),
            float32([-1, -2], [-0.1, -0.5]),
            "a row must not sum to more than 1, got 1.51137",
        ),
    ],
)
def test_scores_that_contradict_themselves_cannot_be_built(
    ids: Any, log_probs: Any, sentence: str
) -> None:
    with pytest.raises(ProtocolError) as caught:
        TokenScores(token_ids=ids, log_probs=log_probs)
    assert sentence in str(caught.value)


def test_padding_has_no_mass_and_a_whole_vocabulary_sums_to_one() -> None:
    scores([[7, 3, -1]], [[np.log(0.75), np.log(0.25), 0.0]])
    scores(np.zeros((0, 5)), np.zeros((0, 5)))
    scores(np.zeros((3, 0)), np.zeros((3, 0)))


def test_a_group_has_one_row_of_scores_per_token() -> None:
    group: dict[str, Any] = {
        "group_id": "g",
        "question_id": "q",
        "kind": "plain",
        "rewards": float32(0, 1),
    }
    samples = GroupSamples(**GOOD)
    TrainGroup(**group, samples=samples, scores=scores([[1]] * 5, [[-1.0]] * 5))
    with pytest.raises(ProtocolError, match=r"scores must have one row per token \(5\), got 4"):
        TrainGroup(**group, samples=samples, scores=scores([[1]] * 4, [[-1.0]] * 4))


SCORE_TASK: dict[str, Any] = {
    "task_id": "t",
    "prompt_ids": int32(1, 2),
    "token_ids": int32(3, 4, 5),
    "offsets": int32(0, 1, 1, 3),
    "top_k": 8,
}


def test_a_score_task_counts_its_responses_empty_ones_too() -> None:
    assert m.ScoreTask(**SCORE_TASK).n == 3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompt_ids": int32()}, "prompt_ids must hold at least one token"),
        ({"prompt_ids": int32(-1)}, "prompt_ids must not be negative, got -1"),
        ({"token_ids": int32(3, -4, 5)}, "token_ids must not be negative, got -4"),
        ({"token_ids": float32(3, 4, 5)}, "token_ids must be int32, got float32"),
        ({"offsets": int32(0, 2)}, "offsets must run from 0 to 3, got 0 to 2"),
        ({"offsets": int32(0)}, "offsets must bound at least one completion, got 1 entries"),
    ],
)
def test_a_score_task_that_contradicts_itself(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        m.ScoreTask(**{**SCORE_TASK, **change})
    assert sentence in str(caught.value)


def test_bounds_of_a_score_task_are_held_where_it_is_read() -> None:
    for change in ({"top_k": 0}, {"top_k": 4097}, {"temperature": 0.0}):
        with pytest.raises(ProtocolError):
            encode(m.ScoreTask(**{**SCORE_TASK, **change}))


def test_the_sentence_of_a_decoded_message_says_where() -> None:
    broken = Loose(**{**GOOD, "offsets": int32(0, 6, 5)})
    blob = dumps({"type": "GenerateResult", "task_id": "t", "samples": broken})
    header_bytes = int.from_bytes(blob[8:16], "little")
    payload = blob[16 + -(-header_bytes // 8) * 8 :]
    with pytest.raises(
        ProtocolError, match=r"not a message: offsets must not fall - at `\$\.samples`"
    ):
        decode([blob[16 : 16 + header_bytes], payload])


def test_every_token_has_the_version_of_its_span() -> None:
    spans = int32([2, 7], [1, FROZEN], [2, 8])
    samples = GroupSamples(**{**GOOD, "version_spans": spans})
    assert samples.versions_T.tolist() == [7, 7, -1, 8, 8] and samples.versions_T.dtype == np.int32
    nothing = {"prompt_ids": int32(), "token_ids": int32(), "log_probs": float32()}
    nothing |= {"offsets": int32(0, 0, 0), "version_spans": np.zeros((0, 2), np.int32)}
    assert GroupSamples(**{**GOOD, **nothing}).versions_T.shape == (0,)


def test_a_seed_is_the_same_in_every_version_of_this_code() -> None:
    """A run that goes on after an update samples what it would have sampled."""
    assert seed_of(7, "12/q-3/plain") == 11136197226627578 < 2**56
    assert seed_of(7, "12/q-3/plain", size=4) == 4158808119 < 2**32
    assert seed_of(7, "12/q-3/plain") != seed_of(8, "12/q-3/plain") != seed_of(8, "12/q-4/plain")


# ---- pictures and videos -------------------------------------------------------------------------


def picture(width: int = 8) -> PictureReference:
    return PictureReference(path="/data/a.png", sha256="0" * 64, width=width, height=8)


def test_every_picture_of_a_group_has_its_count_of_tokens() -> None:
    fitting = {"group_id": "g", "question_id": "q", "kind": "plain", "rewards": float32(0, 1)}
    samples = GroupSamples(**GOOD, media_tokens=[2])
    TrainGroup(**fitting, samples=samples, media=[picture()])
    for media in ([], [picture(), picture()]):
        sentence = rf"media_tokens must have one entry per picture or video \({len(media)}\), got 1"
        with pytest.raises(ProtocolError, match=sentence):
            TrainGroup(**fitting, samples=samples, media=media)
        with pytest.raises(ProtocolError, match=sentence):
            m.ScoreTask("t", int32(1, 2), int32(3), int32(0, 1), 4, media=media, media_tokens=[1])


@pytest.mark.parametrize(
    ("frames", "seconds", "sentence"),
    [
        ((picture(),), (0.0, 1.0), r"seconds must have one entry per frame \(1\), got 2"),
        ((picture(), picture()), (1.0, 1.0), "seconds must rise from frame to frame"),
        ((picture(), picture(9)), (0.0, 1.0), "frames of a video must have one size"),
    ],
)
def test_videos_that_contradict_themselves(frames: Any, seconds: Any, sentence: str) -> None:
    with pytest.raises(ProtocolError, match=sentence):
        VideoReference(frames=frames, seconds=seconds)


@pytest.mark.parametrize(
    "change", [{"sha256": "A" * 64}, {"sha256": "0" * 63}, {"width": 0}, {"kind": "film"}]
)
def test_references_are_checked_where_they_are_decoded(change: dict[str, Any]) -> None:
    told = msgspec.to_builtins(picture()) | change
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"messages": [], "media": [told]}, Prompt)


def test_pictures_of_a_prompt_are_told_from_its_videos() -> None:
    film = VideoReference(frames=(picture(), picture()), seconds=(0.0, 0.5))
    prompt = Prompt(messages=[], media=[picture(), film])
    assert loads(dumps(prompt), Prompt) == prompt
    assert len(list(pictures_of(prompt.media))) == 3
