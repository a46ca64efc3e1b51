"""GRPO + Both: BCQ and NCQ without the replay buffer (ablation)."""

from zppo.methods.base import Method
from zppo.reformulations import BinaryCandidateIncluded, NegativeCandidateIncluded

METHOD = Method(
    name="grpo_both",
    summary="plain, BCQ and NCQ prompts",
    teacher_draws="hard",
    reformulations=(BinaryCandidateIncluded(), NegativeCandidateIncluded()),
)
