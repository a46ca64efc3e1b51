"""ZPPO (Algorithm 1): GRPO† + BCQ + NCQ. The teacher stands in the prompt, never in the
gradient."""

from zppo.algorithm.methods.base import Method
from zppo.algorithm.reformulations import BinaryCandidateIncluded, NegativeCandidateIncluded

METHOD = Method(
    name="zppo",
    title="ZPPO",
    summary="plain, BCQ and NCQ prompts, hard questions come back",
    replay=True,
    teacher_draws="hard",
    reformulations=(BinaryCandidateIncluded(), NegativeCandidateIncluded()),
)
