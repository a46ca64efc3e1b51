"""GRPO† + BCQ (ablation)."""

from zppo.algorithm.methods.base import Method
from zppo.algorithm.reformulations import BinaryCandidateIncluded

METHOD = Method(
    name="grpo_replay_bcq",
    title="GRPO† + BCQ",
    summary="plain and BCQ prompts, hard questions come back",
    replay=True,
    teacher_draws="hard",
    reformulations=(BinaryCandidateIncluded(),),
)
