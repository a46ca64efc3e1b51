"""On-policy distillation with the replay buffer (Algorithm 3, †)."""

from msgspec import structs

from zppo.algorithm.methods.on_distill import METHOD as ON_DISTILL

METHOD = structs.replace(
    ON_DISTILL,
    name="on_distill_replay",
    title="On-Distill†",
    summary="the student's responses, rescored by the teacher, hard questions come back",
    replay=True,
)
