"""GRPO† + Hint (Algorithm 5): hard questions once more, with a hint that the teacher writes from a
correct response."""

from zppo.algorithm.methods.base import Method
from zppo.algorithm.reformulations import Hint

METHOD = Method(
    name="hint",
    title="GRPO† + Hint",
    summary="plain prompts and prompts with a hint, hard questions come back",
    replay=True,
    teacher_draws="selected",
    reformulations=(Hint(),),
)
