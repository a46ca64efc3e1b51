"""What a method has to say."""

from __future__ import annotations

from typing import Literal, TypeAlias

from msgspec import Struct

from zppo.algorithm.composition import Composer, student_groups
from zppo.algorithm.reformulations import Reformulator

TeacherDraws: TypeAlias = Literal["none", "hard", "all", "selected"]
Loss: TypeAlias = Literal["clipped_surrogate", "jsd"]


class Method(Struct, frozen=True, kw_only=True):
    """One value per method; scheduler, trainer and actors read its fields and never its name.

    `title`: the name in tables. `replay`: hard questions come back from the buffer († in the
    paper). `teacher_draws`: on which questions the teacher answers afresh; "selected" are the
    ⌊ρ_aug·|X_new|⌋ hardest, chosen before the teacher is asked. `reformulations`: the rewritten
    prompts, in the order in which the post-cap admits them. `composer`: which rollouts of a visit
    are trained on, and in which groups; `teacher_tokens`: whether the teacher's own are among them.
    `loss`: what they enter; "jsd" is the divergence to the teacher's distribution (Algorithms 2 and
    3). `updates_per_step`: gradient updates in a step, None for I of the topology.
    """

    name: str
    title: str
    summary: str
    replay: bool = False
    teacher_draws: TeacherDraws = "none"
    reformulations: tuple[Reformulator, ...] = ()
    composer: Composer = student_groups
    teacher_tokens: bool = False
    loss: Loss = "clipped_surrogate"
    updates_per_step: int | None = None

    @property
    def needs_teacher(self) -> bool:
        """Whether the method cannot run without a teacher model."""
        return self.teacher_draws != "none" or self.needs_scores

    @property
    def needs_scores(self) -> bool:
        """Whether the teacher's distribution is needed at the tokens that are trained."""
        return self.loss == "jsd"

    @property
    def needs_same_vocabulary(self) -> bool:
        """Whether token ids of student and teacher must mean the same."""
        return self.teacher_tokens or self.needs_scores

    @property
    def asks_teacher(self) -> bool:
        """Whether teacher processes have work: drawing responses, or preparing candidates."""
        return self.teacher_draws != "none" or bool(self.reformulations)
