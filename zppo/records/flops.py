"""What a step costs: tokens by who reads or writes them, and the FLOPs that follow from them by one
formula.

    sampling, teacher, proximal pass, reference of a KL   2 N a token
    update (forward and backward)                         6 N a token

N is the parameters that multiply: all of the model folder, tied weights once, without an input
embedding of its own. Left out are the products of attention with itself (they grow with length),
held-out evaluations, and work that died with an actor. Every token of a group in the loss counts,
also where this trainer saves a pass: where the advantage is 0, where responses begin alike, and
where the first update stands in for the proximal pass. A prompt counts once for each group, because
engines and trainer share it among the responses of the group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import Struct

from zppo.algorithm.window import Group, Window
from zppo.plan.model_folder import ModelFacts
from zppo_protocol.samples import GroupSamples

PART_NAMES = {
    "student": "student samples",
    "teacher_draws": "teacher answers",
    "teacher_other": "teacher prepares and judges",
    "teacher_scores": "teacher scores",
    "proximal": "proximal pass",
    "update": "updates",
}
"""Parts of a step's compute, in the order of the work, and how figures call them."""


class Sizes(Struct, frozen=True, kw_only=True):
    """Parameters that multiply, of student and teacher; None where no model folder tells (a server,
    no teacher)."""

    student: int
    teacher: int | None = None


def multiplying(facts: ModelFacts) -> int:
    """N of the formula. A tied embedding multiplies as the head."""
    return facts.parameters - (0 if facts.tied else facts.vocabulary * facts.hidden)


def token_counts(
    window: Window,
    trained: int,
    *,
    scored: bool,
    reference: bool = False,
) -> dict[str, float | int]:
    """The `compute/` metrics of a trained window. `trained` are the prompt and response tokens of
    the groups in the loss; `scored` says whether the teacher gives its distribution at these, in
    which case there is no proximal pass; `reference` whether the loss has a KL to a frozen
    student."""
    student = _samples(window.student_groups())
    teacher = _samples(group for visit in window.visits for group in visit.teacher_groups())
    return {
        "compute/student_read": sum(samples.read_tokens for samples in student),
        "compute/student_written": sum(samples.written_tokens for samples in student),
        "compute/teacher_draws_read": sum(samples.read_tokens for samples in teacher),
        "compute/teacher_draws_written": sum(samples.written_tokens for samples in teacher),
        "compute/teacher_other_read": window.spent.get("read", 0),
        "compute/teacher_other_written": window.spent.get("written", 0),
        "compute/teacher_scored": trained if scored else 0,
        "compute/proximal": 0 if scored else trained,
        "compute/trained": trained,
        **({"compute/reference": trained} if reference else {}),
    }


def flops(line: Mapping[str, float], sizes: Sizes) -> dict[str, float] | None:
    """FLOPs of one step by part, from its line of `metrics.jsonl`. None if the line has no counts,
    or if the teacher has worked and its size is not known."""
    if "compute/trained" not in line:
        return None
    tokens = {
        "teacher_draws": line["compute/teacher_draws_read"] + line["compute/teacher_draws_written"],
        "teacher_other": line["compute/teacher_other_read"] + line["compute/teacher_other_written"],
        "teacher_scores": line["compute/teacher_scored"],
    }
    if sizes.teacher is None and any(tokens.values()):
        return None
    student, teacher = 2.0 * sizes.student, 2.0 * (sizes.teacher or 0)
    return {
        "student": student * (line["compute/student_read"] + line["compute/student_written"]),
        **{part: teacher * count for part, count in tokens.items()},
        "proximal": student * (line["compute/proximal"] + line.get("compute/reference", 0)),
        "update": 3 * student * line["compute/trained"],
    }


def _samples(groups: Iterable[Group]) -> list[GroupSamples]:
    return [group.samples for group in groups if group.samples is not None]
