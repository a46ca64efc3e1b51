"""What a policy loss is made of, as one small value that is checked once, when it is written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast, get_args

Correction = Literal["none", "truncate", "mask"]
Normalisation = Literal["token", "sequence", "fixed_length"]
RatioLevel = Literal["token", "sequence"]
CORRECTIONS: tuple[str, ...] = get_args(Correction)
"""The compiled kernels know a correction by its place here."""

# exp(20) = 4.9e8 is far beyond every clip bound and far from overflow, so a clamped ratio changes
# no loss that matters.
LOG_RATIO_BOUND = 20.0


@dataclass(frozen=True)
class PolicyLossSettings:
    """Switches of the clipped surrogate (ZPPO, Table 8 are the defaults).

    clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]. dual_clip: for
    negative advantages a token's loss is at most `dual_clip * |A|`; None switches it off.
    temperature: logits are divided by it before the softmax, as the sampler did. correction: what
    exp(proximal - behaviour) does: nothing, a weight truncated at `correction_cap`, or a mask that
        drops tokens above `correction_cap` and weighs the others by it.
    normalisation: `token` divides the sum by the global token count; `sequence` averages the
    sequence means;
        `fixed_length` divides by `sequence_count * fixed_length` (Dr. GRPO).
    ratio_level: one ratio per token, or one per sequence: exp(mean log-ratio), as in GSPO.
    kl_coefficient: weight of the k3 estimate of KL(policy || reference); needs reference log-probs.
    """

    clip_low: float = 0.20
    clip_high: float = 0.28
    dual_clip: float | None = 10.0
    temperature: float = 1.0
    correction: Correction = "truncate"
    correction_cap: float = 2.0
    normalisation: Normalisation = "token"
    fixed_length: int | None = None
    ratio_level: RatioLevel = "token"
    kl_coefficient: float = 0.0

    def __post_init__(self) -> None:
        _one_of("correction", self.correction, CORRECTIONS)
        _one_of("normalisation", self.normalisation, get_args(Normalisation))
        _one_of("ratio_level", self.ratio_level, get_args(RatioLevel))
        _within("clip_low", self.clip_low, 0.0, 1.0)
        _within("clip_high", self.clip_high, 0.0, math.inf)
        _within("kl_coefficient", self.kl_coefficient, 0.0, math.inf)
        _positive("temperature", self.temperature)
        _positive("correction_cap", self.correction_cap)
        if self.dual_clip is not None and not self.dual_clip >= 1.0 + self.clip_high:
            raise ValueError(
                f"dual_clip is {self.dual_clip!r}; expected None or at least 1 + clip_high"
            )
        if (self.normalisation == "fixed_length") != (self.fixed_length is not None):
            raise ValueError(
                "fixed_length belongs with normalisation='fixed_length': give both or neither"
            )
        if self.fixed_length is not None and self.fixed_length < 1:
            raise ValueError(f"fixed_length is {self.fixed_length!r}; expected at least 1")


def settings_values(settings: PolicyLossSettings) -> tuple[list[float], Correction, RatioLevel]:
    """The settings the row kernels need, as plain values: custom operators take no records."""
    dual_clip = math.inf if settings.dual_clip is None else settings.dual_clip
    numbers = [
        settings.clip_low,
        settings.clip_high,
        dual_clip,
        settings.temperature,
        settings.correction_cap,
        settings.kl_coefficient,
    ]
    return numbers, settings.correction, settings.ratio_level


def settings_from(numbers: list[float], correction: str, ratio_level: str) -> PolicyLossSettings:
    """The way back; the normalisation is left at its default, since `scales_S` holds it by then."""
    clip_low, clip_high, dual_clip, temperature, correction_cap, kl_coefficient = numbers
    return PolicyLossSettings(
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=None if math.isinf(dual_clip) else dual_clip,
        temperature=temperature,
        correction=cast("Correction", correction),
        correction_cap=correction_cap,
        ratio_level=cast("RatioLevel", ratio_level),
        kl_coefficient=kl_coefficient,
    )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not (low <= value <= high and math.isfinite(value)):
        raise ValueError(f"{name} is {value!r}; expected a finite number in [{low}, {high}]")


def _positive(name: str, value: float) -> None:
    if not (value > 0.0 and math.isfinite(value)):
        raise ValueError(f"{name} is {value!r}; expected a finite number above 0")
