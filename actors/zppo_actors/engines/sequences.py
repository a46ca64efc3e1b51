"""One completion: while it runs, and when it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from zppo_actors.engines.base import EngineError
from zppo_protocol.messages import GenerateTask
from zppo_protocol.samples import GroupSamples
from zppo_protocol.support import support_of
from zppo_protocol.values import Sampling

if TYPE_CHECKING:  # engines without a model need this module but no torch
    from zppo.training.pictures import SeenPrompt
    from zppo_actors.engines.uniforms import UniformStream


@dataclass(frozen=True)
class Completion:
    """A response: token ids [n] int32, behaviour log-probs [n] float32, spans of (token count,
    policy version), and the ids of each token's support where the task asks for them."""

    token_ids: np.ndarray
    log_probs: np.ndarray
    version_spans: list[tuple[int, int]]
    finish_reason: Literal["stop", "length"]
    support: Sequence[np.ndarray] | None = None


@dataclass(eq=False)
class Running:
    """A response in the making. `budget` is the most tokens it may have; `support_limit` the most
    ids of a token's support, 0 where nobody asks for it; `pictures` are those of the prompt;
    `owner` is whatever the caller needs."""

    prompt_ids: np.ndarray
    sampling: Sampling
    budget: int
    index: int
    uniforms: UniformStream
    support_limit: int = 0
    pictures: SeenPrompt | None = None
    owner: Any = None
    uniforms_laid_out: int = 0
    version_starts: list[tuple[int, int]] = field(default_factory=list)
    """(number of the first token, policy version that samples from there on), in order."""
    support: list[np.ndarray] = field(default_factory=list)
    """The support of each token sampled so far, if it is asked for."""

    def sampled_by(self, version: int, tokens: int) -> None:
        """From token number `tokens` on, `version` samples."""
        if self.version_starts and self.version_starts[-1][0] == tokens:
            self.version_starts.pop()
        self.version_starts.append((tokens, version))

    def spans(self, tokens: int) -> list[tuple[int, int]]:
        """Run-length encoding of the policy versions of `tokens` tokens."""
        ends = [start for start, _ in self.version_starts[1:]] + [tokens]
        return [
            (end - start, version)
            for (start, version), end in zip(self.version_starts, ends, strict=True)
        ]


def budget_of(task: GenerateTask, prompt_ids: np.ndarray, vocabulary: int, max_length: int) -> int:
    """Tokens a response to these ids [n] may have. Raises EngineError for a prompt that leaves no
    room in the context or is not of this vocabulary."""
    if len(prompt_ids) >= max_length:
        reason = (
            f"the prompt has {len(prompt_ids)} tokens, which leaves no room in a context of "
            f"{max_length}"
        )
        raise EngineError(reason, retryable=False)
    if (largest := int(prompt_ids.max())) >= vocabulary:
        reason = f"the prompt holds token id {largest}, but the model has {vocabulary} tokens"
        raise EngineError(reason, retryable=False)
    return min(task.sampling.max_new_tokens, max_length - len(prompt_ids))


def group_samples(
    prompt_ids: np.ndarray,
    completions: list[Completion],
    texts: list[str],
    media_tokens: Sequence[int] = (),
) -> GroupSamples:
    """Lay the completions of one prompt end to end; all of them have supports, or none.
    `media_tokens` as in `GroupSamples`."""
    lengths = [len(completion.token_ids) for completion in completions]
    spans = [span for completion in completions for span in completion.version_spans if span[0]]
    return GroupSamples(
        prompt_ids=prompt_ids,
        token_ids=np.concatenate([completion.token_ids for completion in completions]),
        log_probs=np.concatenate([completion.log_probs for completion in completions]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        version_spans=np.asarray(spans, dtype=np.int32).reshape(-1, 2),
        texts=texts,
        finish_reasons=[completion.finish_reason for completion in completions],
        support=None
        if any(completion.support is None for completion in completions)
        else support_of([row for completion in completions for row in completion.support or ()]),
        media_tokens=list(media_tokens),
    )
