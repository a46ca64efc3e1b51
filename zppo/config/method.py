"""`method`: which method, and the recipe all methods share. Defaults are Table 8 of the paper."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from zppo.config.base import Config, NonNegativeFloat, Positive, PositiveFloat, Share


class MethodConfig(Config, frozen=True, kw_only=True):
    """Which method, and the recipe all methods share (paper §3, Table 8, Fig. 6)."""

    name: str = "zppo"
    """zppo, grpo, grpo_replay, grpo_both, grpo_replay_bcq, grpo_replay_ncq,
    grpo_replay_teacher_response, hint, prefix, off_distill, off_distill_replay, on_distill or
    on_distill_replay

    Or one of your own: package.module:name, ./file.py:name, or a name that a package announces
    (docs/extending.md)."""
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
    advantage: Literal["norm_without_zero", "norm_with_zero", "center_only", "grpo"] = (
        "norm_without_zero"
    )
    """norm_without_zero (Eqs. 2-3), norm_with_zero, center_only, or grpo (Eq. 1)"""
    advantage_scope: Literal["minibatch", "step"] = "minibatch"
    """what the advantage is normalised over: minibatch or step"""
    clip_low: Share = 0.20
    """ε_low: the probability ratio is clipped at 1 - ε_low"""
    clip_high: NonNegativeFloat = 0.28
    """ε_high: the probability ratio is clipped at 1 + ε_high"""
    dual_clip: Annotated[float, Meta(gt=1.0)] | None = 10.0
    """bound of the ratio for negative advantages, at least 1 + clip_high; null: none"""
    loss_normalisation: Literal["token", "sequence"] = "token"
    """token: mean over all tokens; sequence: mean over responses of their means"""
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
