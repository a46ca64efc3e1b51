"""`method`: which method, and the recipe all methods share. Defaults are Table 8 of the paper."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from zppo.config.base import Config, NonNegativeFloat, Positive, PositiveFloat, Share
from zppo.config.presets import PresetName


class MethodConfig(Config, frozen=True, kw_only=True):
    """Which method, and the recipe all methods share (paper §3, Table 8, Fig. 6)."""

    name: str = "zppo"
    """zppo, grpo, grpo_replay, grpo_both, grpo_replay_bcq, grpo_replay_ncq,
    grpo_replay_teacher_response, hint, prefix, off_distill, off_distill_replay, on_distill or
    on_distill_replay

    Or one of your own: package.module:name, ./file.py:name, or a name that a package announces
    (docs/extending.md)."""
    preset: PresetName | None = None
    """the loss of a known method, as values of the settings below; what the topology says wins"""
    group_size: Positive = 8
    """G_S, the student's responses to each prompt"""
    teacher_group_size: Positive = 4
    """G_T, the teacher's responses to each hard question"""
    hard_threshold: Share = 0.5
    """τ: a question is hard if the share of its plain responses that are correct is below"""
    correct_reward: Annotated[float, Meta(ge=-1e9, le=1e9)] = 1.0
    """a response is correct if it earns at least so much; advantages use what it earns"""
    updates_per_step: Positive = 4
    """I, gradient updates per step, each on an equal share of the groups"""
    advantage: Literal[
        "norm_without_zero", "norm_with_zero", "center_only", "grpo", "grpo_bessel", "rloo", "batch"
    ] = "norm_without_zero"
    """norm_without_zero (Eqs. 2-3), norm_with_zero, center_only, grpo (Eq. 1), grpo_bessel (the
    same with n - 1), rloo (less the mean of the others) or batch (over the std of all rewards)"""
    advantage_rewards: Literal["sum", "decoupled"] = "sum"
    """several rewards: sum, or decoupled (each normalised in its group, then weighted: GDPO)"""
    advantage_scope: Literal["minibatch", "step"] = "minibatch"
    """what the advantage is normalised over: minibatch or step"""
    surrogate: Literal["clip", "cispo", "sapo", "dppo_tv", "dppo_kl"] = "clip"
    """clip; cispo (clipped weight on the log-prob); sapo (a soft gate); dppo_tv or dppo_kl (tokens
    masked by how far their probability moved)"""
    ratio_level: Literal["token", "sequence"] = "token"
    """token: one probability ratio a token; sequence: their geometric mean over a response"""
    clip_low: Share = 0.20
    """ε_low: the probability ratio is clipped at 1 - ε_low; dppo: how far a probability may fall"""
    clip_high: NonNegativeFloat = 0.28
    """ε_high: the ratio is clipped at 1 + ε_high; dppo: how far a probability may rise"""
    dual_clip: Annotated[float, Meta(gt=1.0)] | None = 10.0
    """clip: bound of the ratio for negative advantages, at least 1 + clip_high; dppo: of every
    ratio; null: none"""
    sapo_temperature_positive: PositiveFloat = 1.0
    """steepness of the soft gate for positive advantages"""
    sapo_temperature_negative: PositiveFloat = 1.05
    """steepness of the soft gate for negative advantages"""
    loss_normalisation: Literal["token", "sequence", "fixed_length", "micro_batch"] = "token"
    """token: mean over all tokens; sequence: mean over responses of their means; fixed_length: sum
    over responses · fixed_length; micro_batch: mean over forward passes of their tokens' means, so
    it goes by actors.trainer.micro_batch_tokens and the number of ranks, as TRL's bnpo does"""
    fixed_length: Positive | None = None
    """tokens that each response counts as in fixed_length; null: student.sampling.max_new_tokens"""
    ratio: Literal["proximal", "behaviour"] = "proximal"
    """proximal: against the policy at the start of the step; behaviour: against the sampling
    policy"""
    prefix_share: Share = 0.4
    """α of the method prefix: share of a correct teacher response that the student goes on from"""
    jsd_beta: Share = 0.5
    """distillation: 0 is the forward KL, 1 the reverse KL, between them Jensen-Shannon"""
    teacher_order: Literal["cascade", "pool"] = "cascade"
    """ours, with more_teachers: cascade (the next one where the last failed) or pool (any one)"""
    truncated: Literal["count", "zero", "mask"] = "count"
    """student responses that were cut off: count (as graded), zero (reward 0) or mask (no loss)"""
    dynamic_sampling: bool = False
    """ours: leave out questions whose groups, reformulated too, are all right or all wrong"""
    merge_candidates: bool = False
    """ours: NCQ shows near-duplicate wrong responses once, with their count"""
    correction: Literal["none", "truncate", "mask"] = "truncate"
    """weight proximal/behaviour of each token: none, truncate or mask"""
    correction_cap: PositiveFloat = 2.0
    """largest weight of a token in that correction"""
    correction_floor: PositiveFloat | None = None
    """mask: smallest weight; tokens below it have no loss (IcePop)"""
    correction_level: Literal["token", "sequence"] = "token"
    """token: each token's own weight; sequence: the product of a response's"""
    entropy_coefficient: NonNegativeFloat = 0.0
    """weight of the entropy bonus; with entropy_target, what it begins with"""
    entropy_target: PositiveFloat | None = None
    """nats a token: the coefficient rises while the entropy is at most this, falls above it, and
    counts only at or below it; null: it is fixed"""
    entropy_step: PositiveFloat = 0.005
    """how far that coefficient moves after each update"""
    entropy_coefficient_max: PositiveFloat = 1.0
    """how far it may rise"""
    entropy_quantile: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    """share of a mini-batch's tokens, those of highest entropy, that keep the policy gradient"""
    kl_coefficient: NonNegativeFloat = 0.0
    """weight of the KL to the student that the run began with; 0: no second copy is loaded"""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """estimate of that KL, with r = policy/reference: log r, (log r)²/2, or 1/r - 1 + log r"""
    kl_correction: Literal["none", "importance", "straight_through"] = "none"
    """none; importance (times the probability ratio); straight_through (gradient of k2)"""
