"""Arrays inside messages, and what makes them consistent with each other.

Token streams are numpy arrays and travel as raw little-endian bytes behind the header, never as
lists of numbers. The checks run from `__post_init__`, so the invariant holds for every value that
exists, whether it was built here, decoded from a peer or read from a checkpoint: a `GroupSamples`
always has one axis T, cut by `offsets` into N completions and by `version_spans` into policy
versions, with finite log-probabilities.

Shape legend: P prompt tokens, N completions of the group, T response tokens of all completions laid
end to end, S version spans, K most probable tokens of a teacher.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import numpy as np
from msgspec import structs

from zppo_protocol.arrays import (
    FLOAT32,
    INT32,
    are_finite,
    check_array,
    check_ids,
    check_offsets,
    highest,
)
from zppo_protocol.errors import ProtocolError
from zppo_protocol.support import Support, check_holds
from zppo_protocol.values import FROZEN, GroupKind, Media, Name, Positive, Text, Usage, Value

MAX_LOG_PROB = 1e-3
"""A log-probability is at most 0; a float32 log-softmax may end up a rounding error above it."""
_MINUS_INF, _MOST = (
    int(np.float32(value).view(np.int32))
    for value in (-np.inf, np.nextafter(np.float32(MAX_LOG_PROB), np.float32(0)))
)
"""The bits of -inf and of the largest log-prob, as whole numbers."""


class GroupSamples(Value, frozen=True):
    """The completions of one prompt.

    `token_ids` [T] int32 and `log_probs` [T] float32 hold the N completions end to end, `offsets`
    [N+1] int32 bounds them. `log_probs` are *behaviour* log-probs: natural logarithms under the
    distribution that was sampled. `version_spans` [S, 2] int32 run-length encodes, along the same
    axis T, (token count, policy version); FROZEN (-1) is a frozen model, whose log-probs say
    nothing of the policy. `texts` has N entries, or none where nobody reads them (a trainer's
    window). `support` has one row per token where sampling was truncated: the tokens that could
    have been sampled, over which `log_probs` are normalised; None is the whole vocabulary for all.
    `media_tokens` has, for each picture and video of the prompt in its order, the number of tokens
    in `prompt_ids` that stand for its features, as the engine expanded it.
    Raises ProtocolError if they do not fit together.

    An engine that sees only text leaves out what it cannot know: `prompt_ids` and the axis T are
    empty, `texts` has all N entries, and `usage` may tell the lengths. Such samples are graded and
    shown like others, but never trained on.
    """

    prompt_ids: np.ndarray
    token_ids: np.ndarray
    log_probs: np.ndarray
    offsets: np.ndarray
    version_spans: np.ndarray
    texts: list[Text]
    finish_reasons: list[Literal["stop", "length"]]
    usage: list[Usage] = []  # noqa: RUF012  (msgspec copies it)
    support: Support | None = None
    media_tokens: list[Positive] = []  # noqa: RUF012

    @property
    def text_only(self) -> bool:
        """Whether token ids and log-probs are unknown."""
        return len(self.prompt_ids) == 0

    @property
    def versions_T(self) -> np.ndarray:
        """The policy version that sampled each token, [T] int32; FROZEN where none did."""
        return np.repeat(self.version_spans[:, 1], self.version_spans[:, 0])

    @property
    def written_tokens(self) -> int:
        """Response tokens of the whole group; what a server did not count is left out."""
        return int(self.token_ids.size) + sum(use.completion_tokens or 0 for use in self.usage)

    @property
    def read_tokens(self) -> int:
        """Prompt tokens, once for the group; 0 where nobody counted them."""
        if not self.text_only:
            return int(self.prompt_ids.size)
        return next((use.prompt_tokens for use in self.usage if use.prompt_tokens is not None), 0)

    def without_texts(self) -> GroupSamples:
        """The same for a reader of tokens alone; what has been checked is not checked again."""
        if self.text_only:
            return structs.replace(self, texts=[])  # refused, since nothing would be left
        copied = copy.copy(self)
        structs.force_setattr(copied, "texts", [])
        return copied

    def __post_init__(self) -> None:
        check_samples(self)


class TokenScores(Value, frozen=True):
    """A teacher's K most probable tokens at each of T response tokens, best first.

    `token_ids` [T, K] int32, -1 where a row has fewer; `log_probs` [T, K] float32, natural
    logarithms over the whole vocabulary, so what they leave of 1 is the tail.
    """

    token_ids: np.ndarray
    log_probs: np.ndarray

    def __post_init__(self) -> None:
        check_scores(self)


class TrainGroup(Value, frozen=True):
    """One group as the trainer needs it; `rewards` is [N] float32. `scores` [T, K] are those of a
    remote teacher. `reward_parts` [N, K] float32 are the K parts of each reward in the order of
    `data.reward`, before their weights. `media` are the pictures and videos of the prompt, one for
    each of `samples.media_tokens`."""

    group_id: Name
    question_id: Name
    kind: GroupKind
    samples: GroupSamples
    rewards: np.ndarray
    scores: TokenScores | None = None
    reward_parts: np.ndarray | None = None
    media: list[Media] = []  # noqa: RUF012

    def __post_init__(self) -> None:
        check_train_group(self)


def check_samples(samples: GroupSamples) -> None:
    """Check one group of completions; cost O(T) without copies. Raises ProtocolError naming the
    field."""
    check_array("prompt_ids", samples.prompt_ids, INT32, 1, check_ids)
    check_array("token_ids", samples.token_ids, INT32, 1, check_ids)
    check_array("log_probs", samples.log_probs, FLOAT32, 1, _check_log_probs)
    check_array("offsets", samples.offsets, INT32)
    check_array("version_spans", samples.version_spans, INT32, 2)
    tokens, completions = len(samples.token_ids), len(samples.offsets) - 1
    if len(samples.log_probs) != tokens:
        raise ProtocolError(
            f"log_probs must have one entry per token ({tokens}), got {len(samples.log_probs)}"
        )
    _check_offsets(samples.offsets, tokens)
    _check_spans(samples.version_spans, tokens)
    if samples.support is not None:
        check_holds(samples.support, samples.token_ids, samples.versions_T == FROZEN)
    _check_completions(samples, completions)
    check_media_tokens(samples.media_tokens, samples.prompt_ids)
    _check_text_only(samples, completions)


def check_train_group(group: TrainGroup) -> None:
    """Check that there is one finite reward per completion. Raises ProtocolError."""
    check_array("rewards", group.rewards, FLOAT32)
    if group.samples.text_only:
        raise ProtocolError("samples must have token ids to be trained on, got texts only")
    check_media(group.media, group.samples.media_tokens)
    completions = len(group.samples.offsets) - 1
    if len(group.rewards) != completions:
        raise ProtocolError(
            f"rewards must have one entry per completion ({completions}), got {len(group.rewards)}"
        )
    if not are_finite(group.rewards):
        raise ProtocolError("rewards must be finite numbers")
    if group.reward_parts is not None:
        check_reward_parts(group.reward_parts, completions)
    tokens = len(group.samples.token_ids)
    if group.scores is not None and len(group.scores.token_ids) != tokens:
        raise ProtocolError(
            f"scores must have one row per token ({tokens}), got {len(group.scores.token_ids)}"
        )


def check_media(media: Sequence[Media], media_tokens: Sequence[int]) -> None:
    """Check that the tokens of every picture and video are known. Raises ProtocolError."""
    if len(media_tokens) != len(media):
        raise ProtocolError(
            f"media_tokens must have one entry per picture or video ({len(media)}), got "
            f"{len(media_tokens)}"
        )


def check_media_tokens(media_tokens: Sequence[int], prompt_ids: np.ndarray) -> None:
    """Check that the prompt has room for the tokens of its pictures. Raises ProtocolError."""
    if media_tokens and sum(media_tokens) > len(prompt_ids):
        raise ProtocolError(
            f"media_tokens must fit into the prompt ({len(prompt_ids)} tokens), got "
            f"{sum(media_tokens)}"
        )


def check_reward_parts(parts_NK: np.ndarray, completions: int) -> None:
    """Check that every completion has a finite value of every part. Raises ProtocolError."""
    check_array("reward_parts", parts_NK, FLOAT32, 2)
    if len(parts_NK) != completions:
        raise ProtocolError(
            f"reward_parts must have one row per completion ({completions}), got {len(parts_NK)}"
        )
    if not are_finite(parts_NK):
        raise ProtocolError("reward_parts must be finite numbers")


def check_responses(prompt_ids: np.ndarray, token_ids: np.ndarray, offsets: np.ndarray) -> None:
    """Check that there is a prompt and that `offsets` cut the tokens into responses. Raises
    ProtocolError."""
    check_array("prompt_ids", prompt_ids, INT32, 1, check_ids)
    check_array("token_ids", token_ids, INT32, 1, check_ids)
    check_array("offsets", offsets, INT32)
    if not len(prompt_ids):
        raise ProtocolError("prompt_ids must hold at least one token")
    _check_offsets(offsets, len(token_ids))


def check_scores(scores: TokenScores) -> None:
    """Check that ids and log-probs belong together and no row sums to more than 1. Raises
    ProtocolError."""
    check_array("token_ids", scores.token_ids, INT32, 2)
    check_array("log_probs", scores.log_probs, FLOAT32, 2, _check_log_probs)
    if scores.token_ids.shape != scores.log_probs.shape:
        raise ProtocolError(
            f"log_probs must have the shape {scores.token_ids.shape}, got {scores.log_probs.shape}"
        )
    if scores.token_ids.size and scores.token_ids.min() < -1:
        raise ProtocolError(f"token_ids must be at least -1, got {scores.token_ids.min()}")
    mass_T = np.where(scores.token_ids >= 0, np.exp(scores.log_probs, dtype=np.float64), 0.0).sum(
        axis=1
    )
    if len(mass_T) and mass_T.max() > 1.0 + MAX_LOG_PROB * 10:
        raise ProtocolError(f"log_probs of a row must not sum to more than 1, got {mass_T.max():g}")


def check_result(samples: GroupSamples) -> None:
    """Check that an engine's answer carries the text of every completion, which is what gets
    graded."""
    completions = len(samples.offsets) - 1
    if len(samples.texts) != completions:
        raise ProtocolError(f"texts must have {completions} entries, got {len(samples.texts)}")


def _check_log_probs(name: str, log_probs: np.ndarray) -> None:
    if log_probs.size and not _are_log_probs(log_probs):
        raise ProtocolError(f"{name} must be finite and at most {MAX_LOG_PROB}")


def _are_log_probs(log_probs: np.ndarray) -> bool:
    """Whether all are finite and at most `MAX_LOG_PROB`.

    Read as whole numbers with a sign, floats are in order from 0 on; below 0 lie the negative ones,
    the smallest first and -inf and NaN last, nearest to 0. So one look is enough where there is no
    0 and no positive one, and a second, without the sign, finds what may hide below them.
    """
    most = highest(log_probs.view(np.int32))
    if most < 0:
        return bool(most < _MINUS_INF)
    return bool(most <= _MOST and highest(log_probs.view(np.uint32)) < _MINUS_INF + 2**32)


def _check_offsets(offsets: np.ndarray, tokens: int) -> None:
    if len(offsets) < 2:
        raise ProtocolError(
            f"offsets must bound at least one completion, got {len(offsets)} entries"
        )
    check_offsets("offsets", offsets, tokens)


def _check_spans(spans_S2: np.ndarray, tokens: int) -> None:
    if spans_S2.shape[1] != 2:
        raise ProtocolError(f"version_spans must have shape [S, 2], got {spans_S2.shape}")
    # There are few spans: lists of numbers are faster than reductions.
    counts, versions = spans_S2.T.tolist()
    if counts and (min(counts) < 1 or min(versions) < FROZEN):
        raise ProtocolError("version_spans must hold counts >= 1 and versions >= -1")
    if sum(counts) != tokens:
        raise ProtocolError(f"version_spans must cover {tokens} tokens, got {sum(counts)}")


def _check_completions(samples: GroupSamples, completions: int) -> None:
    if len(samples.finish_reasons) != completions:
        raise ProtocolError(
            f"finish_reasons must have {completions} entries, got {len(samples.finish_reasons)}"
        )
    if samples.texts and len(samples.texts) != completions:
        raise ProtocolError(
            f"texts must have {completions} entries (or none at all), got {len(samples.texts)}"
        )


def _check_text_only(samples: GroupSamples, completions: int) -> None:
    if not samples.text_only:
        if samples.usage:
            raise ProtocolError("usage must be empty where the token ids are known")
        return
    if len(samples.token_ids):
        raise ProtocolError(
            "prompt_ids must hold at least one token, unless there are texts and no token ids at "
            "all"
        )
    if len(samples.texts) != completions:
        raise ProtocolError(
            f"texts must have {completions} entries where there are no token ids, got "
            f"{len(samples.texts)}"
        )
    counted = sum(usage.completions for usage in samples.usage)
    if samples.usage and counted != completions:
        raise ProtocolError(f"usage must cover {completions} completions, got {counted}")
