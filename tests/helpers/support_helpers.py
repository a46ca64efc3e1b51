"""Truncated distributions written out token by token, in float64, and samples held against them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from engine_helpers import completions, make_task
from msgspec import structs
from torch import Tensor

from zppo.config.topology import StudentSampling
from zppo.training.batch import assemble
from zppo.training.layout import deal_passes
from zppo.training.policy import Policy
from zppo_protocol.messages import GenerateTask, TrainWindow
from zppo_protocol.samples import GroupSamples, TrainGroup
from zppo_protocol.values import Sampling


def task_with_support(text: str, sampling: StudentSampling, **more: Any) -> GenerateTask:
    """As the scheduler asks for the student's responses."""
    task = make_task(text, **more)
    return structs.replace(task, sampling=sampling.in_training, with_support=sampling.truncates)


def kept_ids(logits_V: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What temperature, min-p, top-k and top-p leave, most probable first; of equals the lower id
    comes first."""
    scaled_V = logits_V.astype(np.float64) / sampling.temperature
    order = np.lexsort((np.arange(len(scaled_V)), -scaled_V))
    shares = np.exp(scaled_V[order] - scaled_V[order[0]])
    order = order[shares >= sampling.min_p][: sampling.top_k or None]
    shares = np.exp(scaled_V[order] - scaled_V[order[0]])
    shares /= shares.sum()
    # A token stays while those before it have not reached top_p.
    return order[np.cumsum(shares) - shares < sampling.top_p]


def assert_supports(model: Any, samples: GroupSamples, sampling: Sampling, close: float) -> None:
    """Each token's support is what the model's plain forward pass leaves, and its log-prob that of
    the distribution over it."""
    assert samples.support is not None
    rows = iter(np.split(samples.support.ids, samples.support.offsets[1:-1]))
    found = iter(samples.log_probs.tolist())
    for token_ids in completions(samples):
        tokens = torch.tensor([[*samples.prompt_ids.tolist(), *token_ids]])
        logits_TV = model(input_ids=tokens, use_cache=False).logits[0].float().numpy()
        for token, logits_V in zip(
            token_ids, logits_TV[len(samples.prompt_ids) - 1 : -1], strict=True
        ):
            kept = kept_ids(logits_V, sampling)
            assert next(rows).tolist() == sorted(kept.tolist())
            scaled = logits_V[kept].astype(np.float64) / sampling.temperature
            exact = logits_V[token] / sampling.temperature - np.logaddexp.reduce(scaled)
            assert abs(next(found) - exact) < close


def trainer_log_probs(model: Any, samples: GroupSamples, temperature: float) -> Tensor:
    """The trainer's log-probs [T] of the tokens, over their supports."""
    policy = Policy(model)
    rewards = np.zeros(len(samples.offsets) - 1, np.float32)
    group = TrainGroup("g", "q", "plain", samples, rewards)
    step = max(int(samples.version_spans[:, 1].max()), 0)
    rollouts = assemble(
        TrainWindow(step=step, groups=[group]), max_staleness=step, device=policy.device
    )
    found_T = torch.zeros(rollouts.tokens)
    for batch in deal_passes(
        rollouts, np.arange(rollouts.sequences), 512, share=policy.shares_prompts
    ).batches:
        targets_R = rollouts.token_ids_T[batch.tokens_R]
        found_T[batch.tokens_R] = policy.log_probs(batch, targets_R, temperature=temperature)[0]
    return found_T
