"""From the topology's words to the settings of the policy loss.

Three log-probs per token have names and are never mixed up: `behaviour` (from the engine, at
sampling), `proximal` (the trainer's own, at the start of the step) and `policy` (with gradient).
With ratio `proximal` the surrogate uses policy/proximal and weighs each token by the corrected
proximal/behaviour; with ratio `behaviour` it uses policy/behaviour, and there is nothing left to
correct.

Tokens of a frozen model (a teacher's response that stands for the student's) have no behaviour
log-prob. The rule for them is here: behaviour is proximal, so that their importance weight is 1
whatever the settings.

Shape legend: T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zppo.config.method import MethodConfig
from zppo.errors import UserError
from zppo_kernels import PolicyLossSettings
from zppo_protocol.values import Sampling


def sampling_temperature(sampling: Sampling) -> float:
    """Temperature that log-probs refer to; greedy decoding reports those of the plain softmax."""
    return sampling.temperature if sampling.temperature > 0 else 1.0


def loss_settings(method: MethodConfig, sampling: Sampling) -> PolicyLossSettings:
    """Settings of the clipped surrogate (Table 8). Raises UserError for values that do not go
    together."""
    try:
        return PolicyLossSettings(
            clip_low=method.clip_low,
            clip_high=method.clip_high,
            dual_clip=method.dual_clip,
            temperature=sampling_temperature(sampling),
            correction="none" if method.ratio == "behaviour" else method.correction,
            correction_cap=method.correction_cap,
            normalisation=method.loss_normalisation,
        )
    except ValueError as error:
        raise UserError(f"method: {error}") from None


def old_log_probs(
    method: MethodConfig, proximal_T: Tensor, behaviour_T: Tensor, frozen_T: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return what the ratio divides by, and the behaviour log-probs for the importance weight
    (None: weight 1).

    `frozen_T` (bool) marks the tokens that no policy sampled.
    """
    behaviour_T = torch.where(frozen_T, proximal_T, behaviour_T)
    if method.ratio == "behaviour":
        return behaviour_T, None
    return proximal_T, behaviour_T
