"""What a policy loss is made of, as one small value that is checked once, when it is written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

Surrogate = Literal["clip", "cispo", "sapo", "dppo_tv", "dppo_kl"]
RatioLevel = Literal["token", "sequence"]
Correction = Literal["none", "truncate", "mask"]
CorrectionLevel = Literal["token", "sequence"]
KlEstimator = Literal["k1", "k2", "k3"]
KlCorrection = Literal["none", "importance", "straight_through"]
Normalisation = Literal["token", "sequence", "fixed_length"]

# exp(20) = 4.9e8 is far beyond every clip bound and far from overflow, so a clamped ratio changes
# no loss that matters.
LOG_RATIO_BOUND = 20.0


@dataclass(frozen=True)
class PolicyLossSettings:
    """Switches of the policy loss (ZPPO, Table 8 are the defaults); formulas in docs/kernels.md.

    surrogate: what stands for the policy gradient. `clip`: PPO's, clipped on one side. `cispo`: the
        clipped ratio as a constant weight of the log-prob (MiniMax-M1). `sapo`: a sigmoid gate in
        place of the clip (Soft Adaptive Policy Optimization). `dppo_tv`, `dppo_kl`: the ratio as a
        constant weight of the log-prob, tokens left out whose probability moved too far in total
        variation or KL divergence (DPPO, binary form).
    clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]; for `dppo_*` they
        bound the divergence of tokens that lose and gain probability.
    dual_clip: for negative advantages a token's loss is at most `dual_clip * |A|`; for `dppo_*` the
        weight is at most `dual_clip`. None switches it off.
    sapo_temperature_positive, sapo_temperature_negative: how sharp the gate is, by the sign of A.
    temperature: logits are divided by it before the softmax, as the sampler did.
    ratio_level: one ratio per token, or one per sequence: exp(mean log-ratio), as in GSPO.
    correction: what w = exp(proximal - behaviour) does: nothing, a weight held between
        `correction_floor` and `correction_cap`, or a mask that drops tokens outside of them and
        weighs the others by it. correction_level: w of the token, or the product over its sequence.
    kl_coefficient, kl_estimator: weight and estimate of KL(policy || reference), which needs
        reference log-probs. kl_correction: `importance` multiplies the estimate by the ratio;
        `straight_through` keeps its value and takes the gradient of k2.
    entropy_coefficient: what each row's entropy, times its share of the loss, takes off the loss.
    normalisation: `token` divides the sum by the global token count; `sequence` averages the
        sequence means; `fixed_length` divides by `sequence_count * fixed_length` (Dr. GRPO).
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
    surrogate: Surrogate = "clip"
    sapo_temperature_positive: float = 1.0
    sapo_temperature_negative: float = 1.05
    correction_floor: float | None = None
    correction_level: CorrectionLevel = "token"
    kl_estimator: KlEstimator = "k3"
    kl_correction: KlCorrection = "none"
    entropy_coefficient: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            _one_of(name, getattr(self, name), allowed)
        _one_of("normalisation", self.normalisation, get_args(Normalisation))
        _within("clip_low", self.clip_low, 0.0, 1.0)
        for name in ("clip_high", "kl_coefficient", "entropy_coefficient"):
            _within(name, getattr(self, name), 0.0, math.inf)
        for name in ("temperature", "correction_cap", *_SAPO_TEMPERATURES):
            _positive(name, getattr(self, name))
        _check_bounds(self)
        if (self.normalisation == "fixed_length") != (self.fixed_length is not None):
            raise ValueError(
                "fixed_length belongs with normalisation='fixed_length': give both or neither"
            )
        if self.fixed_length is not None and self.fixed_length < 1:
            raise ValueError(f"fixed_length is {self.fixed_length!r}; expected at least 1")

    @property
    def weighs_log_prob(self) -> bool:
        """Whether the surrogate's gradient goes through the log-prob alone, not the ratio."""
        return self.surrogate in ("cispo", "dppo_tv", "dppo_kl")

    @property
    def every_row_is_live(self) -> bool:
        """Whether rows without an advantage have a gradient as well."""
        return self.kl_coefficient > 0 or self.entropy_coefficient > 0


CHOICES: dict[str, tuple[str, ...]] = {
    "surrogate": get_args(Surrogate),
    "ratio_level": get_args(RatioLevel),
    "correction": get_args(Correction),
    "correction_level": get_args(CorrectionLevel),
    "kl_estimator": get_args(KlEstimator),
    "kl_correction": get_args(KlCorrection),
}
"""The compiled code knows a choice by its place among these."""
NUMBERS: tuple[str, ...] = (
    "clip_low",
    "clip_high",
    "dual_clip",
    "sapo_temperature_positive",
    "sapo_temperature_negative",
    "temperature",
    "correction_floor",
    "correction_cap",
    "kl_coefficient",
    "entropy_coefficient",
)
"""The order in which operators and compiled code get the settings that are numbers."""
_SAPO_TEMPERATURES = ("sapo_temperature_positive", "sapo_temperature_negative")
# What an optional bound is where it bounds nothing.
_NO_BOUND = {"dual_clip": math.inf, "correction_floor": 0.0}


def settings_values(settings: PolicyLossSettings) -> tuple[list[float], list[int]]:
    """NUMBERS and CHOICES of the settings as plain values: custom operators take no records."""
    numbers = [getattr(settings, name) for name in NUMBERS]
    choices = [allowed.index(getattr(settings, name)) for name, allowed in CHOICES.items()]
    return [
        float(_NO_BOUND[name] if value is None else value)
        for name, value in zip(NUMBERS, numbers, strict=True)
    ], choices


def settings_from(numbers: list[float], choices: list[int]) -> PolicyLossSettings:
    """The way back; the normalisation is left at its default, since `scales_S` holds it by then."""
    values: dict[str, Any] = {
        name: None if _NO_BOUND.get(name) == value else value
        for name, value in zip(NUMBERS, numbers, strict=True)
    }
    for (name, allowed), index in zip(CHOICES.items(), choices, strict=True):
        values[name] = allowed[index]
    return PolicyLossSettings(**values)


def _check_bounds(settings: PolicyLossSettings) -> None:
    """Raise ValueError for bounds that cross, and for a surrogate that knows no sequences."""
    dual_clip, floor, cap = settings.dual_clip, settings.correction_floor, settings.correction_cap
    if settings.surrogate == "clip":
        if dual_clip is not None and not dual_clip >= 1.0 + settings.clip_high:
            raise ValueError(f"dual_clip is {dual_clip!r}; expected None or at least 1 + clip_high")
    elif dual_clip is not None and not dual_clip > 0.0:
        raise ValueError(f"dual_clip is {dual_clip!r}; expected None or a number above 0")
    if floor is not None and not 0.0 <= floor <= cap:
        raise ValueError(
            f"correction_floor is {floor!r}; expected None or a number from 0 to correction_cap"
        )
    if settings.surrogate.startswith("dppo") and settings.ratio_level == "sequence":
        raise ValueError(
            f"surrogate is {settings.surrogate!r}, which compares the probabilities of single "
            "tokens; expected ratio_level='token'"
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
