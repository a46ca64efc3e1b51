"""GRPO: plain prompts only, every question once."""

from zppo.algorithm.methods.base import Method

METHOD = Method(
    name="grpo",
    title="GRPO",
    summary="plain prompts",
)
