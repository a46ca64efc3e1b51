"""Off-policy distillation with the replay buffer (Algorithm 2, †)."""

from msgspec import structs

from zppo.algorithm.methods.off_distill import METHOD as OFF_DISTILL

METHOD = structs.replace(
    OFF_DISTILL,
    name="off_distill_replay",
    title="Off-Distill†",
    summary="correct teacher responses to every question, hard ones come back",
    replay=True,
)
