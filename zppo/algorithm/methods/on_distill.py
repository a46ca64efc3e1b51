"""On-policy distillation (Algorithm 3): towards the teacher's distribution on the student's own
responses."""

from zppo.algorithm.methods.base import Method

METHOD = Method(
    name="on_distill",
    title="On-Distill",
    summary="the student's responses, rescored by the teacher",
    loss="jsd",
    updates_per_step=1,
)
