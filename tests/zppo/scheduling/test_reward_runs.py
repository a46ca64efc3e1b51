"""Continuous rewards of several parts, some of which cannot be had, through whole scripted runs:
who is trained on, what is hard and what graduates, against longhand."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from worlds import Fake, World, questions, topology

from zppo.algorithm.window import Group
from zppo.config.rewards import REWARD, REWARD_AND_TEACHER, rule_of
from zppo.prompting.prompts import Prompt
from zppo.scheduling import events
from zppo.scheduling.heldout import Evaluation
from zppo_kernels import group_advantages
from zppo_protocol.messages import GenerateTask, GradeTask
from zppo_protocol.values import Grade

CORRECT, RUBRIC = 0.4, 0.5


def parts_of(group: str, index: int) -> tuple[float, float] | None:
    """The two parts of a reward, or None where it raises."""
    rng = random.Random(f"{group}/{index}")
    if rng.random() < (1.0 if rng.random() < 0.1 else 0.15):
        return None
    return rng.uniform(-1.0, 1.0), rng.choice([0.0, 1.0])


class RewardWorld(World):
    """Graders whose rewards are numbers, and raise; a teacher that scores by a rubric, and may fall
    silent."""

    def answer(self, actor: Fake, message: Any, versions: list[int]) -> events.Answer:
        said = super().answer(actor, message, versions)
        if isinstance(message, GradeTask):
            assert isinstance(said, events.Graded)
            group = message.task_id.removesuffix("/grade")
            only = rule_of(message.grader)[1]
            grades = [self.graded(group, i, g, only) for i, g in enumerate(said.grades)]
            return structs.replace(said, grades=grades)
        if isinstance(message, GenerateTask) and message.kind == "judge":
            assert isinstance(said, events.Sampled)
            word = self.score(message.task_id)
            return structs.replace(said, samples=structs.replace(said.samples, texts=[word]))
        return said

    @property
    def rubric(self) -> bool:
        return any(part.of_teacher for part in self.scheduler.recipe.reward)

    def graded(self, group: str, index: int, grade: Grade, only: str) -> Grade:
        """As a grading worker answers, which has nothing to say where the rubric alone counts."""
        if only == "rubric":
            return structs.replace(grade, reward=0.0)
        parts = parts_of(group, index)
        if parts is None:
            return structs.replace(grade, reward=0.0, note="raised", failed=True)
        if only:
            return structs.replace(grade, reward=parts[0], parts={"a": parts[0]})
        value = 0.0 if self.rubric else 0.75 * parts[0] + 0.25 * parts[1]
        named = {"a": parts[0], "b": parts[1]}
        return structs.replace(grade, reward=value, parts=named)

    @staticmethod
    def score(task_id: str) -> str:
        silent = random.Random(task_id).random() < 0.1
        return "I cannot say" if silent else f'{{"score": {RUBRIC}}}'


def value_of(group: Group, index: int, rubric: bool, only: str) -> float | None:
    """Longhand: what a rollout earns, None if that cannot be had; `only` is the part that its
    question's row names."""
    silent = "cannot" in RewardWorld.score(f"{group.id}/judge-{index}")
    if only == "rubric":
        return None if silent else RUBRIC
    parts = parts_of(group.id, index)
    if parts is None or (rubric and silent and not only):
        return None
    if only:
        return parts[0]
    teacher = Fraction(RUBRIC) if rubric else Fraction(0)
    return float(Fraction(0.75) * Fraction(parts[0]) + Fraction(parts[1]) / 4 + teacher)


def world_of(
    seed: int, method: str, rubric: bool, *, whole: bool = False, **rates: float
) -> RewardWorld:
    """A world in which rows may name one part of the reward, or none of them does (`whole`)."""
    rng = random.Random(seed)
    reward: list[dict[str, Any]] = [
        {"use": "m:a", "weight": 0.75},
        {"use": "m:b", "weight": 0.25},
    ]
    if rubric:
        reward.append({"use": "rubric", "weight": 1.0, "args": {"rubric": "Be clear."}})
    config = topology(
        data={"train": "t", "reward": reward},
        method={
            "name": method,
            "group_size": rng.choice([2, 4]),
            "teacher_group_size": 2,
            "hard_threshold": rng.choice([0.25, 0.5, 0.75]),
            "correct_reward": CORRECT,
        },
        scheduler={
            "new_questions": rng.randint(1, 5),
            "rho_replay": 0.5,
            "rho_aug": 1.0,
            "max_staleness": rng.randint(0, 2),
            "max_attempts": 1000,
            "lease_seconds": 50.0,
            "buffer_capacity": 50,
        },
        run={"epochs": 2},
    )
    graders = [f"{REWARD}:a", REWARD_AND_TEACHER if rubric else REWARD]
    graders += [f"{REWARD_AND_TEACHER}:rubric"] if rubric else []
    corpus = [
        structs.replace(q, grader=rng.choice(graders[1:] if whole else graders))
        for q in questions(rng.randint(3, 12))
    ]
    return RewardWorld(config, corpus, seed=seed, **rates)


def test_an_evaluation_counts_what_failed_neither_as_right_nor_as_wrong() -> None:
    right, wrong = Grade(reward=1.0), Grade(reward=0.25)
    failed = Grade(reward=0.0, note="raised", failed=True)

    def evaluation(**grades: list[Grade]) -> Evaluation:
        prompt = Prompt(messages=[])
        groups = [Group(id=q, kind="evaluate", prompt=prompt, grades=g) for q, g in grades.items()]
        return Evaluation(step=3, groups=groups, question_ids=list(grades))

    result = evaluation(a=[right, failed], b=[failed, failed], c=[right, wrong]).result()
    assert result is not None and result.by_question == {"a": 1.0, "c": 0.5}
    assert (result.accuracy, result.questions, result.samples) == (0.75, 2, 3)
    assert evaluation(b=[failed, failed]).result() is None


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    method=st.sampled_from(["zppo", "grpo_replay_teacher_response", "off_distill", "hint"]),
    rubric=st.booleans(),
)
def test_what_fails_is_left_out_and_the_rest_goes_by_value_and_threshold(
    seed: int, method: str, rubric: bool
) -> None:
    rates = {"crash_rate": 0.03, "failure_rate": 0.05}
    world = world_of(seed, method, rubric, **rates)
    world.run()
    new = Counter(v.question.id for t in world.steps for v in t.window.visits if v.origin == "new")
    assert set(new.values()) == {2} and len(new) == len(world.corpus), "once in each pass"
    for trained in world.steps:
        check_step(world, trained, rubric)


def check_step(world: RewardWorld, trained: events.Trained, rubric: bool) -> None:
    """One trained window against longhand: its groups, what was shown, and the fates."""
    tau = world.topology.method.hard_threshold
    [sent] = [window for window in world.sent if window.step == trained.window.index][-1:]
    assert [g.group_id for g in sent.groups] == [c.id for _, c in trained.composed]
    assert trained.tokens == sum(len(g.samples.prompt_ids) for g in sent.groups) + sum(
        int(g.samples.offsets[-1]) for g in sent.groups
    )
    for group, (visit, composition) in zip(sent.groups, trained.composed, strict=True):
        only = rule_of(visit.question.grader)[1]
        values = [value_of(of, index, rubric, only) for of, index in composition.members]
        assert None not in values and values, "a rollout without a reward is trained on"
        np.testing.assert_array_equal(group.rewards, np.array(values, np.float32))
        assert (group.reward_parts is None) == bool(only)
        if group.reward_parts is not None:
            assert group.reward_parts.shape == (len(values), 3 if rubric else 2)
    fates = {fate.question_id: fate for fate in trained.fates if fate.fate != "evicted"}
    for visit in trained.window.visits:
        only = rule_of(visit.question.grader)[1]
        count = len(visit.plain.the_grades)
        known = [value_of(visit.plain, i, rubric, only) for i in range(count)]
        right = [value >= CORRECT for value in known if value is not None]
        accuracy = sum(right) / len(right) if right else None
        hard = accuracy is not None and accuracy < tau
        if visit.teacher is not None and world.method.teacher_draws == "hard":
            assert hard
        for reformulation in visit.reformulations:
            assert hard
            for shown in reformulation.candidates:
                of = visit.plain if shown.source == "student" else visit.teacher
                assert of is not None
                earned = value_of(of, shown.index, rubric, only)
                assert earned is not None and shown.correct == (earned >= CORRECT)
        if world.method.replay:
            fate = fates[visit.question.id].fate
            allowed = {"admitted", "kept"} if hard else {"graduated", "none"}
            assert fate in (allowed if accuracy is not None else {"kept", "none"})


def test_advantages_of_a_continuous_reward_are_the_formula_in_float64() -> None:
    """Eq. 1 to 3 in plain Python over the groups that a run sends, with what failed left out."""
    worlds = [world_of(seed, "zppo", rubric=False, whole=True) for seed in range(5)]
    seen = 0
    for window in (window for world in worlds for window in world.run().sent):
        rewards = [group.rewards.astype(np.float64) for group in window.groups]
        flat = np.concatenate(rewards) if rewards else np.zeros(0)
        ids = np.repeat(np.arange(len(rewards)), [len(r) for r in rewards])
        live = [r for r in rewards if r.max() > r.min()]
        if not live:
            continue
        centred = np.concatenate([r - r.sum() / len(r) for r in live])
        mean = centred.sum() / len(centred)
        std = (((centred - mean) ** 2).sum() / len(centred)) ** 0.5
        expected = np.concatenate(
            [(r - r.mean() - mean) / (std + 1e-6) if r.max() > r.min() else 0 * r for r in rewards]
        )
        got = group_advantages(
            torch.from_numpy(flat.astype(np.float32)),
            torch.from_numpy(ids),
            mode="norm_without_zero",
        )
        np.testing.assert_allclose(got.numpy(), expected, rtol=2e-5, atol=2e-6)
        seen += len(flat)
    assert seen > 50
