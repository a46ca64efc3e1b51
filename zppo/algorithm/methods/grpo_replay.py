"""GRPO†: GRPO with the replay buffer of hard questions."""

from zppo.algorithm.methods.base import Method

METHOD = Method(
    name="grpo_replay",
    title="GRPO†",
    summary="plain prompts, hard ones come back",
    replay=True,
)
