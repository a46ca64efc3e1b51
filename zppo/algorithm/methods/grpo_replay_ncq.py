"""GRPO† + NCQ (ablation): the teacher only compresses."""

from zppo.algorithm.methods.base import Method
from zppo.algorithm.reformulations import NegativeCandidateIncluded

METHOD = Method(
    name="grpo_replay_ncq",
    title="GRPO† + NCQ",
    summary="plain and NCQ prompts, hard questions come back",
    replay=True,
    reformulations=(NegativeCandidateIncluded(),),
)
