"""GRPO + Both: BCQ and NCQ without the replay buffer (ablation)."""

from zppo.algorithm.methods.base import Method
from zppo.algorithm.reformulations import BinaryCandidateIncluded, NegativeCandidateIncluded

METHOD = Method(
    name="grpo_both",
    title="GRPO + Both",
    summary="plain, BCQ and NCQ prompts",
    teacher_draws="hard",
    reformulations=(BinaryCandidateIncluded(), NegativeCandidateIncluded()),
)
