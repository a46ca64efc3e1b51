"""Off-policy distillation (Algorithm 2): towards the teacher's distribution on its own correct
responses.

The student still answers every question, which tells the hard ones, but its rollouts are not
trained on.
"""

from zppo.algorithm.composition import correct_teacher_responses
from zppo.algorithm.methods.base import Method

METHOD = Method(
    name="off_distill",
    title="Off-Distill",
    summary="correct teacher responses to every question",
    teacher_draws="all",
    composer=correct_teacher_responses,
    teacher_tokens=True,
    loss="jsd",
    updates_per_step=1,
)
