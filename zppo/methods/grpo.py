"""GRPO: plain prompts only, every question once."""

from zppo.methods.base import Method

METHOD = Method(
    name="grpo",
    summary="plain prompts",
)
