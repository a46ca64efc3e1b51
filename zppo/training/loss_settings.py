"""From the topology's words to the settings of the policy loss.

Three log-probs per token have names and are never mixed up: `behaviour` (from the engine, at
sampling), `proximal` (the trainer's own, at the start of the step) and `policy` (with gradient).
With ratio `proximal` the surrogate uses policy/proximal and weighs each token by the corrected
proximal/behaviour; with ratio `behaviour` it uses policy/behaviour, and there is nothing left to
correct. Where policy and proximal are the same weights, the ratio is 1 and nobody needs to measure
the proximal log-probs first.

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
    """Settings of the policy loss (defaults: Table 8). Raises UserError for values that do not go
    together.

    A mean over the tokens of a micro-batch is one over all tokens, with another count of them.
    """
    normalisation = method.loss_normalisation
    length = method.fixed_length or sampling.max_new_tokens
    try:
        return PolicyLossSettings(
            surrogate=method.surrogate,
            ratio_level=method.ratio_level,
            clip_low=method.clip_low,
            clip_high=method.clip_high,
            dual_clip=method.dual_clip,
            sapo_temperature_positive=method.sapo_temperature_positive,
            sapo_temperature_negative=method.sapo_temperature_negative,
            temperature=sampling_temperature(sampling),
            correction="none" if method.ratio == "behaviour" else method.correction,
            correction_cap=method.correction_cap,
            correction_floor=method.correction_floor,
            correction_level=method.correction_level,
            normalisation="token" if normalisation == "micro_batch" else normalisation,
            fixed_length=length if normalisation == "fixed_length" else None,
            entropy_coefficient=method.entropy_coefficient,
            kl_coefficient=method.kl_coefficient,
            kl_estimator=method.kl_estimator,
            kl_correction=method.kl_correction,
        )
    except ValueError as error:
        raise UserError(f"method: {error}") from None


def old_log_probs(
    method: MethodConfig, proximal_T: Tensor | None, behaviour_T: Tensor, frozen_T: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return what the ratio divides by (None: the policy's own), and the behaviour log-probs for
    the importance weight (None: weight 1).

    `frozen_T` (bool) marks the tokens that no policy sampled; where there are some, `proximal_T` is
    needed.
    """
    if proximal_T is not None:
        behaviour_T = torch.where(frozen_T, proximal_T, behaviour_T)
    if method.ratio == "behaviour":
        return behaviour_T, None
    return proximal_T, behaviour_T
