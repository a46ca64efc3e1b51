"""The surrogates of the policy gradient as formulas, differentiable by autograd, each a function of
the same four columns; and how they treat their ratio, for the metrics.

Shapes: T rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .settings import PolicyLossSettings


@dataclass(frozen=True)
class Ratios:
    """What a surrogate is made of: log(policy / proximal) of the token or of its sequence, the two
    log-probs of the token, and its advantage. Masked rows hold 0."""

    log_ratio_T: Tensor
    log_probs_T: Tensor
    proximal_T: Tensor
    advantages_T: Tensor

    @property
    def ratio_T(self) -> Tensor:
        """policy / proximal."""
        return self.log_ratio_T.exp()


Formula = Callable[[Ratios, PolicyLossSettings], Tensor]
Clips = tuple[Tensor, Tensor, Tensor]


def _clip(ratios: Ratios, settings: PolicyLossSettings) -> Tensor:
    """max(-A r, -A clip(r)), and for A < 0 at most -A * dual_clip."""
    ratio_T, advantages_T = ratios.ratio_T, ratios.advantages_T
    clipped_T = ratio_T.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    surrogate_T = torch.maximum(-advantages_T * ratio_T, -advantages_T * clipped_T)
    if settings.dual_clip is None:
        return surrogate_T
    bounded_T = torch.minimum(surrogate_T, -advantages_T * settings.dual_clip)
    return torch.where(advantages_T < 0, bounded_T, surrogate_T)


def _sapo(ratios: Ratios, settings: PolicyLossSettings) -> Tensor:
    """-A * (4 / tau) * sigmoid(tau * (r - 1)): slope -A at r = 1, and less on both sides."""
    sharpness_T = sapo_sharpness_of(ratios, settings)
    gate_T = torch.sigmoid(sharpness_T * (ratios.ratio_T - 1.0)) * 4.0 / sharpness_T
    return -gate_T * ratios.advantages_T


def _weighted_log_prob(ratios: Ratios, settings: PolicyLossSettings) -> Tensor:
    """-A * w * log_prob with a weight that is no part of the gradient; 0 without an advantage,
    where the log-prob may be -inf."""
    log_probs_T = torch.where(ratios.advantages_T == 0, 0.0, ratios.log_probs_T)
    return -ratios.advantages_T * weight_of(ratios, settings).detach() * log_probs_T


SURROGATES: dict[str, Formula] = {
    "clip": _clip,
    "cispo": _weighted_log_prob,
    "sapo": _sapo,
    "dppo_tv": _weighted_log_prob,
    "dppo_kl": _weighted_log_prob,
}


def sapo_sharpness_of(ratios: Ratios, settings: PolicyLossSettings) -> Tensor:
    """tau of each row, by the sign of its advantage."""
    positive, negative = settings.sapo_temperature_positive, settings.sapo_temperature_negative
    return torch.where(ratios.advantages_T > 0, positive, negative).to(ratios.log_ratio_T.dtype)


def weight_of(ratios: Ratios, settings: PolicyLossSettings) -> Tensor:
    """The ratio as a weight: clipped (`cispo`), or truncated and 0 for tokens whose probability
    moved too far (`dppo_*`)."""
    if settings.surrogate == "cispo":
        return ratios.ratio_T.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    far_T = _moved_too_far(ratios, settings)
    return torch.where(far_T, 0.0, ratios.ratio_T.clamp(max=_cap_of(settings)))


def _moved_too_far(ratios: Ratios, settings: PolicyLossSettings) -> Tensor:
    """DPPO's mask: the divergence of the two-point distribution (this token, any other) is beyond
    its bound, and the gradient would take it further."""
    now_T, before_T = ratios.log_probs_T.exp(), ratios.proximal_T.exp()
    rising_T = ratios.advantages_T > 0
    if settings.surrogate == "dppo_tv":
        moved_T = now_T - before_T
        return torch.where(rising_T, moved_T > settings.clip_high, moved_T < -settings.clip_low)
    token_T = torch.where(before_T == 0, 0.0, before_T * (ratios.proximal_T - ratios.log_probs_T))
    others_T = (1.0 - before_T) * torch.log((1.0 - before_T + 1e-8) / (1.0 - now_T + 1e-8))
    divergence_T = token_T + others_T
    return torch.where(
        rising_T,
        (divergence_T > settings.clip_high) & (now_T > before_T),
        (divergence_T > settings.clip_low) & (now_T < before_T),
    )


def clips_of(ratios: Ratios, settings: PolicyLossSettings) -> Clips:
    """Which rows [T] met the lower, the upper and the dual bound: the clip metrics."""
    ratio_T, advantages_T = ratios.ratio_T, ratios.advantages_T
    low_T, high_T = ratio_T < 1.0 - settings.clip_low, ratio_T > 1.0 + settings.clip_high
    never_T = torch.zeros_like(low_T)
    if settings.surrogate == "sapo":
        return never_T, never_T, never_T
    if settings.surrogate == "cispo":
        return low_T, high_T, never_T
    rising_T, above_T = advantages_T > 0, ratio_T > _cap_of(settings)
    if settings.surrogate == "clip":
        falling_T = advantages_T < 0
        return falling_T & low_T, rising_T & high_T, falling_T & above_T
    far_T = _moved_too_far(ratios, settings)
    return far_T & ~rising_T, far_T & rising_T, ~far_T & above_T


def _cap_of(settings: PolicyLossSettings) -> float:
    return math.inf if settings.dual_clip is None else settings.dual_clip
