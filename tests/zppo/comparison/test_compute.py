"""Tokens and FLOPs of a step, counted by hand on a window of two questions."""

from __future__ import annotations

import json
import random
from pathlib import Path

import msgspec
import numpy as np
import pytest

from zppo.algorithm.composition import (
    Composer,
    correct_teacher_responses,
    student_groups,
    tokens_of,
    train_group,
)
from zppo.algorithm.window import Window
from zppo.plan.model_folder import inspect_model
from zppo.records.flops import (
    PART_NAMES,
    Sizes,
    flops,
    multiplying,
    token_counts,
)
from zppo_protocol.samples import GroupSamples
from zppo_protocol.values import Usage

SIZES = Sizes(student=10, teacher=1000)


def trained(window: Window, composer: Composer = student_groups) -> list[int]:
    """Tokens of each group that a composer makes."""
    rng = random.Random(0)
    return [
        tokens_of(train_group(visit, composition))
        for visit in window.visits
        for composition in composer(visit, rng)
    ]


def text_only(texts: list[str], *usage: Usage) -> GroupSamples:
    """What a server's engine returns."""
    return GroupSamples(
        prompt_ids=np.zeros(0, np.int32),
        token_ids=np.zeros(0, np.int32),
        log_probs=np.zeros(0, np.float32),
        offsets=np.zeros(len(texts) + 1, np.int32),
        version_spans=np.zeros((0, 2), np.int32),
        texts=texts,
        finish_reasons=["stop"] * len(texts),
        usage=list(usage),
    )


def words(window: Window, *kinds: str) -> tuple[int, int]:
    """(prompt tokens, response tokens) of groups of these kinds; the fixture's prompts have 6
    tokens."""
    groups = [visit.plain for visit in window.visits if "plain" in kinds]
    groups += [
        visit.teacher for visit in window.visits if visit.teacher is not None and "teacher" in kinds
    ]
    groups += [
        r.group
        for visit in window.visits
        for r in visit.reformulations
        if r.group is not None and r.kind in kinds
    ]
    return 6 * len(groups), sum(
        len(text.split()) + 1 for group in groups for text in group.the_samples.texts
    )


def test_tokens_are_counted_by_who_reads_and_writes_them(window: Window) -> None:
    counts = token_counts(window, sum(trained(window)), scored=False)
    read, written = words(window, "plain", "bcq", "ncq")
    assert (counts["compute/student_read"], counts["compute/student_written"]) == (read, written)
    assert read == 4 * 6
    drawn = words(window, "teacher")
    assert (counts["compute/teacher_draws_read"], counts["compute/teacher_draws_written"]) == drawn
    assert counts["compute/trained"] == counts["compute/proximal"] == read + written
    assert counts["compute/teacher_scored"] == 0


def test_distillation_scores_what_is_trained_and_makes_no_proximal_pass(window: Window) -> None:
    learnt = trained(window, correct_teacher_responses)
    counts = token_counts(window, sum(learnt), scored=True)
    teacher = window.visits[0].teacher
    assert teacher is not None
    lengths = np.diff(teacher.the_samples.offsets)
    right = sum(int(lengths[i]) for i in teacher.indices(correct=True))
    assert counts["compute/trained"] == counts["compute/teacher_scored"] == 6 + right
    assert counts["compute/proximal"] == 0
    # The student still draws for the bookkeeping.
    assert counts["compute/student_written"] == words(window, "plain", "bcq", "ncq")[1]


def test_the_reference_of_a_kl_reads_what_is_trained(window: Window) -> None:
    plain = token_counts(window, sum(trained(window)), scored=False)
    held = token_counts(window, sum(trained(window)), scored=False, reference=True)
    assert held == plain | {"compute/reference": plain["compute/trained"]}
    sizes = Sizes(student=10, teacher=20)
    one, other = flops(plain, sizes), flops(held, sizes)
    assert one is not None and other is not None
    assert other["proximal"] - one["proximal"] == 20 * plain["compute/trained"]


def test_a_group_that_is_not_trained_still_costs_its_samples(window: Window) -> None:
    some = token_counts(window, trained(window)[0], scored=False)
    every = token_counts(window, sum(trained(window)), scored=False)
    assert some["compute/student_written"] == every["compute/student_written"]
    assert some["compute/trained"] < every["compute/trained"]


def test_what_leaves_no_group_is_spent_with_the_window(window: Window) -> None:
    teacher = window.visits[0].teacher
    assert teacher is not None
    for _ in range(2):
        window.spend(teacher.the_samples)
    window.spend(text_only(["yes"], Usage(completions=1, completion_tokens=7, prompt_tokens=50)))
    counts = token_counts(window, sum(trained(window)), scored=False)
    read, written = words(window, "teacher")
    assert counts["compute/teacher_other_read"] == 2 * read + 50
    assert counts["compute/teacher_other_written"] == 2 * written + 7


def test_spending_outlives_a_checkpoint(window: Window) -> None:
    teacher = window.visits[0].teacher
    assert teacher is not None
    window.spend(teacher.the_samples)
    fields = {"index": window.index, "visits": [], "phase": window.phase, "spent": window.spent}
    assert msgspec.convert(msgspec.to_builtins(fields), Window).spent == window.spent != {}


def test_a_server_counts_for_the_group(window: Window) -> None:
    samples = text_only(["a", "b"], Usage(completions=2, completion_tokens=30, prompt_tokens=12))
    assert (samples.read_tokens, samples.written_tokens) == (12, 30)
    silent = text_only(["a"], Usage(completions=1))
    assert (silent.read_tokens, silent.written_tokens) == (0, 0)


def test_a_teacher_that_failed_has_worked_too(window: Window) -> None:
    once = token_counts(window, sum(trained(window)), scored=False)
    teacher = window.visits[0].teacher
    assert teacher is not None
    window.visits[0].failed_teachers.append(teacher)
    twice = token_counts(window, sum(trained(window)), scored=False)
    for name in ("compute/teacher_draws_read", "compute/teacher_draws_written"):
        assert twice[name] == 2 * once[name] > 0


LINE = {
    "compute/student_read": 3,
    "compute/student_written": 7,
    "compute/teacher_draws_read": 1,
    "compute/teacher_draws_written": 2,
    "compute/teacher_other_read": 4,
    "compute/teacher_other_written": 1,
    "compute/teacher_scored": 6,
    "compute/proximal": 20,
    "compute/trained": 30,
}


def test_flops_follow_the_stated_formula() -> None:
    assert flops(LINE, SIZES) == {
        "student": 2 * 10 * (3 + 7),
        "teacher_draws": 2 * 1000 * (1 + 2),
        "teacher_other": 2 * 1000 * (4 + 1),
        "teacher_scores": 2 * 1000 * 6,
        "proximal": 2 * 10 * 20,
        "update": 6 * 10 * 30,
    }
    assert list(flops(LINE, SIZES) or ()) == list(PART_NAMES)


def test_a_step_without_counts_has_no_flops() -> None:
    assert flops({"step": 0, "tokens/generated": 5}, SIZES) is None


def test_a_teacher_of_unknown_size_matters_only_if_it_worked() -> None:
    assert flops(LINE, Sizes(student=10)) is None
    idle = {name: 0 if "teacher" in name else count for name, count in LINE.items()}
    assert flops(idle, Sizes(student=10)) is not None


@pytest.mark.parametrize(("tied", "expected"), [(True, 8), (False, 8 - 2 * 2), (None, 8 - 2 * 2)])
def test_an_input_embedding_of_its_own_does_not_multiply(
    small: Path, tied: bool | None, expected: int
) -> None:
    config = json.loads((small / "student/config.json").read_text()) | {
        "vocab_size": 2,
        "hidden_size": 2,
    }
    config |= {} if tied is None else {"tie_word_embeddings": tied}
    (small / "student/config.json").write_text(json.dumps(config))
    facts = inspect_model(small / "student", "student.model")
    assert (facts.parameters, multiplying(facts)) == (8, expected)
