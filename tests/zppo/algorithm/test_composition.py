"""Which rollouts are trained on: pure composers, and token streams that fit together."""

from __future__ import annotations

import copy
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from worlds import PROMPTS, mark, questions

from zppo.algorithm.composition import (
    Composer,
    Composition,
    all_same,
    correct_teacher_responses,
    gathered,
    student_groups,
    train_group,
    trained_members,
    with_teacher_response,
)
from zppo.algorithm.window import Group, Reformulation, Visit
from zppo_protocol.samples import GroupSamples, TokenScores
from zppo_protocol.support import support_of
from zppo_protocol.values import FROZEN, Grade, PictureReference

QUESTION = questions(1)[0]
COMPOSERS = [student_groups, with_teacher_response, correct_teacher_responses]


def group(
    kind: str, rewards: list[float], lengths: list[int] | None = None, version: int = 0
) -> Group:
    """Rollouts of the given lengths whose tokens are (kind, rollout, place) in one number; each has
    two versions.

    Without rewards: a group that the teacher could not be asked for.
    """
    if not rewards:
        return Group(id=f"0/q0/{kind}", kind=kind, prompt=PROMPTS.plain(QUESTION), grades=[])
    lengths = lengths if lengths is not None else [2 + i for i in range(len(rewards))]
    tokens = [
        mark(kind) % 1000 * 10_000 + 100 * i + k
        for i, length in enumerate(lengths)
        for k in range(length)
    ]
    half = [(length - length // 2, length // 2) for length in lengths]
    versions = [version, version if version == FROZEN else version + 1]
    spans = [[n, v] for pair in half for n, v in zip(pair, versions, strict=True) if n]
    samples = GroupSamples(
        prompt_ids=np.array([mark(kind)], np.int32),
        token_ids=np.array(tokens, np.int32),
        log_probs=-np.array(tokens, np.float32) / 1e9,
        offsets=np.cumsum([0, *lengths]).astype(np.int32),
        version_spans=np.array(spans, np.int32).reshape(-1, 2),
        texts=[f"{kind} {i}" for i in range(len(rewards))],
        finish_reasons=["length" if i % 2 else "stop" for i in range(len(rewards))],
    )
    grades = [Grade(reward=reward) for reward in rewards]
    return Group(
        id=f"0/q0/{kind}", kind=kind, prompt=PROMPTS.plain(QUESTION), samples=samples, grades=grades
    )


def visit(
    plain: list[float], teacher: list[float] | None, more: dict[str, list[float]] | None = None
) -> Visit:
    return Visit(
        question=QUESTION,
        origin="new",
        plain=group("plain", plain),
        teacher=group("teacher", teacher, version=FROZEN) if teacher is not None else None,
        reformulations=[
            Reformulation(kind=kind, candidates=[], group=group(kind, rewards))
            for kind, rewards in (more or {}).items()
        ],
    )


def ids(composition: Composition) -> list[tuple[str, int]]:
    return [(g.kind, i) for g, i in composition.members]


rewards = st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=6)


@settings(deadline=None)
@given(
    plain=rewards,
    teacher=st.none() | rewards,
    more=st.dictionaries(st.sampled_from(["bcq", "ncq"]), rewards),
    composer=st.sampled_from(COMPOSERS),
    seed=st.integers(0, 99),
)
def test_composers_are_pure(
    plain: list[float],
    teacher: list[float] | None,
    more: dict[str, list[float]],
    composer: Composer,
    seed: int,
) -> None:
    seen = visit(plain, teacher, more)
    before = copy.deepcopy(seen)
    first = composer(seen, random.Random(seed))
    second = composer(seen, random.Random(seed))
    assert [(c.id, c.kind, ids(c)) for c in first] == [(c.id, c.kind, ids(c)) for c in second]
    assert repr(seen) == repr(before), "a composer changes nothing"
    assert len({c.id for c in first}) == len(first)


def test_the_students_groups_are_trained_whole_and_apart() -> None:
    seen = visit([0.0, 1.0], [1.0], {"bcq": [1.0, 1.0], "ncq": [0.0, 0.0]})
    composed = student_groups(seen, random.Random(0))
    assert [c.id for c in composed] == ["0/q0/plain", "0/q0/bcq", "0/q0/ncq"]
    assert [ids(c) for c in composed] == [
        [(kind, 0), (kind, 1)] for kind in ("plain", "bcq", "ncq")
    ]
    assert [c.rewards.tolist() for c in composed] == [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]


def test_a_correct_teacher_response_takes_the_place_of_a_wrong_rollout() -> None:
    seen = visit([0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0])
    drawn: Counter[tuple[int, int]] = Counter()
    for seed in range(1200):
        [composed] = with_teacher_response(seen, random.Random(seed))
        assert (
            composed.id == "0/q0/plain" and composed.kind == "plain" and len(composed.members) == 4
        )
        [place] = [i for i, (g, _) in enumerate(composed.members) if g is seen.teacher]
        assert composed.rewards.tolist() == [float(i in (1, place)) for i in range(4)]
        drawn[place, composed.members[place][1]] += 1
    assert set(drawn) == {(place, right) for place in (0, 2, 3) for right in (1, 2)}
    assert all(140 < count < 260 for count in drawn.values()), (
        "each of 6 is drawn 200 times of 1200"
    )


@pytest.mark.parametrize(
    ("plain", "teacher"),
    [([0.0, 1.0], None), ([0.0, 1.0], [0.0, 0.0]), ([1.0, 1.0], [1.0]), ([0.0, 0.0], [])],
)
def test_without_a_right_and_a_wrong_one_nothing_is_replaced(
    plain: list[float], teacher: list[float] | None
) -> None:
    [composed] = with_teacher_response(visit(plain, teacher), random.Random(0))
    assert ids(composed) == [("plain", 0), ("plain", 1)]


def test_off_distillation_trains_the_correct_teacher_responses_alone() -> None:
    [composed] = correct_teacher_responses(
        visit([1.0, 0.0], [0.0, 1.0, 0.0, 1.0]), random.Random(0)
    )
    assert (composed.id, composed.kind) == ("0/q0/teacher", "teacher")
    assert ids(composed) == [("teacher", 1), ("teacher", 3)] and composed.rewards.tolist() == [
        1.0,
        1.0,
    ]


@pytest.mark.parametrize("teacher", [None, [], [0.0, 0.0]])
def test_off_distillation_trains_nothing_without_a_correct_response(
    teacher: list[float] | None,
) -> None:
    assert correct_teacher_responses(visit([1.0, 1.0], teacher), random.Random(0)) == []


@pytest.mark.parametrize(
    ("groups", "same"),
    [
        ([], True),
        ([[0.0, 0.0]], True),
        ([[0.0, 0.0], [1.0, 1.0]], True),
        ([[0.0, 0.0], [1.0, 0.0]], False),
        ([[1.0, 0.0], [1.0, 1.0]], False),
    ],
)
def test_all_same_looks_at_each_group_by_itself(groups: list[list[float]], same: bool) -> None:
    compositions = [student_groups(visit(rewards, None), random.Random(0))[0] for rewards in groups]
    assert all_same(compositions) == same


# ---- token streams -------------------------------------------------------------------------------


def versions(samples: GroupSamples) -> list[list[int]]:
    """Versions of every token, by rollout."""
    all_T = np.repeat(samples.version_spans[:, 1], samples.version_spans[:, 0])
    return [part.tolist() for part in np.split(all_T, samples.offsets[1:-1])]


@pytest.mark.parametrize("composer", COMPOSERS)
def test_pictures_are_those_that_the_student_was_shown(composer: Composer) -> None:
    """Also where a teacher, whose processor makes other tokens of them, wrote what is trained."""
    seen = visit([0.0, 1.0, 0.0], [1.0, 0.0], {"bcq": [0.0, 1.0]})
    pictures = [PictureReference(path="/a.png", sha256="0" * 64, width=8, height=8)]
    for one in (seen.plain, seen.teacher, *(part.group for part in seen.reformulations)):
        assert one is not None
        one.prompt = structs.replace(one.prompt, media=pictures)
        count = 2 if one is seen.teacher else 1
        ids = np.zeros(4, np.int32)
        one.samples = structs.replace(one.the_samples, prompt_ids=ids, media_tokens=[count])
    composed = composer(seen, random.Random(0))
    assert composed
    for group in (train_group(seen, one) for one in composed):
        assert group.media == pictures and group.samples.media_tokens == [1]


def test_the_teachers_tokens_keep_their_version_in_the_students_group() -> None:
    seen = visit([0.0, 1.0, 1.0], [1.0])
    [composed] = with_teacher_response(seen, random.Random(0))
    samples = gathered(seen, composed)
    assert versions(samples) == [[-1, -1], [0, 0, 1], [0, 0, 1, 1]]
    assert samples.prompt_ids.tolist() == [mark("plain")], "behind the prompt that the student read"
    assert samples.offsets.tolist() == [0, 2, 5, 9] and samples.texts == []
    assert samples.finish_reasons == ["stop", "length", "stop"]


def test_what_a_teacher_wrote_has_no_support_in_the_students_group() -> None:
    seen = visit([0.0, 1.0, 1.0], [1.0])
    own = seen.plain.the_samples
    rows = [np.array([int(token), 10**7], np.int32) for token in own.token_ids]
    seen.plain.samples = structs.replace(own, support=support_of(rows))
    [composed] = with_teacher_response(seen, random.Random(0))
    support = gathered(seen, composed).support
    assert support is not None and support.lengths_T.tolist() == [0, 0, *[2] * 7]
    assert support.ids[::2].tolist() == own.token_ids[2:].tolist()


def test_off_distillation_reads_the_students_prompt() -> None:
    seen = visit([0.0, 0.0], [1.0, 1.0])
    [composed] = correct_teacher_responses(seen, random.Random(0))
    samples = gathered(seen, composed)
    assert samples.prompt_ids.tolist() == [mark("plain")]
    assert versions(samples) == [[-1, -1], [-1, -1, -1]]


def test_a_whole_group_is_sent_as_it_was_sampled() -> None:
    seen = visit([0.0, 1.0], None)
    [composed] = student_groups(seen, random.Random(0))
    samples = gathered(seen, composed)
    assert samples.token_ids is seen.plain.the_samples.token_ids, "no copy"
    assert samples.texts == []


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=2, max_size=5),
    others=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    data=st.data(),
)
def test_members_keep_their_tokens_log_probs_and_versions(
    lengths: list[int], others: list[int], data: st.DataObject
) -> None:
    seen = visit([0.0] * len(lengths), [1.0] * len(others))
    seen.plain = group("plain", [0.0] * len(lengths), lengths)
    seen.teacher = group("teacher", [1.0] * len(others), others, version=FROZEN)
    pool = [(g, i) for g in (seen.plain, seen.teacher) for i in range(len(g.rewards))]
    chosen = data.draw(st.lists(st.sampled_from(range(len(pool))), min_size=1, unique=True))
    composed = Composition(id="0/q0/plain", kind="plain", members=[pool[i] for i in chosen])
    samples = gathered(seen, composed)
    for place, (source, index) in enumerate(composed.members):
        for name in ("token_ids", "log_probs"):
            assert rollout(samples, place, name) == rollout(source.the_samples, index, name)
        assert versions(samples)[place] == versions(source.the_samples)[index]


def rollout(samples: GroupSamples, index: int, name: str) -> list[float]:
    return getattr(samples, name)[samples.offsets[index] : samples.offsets[index + 1]].tolist()


def test_the_trainer_gets_the_scores_of_the_composed_group() -> None:
    seen = visit([0.0, 1.0], None)
    [composed] = student_groups(seen, random.Random(0))
    assert train_group(seen, composed).scores is None
    tokens = len(seen.plain.the_samples.token_ids)
    seen.scores["0/q0/plain"] = TokenScores(
        np.zeros((tokens, 1), np.int32), np.full((tokens, 1), -1.0, np.float32)
    )
    sent = train_group(seen, composed)
    assert sent.scores is seen.scores["0/q0/plain"]
    assert (sent.group_id, sent.question_id, sent.kind) == ("0/q0/plain", "q0", "plain")
    assert sent.rewards.tolist() == [0.0, 1.0]


def test_trained_members_names_every_rollout_that_is_trained_on() -> None:
    seen = visit([0.0, 1.0], [1.0, 0.0])
    composed = with_teacher_response(seen, random.Random(0))
    assert trained_members(composed) == {("0/q0/teacher", 0), ("0/q0/plain", 1)}
