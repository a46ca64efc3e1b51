"""Which rollouts of a visit are trained on, and in which groups (Algorithm 1, step 6, and its
variants).

A *composer* looks at a visit whose groups are all graded and says which of their rollouts form
which groups. Each group has its own id and with it its own baseline. Composers are pure: what
chance decides comes from the given generator.

Rollouts of a teacher keep the version FROZEN on every token: the trainer then knows that no policy
sampled them. They have no support, so their loss is over the whole vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import numpy as np
from msgspec import Struct, structs

from zppo.algorithm.window import Group, Visit
from zppo_protocol.samples import GroupSamples, TrainGroup
from zppo_protocol.support import Support, joined
from zppo_protocol.values import Media


class Composition(Struct, frozen=True, kw_only=True):
    """One group to train: `members` are (group, index of the rollout in it)."""

    id: str
    kind: str
    members: list[tuple[Group, int]]

    @property
    def rewards(self) -> np.ndarray:
        """[N] float32."""
        rewards = [group.the_grades[index].reward for group, index in self.members]
        return np.array(rewards, dtype=np.float32)

    def parts_NK(self, names: Sequence[str]) -> np.ndarray | None:
        """The parts of these names of each reward, [N, K] float32; None where the question's row
        has a rule of its own in place of them."""
        if not names:
            return None
        parts = [group.the_grades[index].parts for group, index in self.members]
        if not all(name in part for part in parts for name in names):
            return None
        return np.array([[part[name] for name in names] for part in parts], dtype=np.float32)


Composer: TypeAlias = Callable[[Visit, random.Random], list[Composition]]


def student_groups(visit: Visit, rng: random.Random) -> list[Composition]:
    """Everything the student sampled, and nothing else: plain, BCQ and NCQ rollouts in three groups
    (Algorithm 1)."""
    return [_whole(group) for group in visit.student_groups()]


def with_teacher_response(visit: Visit, rng: random.Random) -> list[Composition]:
    """A correct teacher response stands in the plain group in the place of a wrong rollout, as if
    the student had written it (GRPO† + teacher response). Without a correct one, or on a question
    that is not hard: the plain group."""
    right = visit.teacher.indices(correct=True) if visit.teacher is not None else []
    wrong = visit.plain.indices(correct=False)
    if visit.teacher is None or not right or not wrong:
        return student_groups(visit, rng)
    plain, *others = student_groups(visit, rng)
    plain.members[rng.choice(wrong)] = (visit.teacher, rng.choice(right))
    return [plain, *others]


def correct_teacher_responses(visit: Visit, rng: random.Random) -> list[Composition]:
    """The correct ones of the G_T teacher responses, if there are any (off-policy distillation,
    Algorithm 2)."""
    right = visit.teacher.indices(correct=True) if visit.teacher is not None else []
    if visit.teacher is None or not right:
        return []
    members = [(visit.teacher, index) for index in right]
    return [Composition(id=visit.teacher.id, kind=visit.teacher.kind, members=members)]


def without_failed(composition: Composition) -> Composition:
    """The group without the rollouts whose reward could not be had; perhaps without any."""
    failed = [group.the_grades[index].failed for group, index in composition.members]
    if not any(failed):
        return composition
    members = [member for member, out in zip(composition.members, failed, strict=True) if not out]
    return structs.replace(composition, members=members)


def all_same(compositions: list[Composition]) -> bool:
    """Whether all rewards of every group are the same, so that none of them has an advantage."""
    return all(len(set(composition.rewards.tolist())) <= 1 for composition in compositions)


def trained_members(compositions: Iterable[Composition]) -> set[tuple[str, int]]:
    """(group id, index) of every rollout that is trained on."""
    return {
        (group.id, index) for composition in compositions for group, index in composition.members
    }


def train_group(visit: Visit, composition: Composition, parts: Sequence[str] = ()) -> TrainGroup:
    """What the trainer gets: token streams and rewards, no texts; the remote teacher's scores if
    there are any, and the `parts` of the rewards."""
    asked = _asked(visit, composition)
    return TrainGroup(
        group_id=composition.id,
        media=asked.prompt.media,
        question_id=visit.question.id,
        kind=composition.kind,
        samples=_gathered(asked, composition),
        rewards=composition.rewards,
        scores=visit.scores.get(composition.id),
        reward_parts=composition.parts_NK(parts),
    )


def gathered(visit: Visit, composition: Composition) -> GroupSamples:
    """The members' token streams end to end, behind the prompt that the student read."""
    return _gathered(_asked(visit, composition), composition)


def _gathered(asked: Group, composition: Composition) -> GroupSamples:
    if _is_all_of(composition, asked):
        return asked.the_samples.without_texts()
    parts = [_rollout(group.the_samples, index) for group, index in composition.members]
    return GroupSamples(
        prompt_ids=asked.the_samples.prompt_ids,
        token_ids=np.concatenate([ids_T for ids_T, _, _, _ in parts]),
        log_probs=np.concatenate([log_probs_T for _, log_probs_T, _, _ in parts]),
        offsets=np.cumsum([0, *(len(ids_T) for ids_T, _, _, _ in parts)]).astype(np.int32),
        version_spans=_run_lengths(np.concatenate([versions_T for _, _, versions_T, _ in parts])),
        texts=[],
        finish_reasons=[
            group.the_samples.finish_reasons[index] for group, index in composition.members
        ],
        support=joined([(support, len(ids_T)) for ids_T, _, _, support in parts]),
        media_tokens=asked.the_samples.media_tokens,
    )


def asked_media(visit: Visit, composition: Composition) -> list[Media]:
    """Pictures and videos of the prompt that the student read."""
    return _asked(visit, composition).prompt.media


def tokens_of(group: TrainGroup) -> int:
    """Its tokens: those of the prompt once, and those of all responses."""
    return len(group.samples.prompt_ids) + len(group.samples.token_ids)


def _is_all_of(composition: Composition, group: Group) -> bool:
    """Whether its members are the rollouts of the group, all of them and in their order."""
    count = len(group.the_samples.offsets) - 1
    return composition.members == [(group, index) for index in range(count)]


def _asked(visit: Visit, composition: Composition) -> Group:
    """The group whose prompt the student read."""
    of_student = (group for group, _ in composition.members if group is not visit.teacher)
    return next(of_student, visit.plain)


def _whole(group: Group) -> Composition:
    members = [(group, index) for index in range(len(group.the_grades))]
    return Composition(id=group.id, kind=group.kind, members=members)


def _rollout(
    samples: GroupSamples, index: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Support | None]:
    """Token ids, log-probs and versions of one completion, [T] each, and the supports of its
    tokens."""
    part = slice(int(samples.offsets[index]), int(samples.offsets[index + 1]))
    support = None if samples.support is None else samples.support.part(part.start, part.stop)
    return samples.token_ids[part], samples.log_probs[part], samples.versions_T[part], support


def _run_lengths(versions_T: np.ndarray) -> np.ndarray:
    """[S, 2] int32: (token count, version)."""
    starts = np.flatnonzero(np.diff(versions_T, prepend=versions_T[:1] - 1))
    counts = np.diff(starts, append=len(versions_T))
    return np.stack([counts, versions_T[starts]], axis=1).astype(np.int32)
