"""The door: which answers of a worker count (pure).

What comes in here is trained on, graded, and saved with the state of the scheduler, so a wrong
answer that got in would kill the trainer in every attempt. The invariant: what `problem` lets in
fits the task and the models: as many parts as were asked for, token ids of the vocabulary, supports
where sampling is truncated, versions that were published and lie within the window's bound, lengths
within what was asked for and within the context. That log-probs are finite and arrays belong
together holds for every value that exists (`zppo_protocol.samples`).

Shape legend: N completions of the group, T response tokens laid end to end, S version spans.
"""

from __future__ import annotations

import operator
from typing import TypeAlias

import numpy as np
from msgspec import Struct

from zppo.scheduling.events import Answer, Graded, Sampled, Scored
from zppo_protocol.arrays import highest
from zppo_protocol.messages import GenerateTask, GradeTask, ScoreTask
from zppo_protocol.samples import GroupSamples, TokenScores
from zppo_protocol.support import Support
from zppo_protocol.values import FROZEN

Task: TypeAlias = GenerateTask | ScoreTask | GradeTask


class Bounds(Struct, frozen=True, kw_only=True):
    """What holds for all answers of a pool. None: not known here (a model behind a server).

    `vocabulary`: token ids lie below it. `context`: the longest prompt and response, in tokens.
    `trained`: its tokens are trained on, so that they must be there.
    """

    vocabulary: int | None = None
    context: int | None = None
    trained: bool = False


def problem(task: Task, answer: Answer, published: int, bounds: Bounds) -> str | None:
    """Why an answer to `task` must not be let in, or None.

    `published`: the newest policy version. The oldest that may sample is the task's `min_version`,
    which is the window's bound; FROZEN asks a frozen model.
    """
    match task, answer:
        case GenerateTask(), Sampled():
            return _samples_problem(task, answer.samples, published, bounds)
        case ScoreTask(), Scored():
            return _scores_problem(task, answer.scores, bounds)
        case GradeTask(), Graded():
            return _count_problem(len(task.responses), len(answer.grades), "grades")
    return f"{type(answer).__name__} to a {type(task).__name__}"


def _samples_problem(
    task: GenerateTask, samples: GroupSamples, published: int, bounds: Bounds
) -> str | None:
    if samples.text_only:
        missing = "no token ids, although they are trained on" if bounds.trained else None
        return _count_problem(task.n, len(samples.texts), "completions") or missing
    return (
        _count_problem(task.n, len(samples.offsets) - 1, "completions")
        or _ids_problem(samples.prompt_ids, bounds)
        or _ids_problem(samples.token_ids, bounds)
        or _media_problem(task, samples)
        or _support_problem(task.support_limit, samples.support, bounds)
        or _versions_problem(samples.version_spans, task.min_version, published)
        or _lengths_problem(task, samples, bounds)
    )


def _scores_problem(task: ScoreTask, scores: TokenScores, bounds: Bounds) -> str | None:
    rows, width = scores.token_ids.shape
    if width > task.top_k:
        return f"{width} scores of a token; expected at most {task.top_k}"
    return _count_problem(len(task.token_ids), rows, "scored tokens") or _ids_problem(
        scores.token_ids, bounds
    )


def _support_problem(limit: int, support: Support | None, bounds: Bounds) -> str | None:
    """A support must be there exactly where the loss is over one."""
    if limit == 0:
        return None if support is None else "supports of tokens that nobody asked for"
    if support is None:
        return "no supports, although the sampling of trained tokens is truncated"
    longest = int(support.lengths_T.max(initial=0))
    if longest > limit:
        return f"a support of {longest} ids; expected at most {limit}"
    return _ids_problem(support.ids, bounds)


def _count_problem(asked: int, got: int, what: str) -> str | None:
    return None if got == asked else f"{got} {what}; expected {asked}"


def _ids_problem(token_ids: np.ndarray, bounds: Bounds) -> str | None:
    if bounds.vocabulary is None or not token_ids.size:
        return None
    largest = highest(token_ids)
    if largest < bounds.vocabulary:
        return None
    return f"the token id {largest}; expected ids below {bounds.vocabulary}, the vocabulary"


def _media_problem(task: GenerateTask, samples: GroupSamples) -> str | None:
    """The trainer makes the same tokens of the pictures, and compares."""
    return _count_problem(
        len(task.prompt.media), len(samples.media_tokens), "counts of the tokens of pictures"
    )


def _versions_problem(spans_S2: np.ndarray, oldest: int, published: int) -> str | None:
    newest = FROZEN if oldest == FROZEN else published
    wrong = [version for version in spans_S2[:, 1].tolist() if not oldest <= version <= newest]
    if not wrong:
        return None
    expected = f"{FROZEN}, a frozen model" if oldest == FROZEN else f"{oldest} to {newest}"
    return f"tokens of policy version {wrong[0]}; expected {expected}"


def _lengths_problem(task: GenerateTask, samples: GroupSamples, bounds: Bounds) -> str | None:
    offsets = samples.offsets.tolist()
    longest = max(map(operator.sub, offsets[1:], offsets))
    if longest > task.sampling.max_new_tokens:
        return f"a response of {longest} tokens; expected at most {task.sampling.max_new_tokens}"
    total = len(samples.prompt_ids) + longest
    if bounds.context is not None and total > bounds.context:
        return f"{total} tokens of prompt and response; expected at most {bounds.context}"
    return None
