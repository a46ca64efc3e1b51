"""What a method has to say."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from zppo.reformulations import Reformulator


class Method(Struct, frozen=True, kw_only=True):
    """`replay`: hard questions come back from the buffer († in the paper). `teacher_draws`: on which questions the
    teacher answers afresh. `reformulations`: the rewritten prompts, in the order in which the post-cap admits them."""

    name: str
    summary: str
    replay: bool = False
    teacher_draws: Literal["none", "hard"] = "none"
    reformulations: tuple[Reformulator, ...] = ()

    @property
    def needs_teacher(self) -> bool:
        """Whether the method cannot run without a teacher model."""
        return self.teacher_draws != "none"

    @property
    def uses_teacher(self) -> bool:
        """Whether a teacher has work: drawing responses or compressing candidates."""
        return self.needs_teacher or bool(self.reformulations)
