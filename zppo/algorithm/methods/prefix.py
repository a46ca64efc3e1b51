"""GRPO† + Prefix (Algorithm 6): the student goes on from the beginning of a correct teacher
response, which is masked out of the loss.
"""

from zppo.algorithm.methods.base import Method
from zppo.algorithm.reformulations import Prefix

METHOD = Method(
    name="prefix",
    title="GRPO† + Prefix",
    summary="plain prompts and continuations of teacher responses, hard questions come back",
    replay=True,
    teacher_draws="selected",
    reformulations=(Prefix(),),
)
