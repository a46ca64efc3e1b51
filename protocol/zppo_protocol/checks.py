"""What makes the arrays of a message consistent with each other.

The structs of `messages` call these from `__post_init__`, so the invariant holds for every value that exists, whether
it was built here, decoded from a peer or read from a checkpoint: a `GroupSamples` always has one axis T, cut by
`offsets` into N completions and by `version_spans` into policy versions, with finite log-probabilities.

Shape legend: P prompt tokens, N completions, T response tokens of all completions end to end, S version spans, K most
probable tokens of a teacher.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from zppo_protocol.messages import GroupSamples, ScoreTask, TokenScores, TrainGroup

MAX_LOG_PROB = 1e-3
"""A log-probability is at most 0; a float32 log-softmax may end up a rounding error above it."""


class ProtocolError(ValueError):
    """These bytes, or this value, are not a message of the protocol; the sentence says what was wrong with it."""


def check_array(name: str, value: Any, dtype: type[np.generic], dimensions: int = 1) -> None:
    """Raise ProtocolError unless `value` is a numpy array of exactly this dtype and number of dimensions."""
    if not isinstance(value, np.ndarray):
        raise ProtocolError(f"{name} must be a numpy array, got {type(value).__name__}")
    if value.dtype != dtype:
        raise ProtocolError(f"{name} must be {np.dtype(dtype).name}, got {value.dtype.name}")
    if value.ndim != dimensions:
        raise ProtocolError(f"{name} must have {dimensions} dimension(s), got shape {value.shape}")


def check_samples(samples: GroupSamples) -> None:
    """Check one group of completions; cost O(T) without copies. Raises ProtocolError naming the field."""
    check_array("prompt_ids", samples.prompt_ids, np.int32)
    check_array("token_ids", samples.token_ids, np.int32)
    check_array("log_probs", samples.log_probs, np.float32)
    check_array("offsets", samples.offsets, np.int32)
    check_array("version_spans", samples.version_spans, np.int32, dimensions=2)
    _check_ids("prompt_ids", samples.prompt_ids)
    _check_ids("token_ids", samples.token_ids)
    _check_log_probs(samples.log_probs, len(samples.token_ids))
    _check_offsets(samples.offsets, len(samples.token_ids))
    _check_spans(samples.version_spans, len(samples.token_ids))
    _check_completions(samples, len(samples.offsets) - 1)
    _check_text_only(samples, len(samples.offsets) - 1)


def check_train_group(group: TrainGroup) -> None:
    """Check that there is one reward in [0, 1] per completion. Raises ProtocolError."""
    check_array("rewards", group.rewards, np.float32)
    if group.samples.text_only:
        raise ProtocolError("samples must have token ids to be trained on, got texts only")
    completions = len(group.samples.offsets) - 1
    if len(group.rewards) != completions:
        raise ProtocolError(f"rewards must have one entry per completion ({completions}), got {len(group.rewards)}")
    if not (group.rewards.min() >= 0.0 and group.rewards.max() <= 1.0):
        raise ProtocolError("rewards must be finite numbers from 0 to 1")
    tokens = len(group.samples.token_ids)
    if group.scores is not None and len(group.scores.token_ids) != tokens:
        raise ProtocolError(f"scores must have one row per token ({tokens}), got {len(group.scores.token_ids)}")


def check_score_task(task: ScoreTask) -> None:
    """Check that there is a prompt and that `offsets` cut the tokens into responses. Raises ProtocolError."""
    for name in ("prompt_ids", "token_ids", "offsets"):
        check_array(name, getattr(task, name), np.int32)
    if not len(task.prompt_ids):
        raise ProtocolError("prompt_ids must hold at least one token")
    _check_ids("prompt_ids", task.prompt_ids)
    _check_ids("token_ids", task.token_ids)
    _check_offsets(task.offsets, len(task.token_ids))


def check_scores(scores: TokenScores) -> None:
    """Check that ids and log-probs belong together and no row sums to more than 1. Raises ProtocolError."""
    check_array("token_ids", scores.token_ids, np.int32, dimensions=2)
    check_array("log_probs", scores.log_probs, np.float32, dimensions=2)
    if scores.token_ids.shape != scores.log_probs.shape:
        raise ProtocolError(f"log_probs must have the shape {scores.token_ids.shape}, got {scores.log_probs.shape}")
    if scores.token_ids.size and scores.token_ids.min() < -1:
        raise ProtocolError(f"token_ids must be at least -1, got {scores.token_ids.min()}")
    _check_log_probs(scores.log_probs.reshape(-1), scores.log_probs.size)
    mass_T = np.where(scores.token_ids >= 0, np.exp(scores.log_probs, dtype=np.float64), 0.0).sum(axis=1)
    if len(mass_T) and mass_T.max() > 1.0 + MAX_LOG_PROB * 10:
        raise ProtocolError(f"log_probs of a row must not sum to more than 1, got {mass_T.max():g}")


def check_result(samples: GroupSamples) -> None:
    """Check that an engine's answer carries the text of every completion, which is what gets graded."""
    completions = len(samples.offsets) - 1
    if len(samples.texts) != completions:
        raise ProtocolError(f"texts must have {completions} entries, got {len(samples.texts)}")


def _check_ids(name: str, ids: np.ndarray) -> None:
    if len(ids) and ids.min() < 0:
        raise ProtocolError(f"{name} must not be negative, got {ids.min()}")


def _check_log_probs(log_probs_T: np.ndarray, tokens: int) -> None:
    if len(log_probs_T) != tokens:
        raise ProtocolError(f"log_probs must have one entry per token ({tokens}), got {len(log_probs_T)}")
    # min and max hand NaN on, and every comparison with NaN is false: two reductions find NaN, ±inf and positives.
    if tokens and not (log_probs_T.min() > -np.inf and log_probs_T.max() <= MAX_LOG_PROB):
        raise ProtocolError(f"log_probs must be finite and at most {MAX_LOG_PROB}")


def _check_offsets(offsets: np.ndarray, tokens: int) -> None:
    if len(offsets) < 2:
        raise ProtocolError(f"offsets must bound at least one completion, got {len(offsets)} entries")
    if offsets[0] != 0 or offsets[-1] != tokens:
        raise ProtocolError(f"offsets must run from 0 to {tokens}, got {offsets[0]} to {offsets[-1]}")
    if (offsets[1:] < offsets[:-1]).any():
        raise ProtocolError("offsets must not fall")


def _check_spans(spans_S2: np.ndarray, tokens: int) -> None:
    if spans_S2.shape[1] != 2:
        raise ProtocolError(f"version_spans must have shape [S, 2], got {spans_S2.shape}")
    counts, versions = spans_S2[:, 0], spans_S2[:, 1]
    if len(spans_S2) and (counts.min() < 1 or versions.min() < -1):
        raise ProtocolError("version_spans must hold counts >= 1 and versions >= -1")
    if counts.sum(dtype=np.int64) != tokens:
        raise ProtocolError(f"version_spans must cover {tokens} tokens, got {counts.sum(dtype=np.int64)}")


def _check_completions(samples: GroupSamples, completions: int) -> None:
    if len(samples.finish_reasons) != completions:
        raise ProtocolError(f"finish_reasons must have {completions} entries, got {len(samples.finish_reasons)}")
    if samples.texts and len(samples.texts) != completions:
        raise ProtocolError(f"texts must have {completions} entries (or none at all), got {len(samples.texts)}")


def _check_text_only(samples: GroupSamples, completions: int) -> None:
    if not samples.text_only:
        if samples.usage:
            raise ProtocolError("usage must be empty where the token ids are known")
        return
    if len(samples.token_ids):
        raise ProtocolError("prompt_ids must hold at least one token, unless there are texts and no token ids at all")
    if len(samples.texts) != completions:
        raise ProtocolError(
            f"texts must have {completions} entries where there are no token ids, got {len(samples.texts)}"
        )
    counted = sum(usage.completions for usage in samples.usage)
    if samples.usage and counted != completions:
        raise ProtocolError(f"usage must cover {completions} completions, got {counted}")
