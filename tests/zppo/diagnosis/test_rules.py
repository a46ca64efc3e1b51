"""Each rule on a run made sick in its way, on a healthy one, and on one that got well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zppo.config.load import setting_names
from zppo.config.topology import RunConfig
from zppo.diagnosis.evidence import Advisory, Evidence
from zppo.diagnosis.rules import RULES, advisories, silences
from zppo.diagnosis.thresholds import LIMITS

Line = dict[str, Any]
Change = Callable[[int], Line]
STEPS = 20


def healthy(step: int) -> Line:
    """A step of a run that is well: near what examples/quickstart.yaml measures."""
    return {
        "step": step, "time/step": 2.0, "time/trainer_wait": 0.2, "time/rollout_idle": 0.4,
        "time/grader_busy": 0.3, "accuracy/plain": 0.5, "accuracy/teacher": 0.95,
        "accuracy/bcq": 0.6, "length/truncated": 0.01, "answers/missing": 0.02,
        "answers/timed_out": 0.0, "window/new": 32, "window/hard": 16, "window/bcq": 8,
        "window/ncq": 8, "tasks/answered/teacher": 40, "tasks/answered/rollout": 80,
        "audit/plain/mixed": 0.5, "audit/bcq/mixed": 0.5, "audit/ncq/mixed": 0.3,
        "audit/bcq/picked_first": 0.5, "audit/bcq/picked_first_right_first": 0.7,
        "audit/bcq/picked_first_right_second": 0.3, "audit/bcq/picked_first_short": 0.55,
        "audit/bcq/picked_first_long": 0.45, "train/live_rollout_share": 0.4, "train/updates": 2,
        "train/updates_skipped": 0, "train/entropy": 0.07, "train/mismatch_kl": 0.005,
    }  # fmt: skip


def run_of(change: Change = lambda step: {}, steps: int = STEPS, **settings: Any) -> Evidence:
    return Evidence.of([{**healthy(step), **change(step)} for step in range(steps)], **settings)


def always(**values: float) -> Change:
    """`train__updates=0` -> train/updates is 0 at every step."""
    line = {name.replace("__", "/"): value for name, value in values.items()}
    return lambda step: line


def found(evidence: Evidence) -> dict[str, str]:
    return {advisory.rule: advisory.severity for advisory in advisories(evidence)}


SILENT = {"tasks/answered/teacher": 0, "tasks/given_up/teacher": 20, "tasks/failed/teacher/x": 100}


def picks(short: float, long: float, right_first: float, right_second: float) -> Change:
    """Shares of picks of the first candidate, at every step."""
    return always(
        audit__bcq__picked_first_short=short,
        audit__bcq__picked_first_long=long,
        audit__bcq__picked_first_right_first=right_first,
        audit__bcq__picked_first_right_second=right_second,
    )


SICK: list[tuple[str, str, Change]] = [
    ("cut_off", "warning", always(length__truncated=0.6)),
    ("cut_off", "severe", always(length__truncated=0.95)),
    ("no_answer", "warning", always(answers__missing=0.5)),
    ("no_answer", "severe", always(answers__missing=1.0)),
    ("grading_timed_out", "warning", always(answers__timed_out=0.02)),
    ("grading_timed_out", "severe", always(answers__timed_out=0.3)),
    ("reward_failed", "warning", always(answers__failed=0.02)),
    ("reward_failed", "severe", always(answers__failed=0.6)),
    ("sink_failed", "warning", always(sinks__failed=1)),
    ("sink_failed", "warning", always(sinks__dropped=12)),
    ("teacher_silent", "warning", lambda step: SILENT if step >= STEPS - 2 else {}),
    ("teacher_silent", "severe", lambda step: SILENT if step >= STEPS - 3 else {}),
    ("teacher_never_right", "severe", always(accuracy__teacher=0.0)),
    ("all_alike", "warning", always(train__live_rollout_share=0.02)),
    ("all_alike", "severe", always(train__live_rollout_share=0.0)),
    ("not_finite", "warning", always(train__updates_skipped=0.5)),
    ("not_finite", "severe", always(train__updates_skipped=2, train__updates=0.5)),
    ("no_gradient", "severe", always(train__updates=0)),
    ("entropy_gone", "warning", lambda step: {"train/entropy": 0.07 if step < 10 else 0.005}),
    ("entropy_gone", "severe", lambda step: {"train/entropy": 0.07 if step < 10 else 0.0}),
    ("mismatch", "warning", lambda step: {"train/mismatch_kl": 0.01 + 0.005 * step}),
    ("mismatch", "severe", always(train__mismatch_kl=0.8)),
    ("kind_without_signal", "warning", always(audit__bcq__mixed=0.05)),
    ("kind_without_signal", "warning", always(audit__ncq__mixed=0.0)),
    ("picks_by_slot", "warning", picks(0.99, 0.0, 0.52, 0.5)),
    ("picks_by_slot", "warning", picks(0.95, 0.97, 0.96, 0.95)),
    ("grader_slow", "warning", always(time__grader_busy=0.97, time__trainer_wait=1.2)),
    ("trainer_idle", "warning", always(time__trainer_wait=1.8)),
    ("engines_idle", "warning", always(time__rollout_idle=0.9)),
]  # fmt: skip


def test_a_healthy_run_gets_no_advice() -> None:
    assert advisories(run_of()) == []


@pytest.mark.parametrize("rule, severity, change", SICK, ids=[f"{r}-{s}" for r, s, _ in SICK])
def test_a_sick_run_is_diagnosed_and_of_nothing_else(
    rule: str, severity: str, change: Change
) -> None:
    assert found(run_of(change)) == {rule: severity}


def test_every_rule_has_its_sickness() -> None:
    assert {rule for rule, _, _ in SICK} == RULES.keys()


@pytest.mark.parametrize("rule, severity, change", SICK, ids=[f"{r}-{s}" for r, s, _ in SICK])
def test_advice_is_evidence_in_numbers_and_settings_that_exist(
    rule: str, severity: str, change: Change
) -> None:
    [advisory] = advisories(run_of(change))
    assert advisory.numbers
    assert any(character.isdigit() for character in advisory.found), advisory.found
    assert advisory.settings and [name for name in advisory.settings if name not in SETTINGS] == []
    assert any(name in advisory.change for name in parents(advisory)), advisory.change


SETTINGS = set(setting_names()) | {"actors.teacher.engine_args"}


def parents(advisory: Advisory) -> list[str]:
    """The settings and the sections that hold them."""
    return [part for name in advisory.settings for part in (name, name.rpartition(".")[0])]


@pytest.mark.parametrize("rule, severity, change", SICK, ids=[f"{r}-{s}" for r, s, _ in SICK])
def test_a_run_that_got_well_gets_no_advice(rule: str, severity: str, change: Change) -> None:
    assert advisories(run_of(lambda step: change(step) if step < STEPS else {}, 2 * STEPS)) == []


def test_a_run_that_goes_on_is_not_judged_by_its_first_steps() -> None:
    dead = always(train__updates=0)
    assert found(run_of(dead, steps=LIMITS.steps - 1)) == {}
    assert found(run_of(dead, steps=LIMITS.steps)) == {"no_gradient": "severe"}
    assert found(run_of(dead, steps=1, ended=True)) == {"no_gradient": "severe"}


def test_the_speed_of_a_run_of_few_steps_is_that_of_its_start() -> None:
    slow = always(time__rollout_idle=0.95, time__trainer_wait=1.9, time__grader_busy=1.0)
    assert found(run_of(slow, steps=LIMITS.long_steps - 1, ended=True)) == {}
    assert found(run_of(slow, steps=LIMITS.long_steps)).keys() == {
        "grader_slow", "trainer_idle", "engines_idle",
    }  # fmt: skip


def test_a_teacher_that_did_not_answer_was_not_wrong() -> None:
    """Its first answers after a silence are too few to say that it is never right."""
    lines = [healthy(step) for step in range(STEPS)]
    for line in lines:
        del line["accuracy/teacher"]
    lines[-1]["accuracy/teacher"] = 0.0
    assert advisories(Evidence.of(lines)) == []
    lines[-2]["accuracy/teacher"] = 0.0
    assert [a.rule for a in advisories(Evidence.of(lines))] == ["teacher_never_right"]


def test_one_good_step_is_enough_against_no_gradient() -> None:
    assert found(run_of(lambda step: {"train/updates": 2 * (step == STEPS - 3)})) == {}


@pytest.mark.parametrize("start, now, why", [
    (0.42, 0.0, "the student has lost the 42 % of its first steps: lower optimizer.learning_rate and begin anew"),
    (0.01, 0.0, "the questions of data.train are too hard; or raise method.group_size"),
    (0.42, 0.3, "the questions of data.train are too hard; or raise method.group_size"),
    (0.42, 1.0, "the questions of data.train are too easy; or raise method.group_size"),
])  # fmt: skip
def test_questions_that_the_student_could_answer_are_not_too_hard(
    start: float, now: float, why: str
) -> None:
    """As after weights that one update has moved too far."""

    def change(step: int) -> Line:
        begun = step < LIMITS.steps
        return {
            "accuracy/plain": start if begun else now,
            "train/live_rollout_share": 0.4 if begun else 0.0,
        }

    [advisory] = advisories(run_of(change))
    assert advisory.change == why


def test_causes_come_before_effects_and_the_severe_first() -> None:
    sick = {"length/truncated": 1.0, "answers/missing": 1.0, "train/live_rollout_share": 0.0,
            "train/updates": 0, "time/rollout_idle": 0.95}  # fmt: skip
    assert list(found(run_of(lambda step: sick))) == [
        "cut_off", "no_answer", "all_alike", "no_gradient", "engines_idle",
    ]  # fmt: skip


def test_what_was_not_measured_is_not_judged() -> None:
    """Distillation has no advantages, GRPO no teacher, old runs no audit."""
    lines = [{"step": step, "train/updates": 2, "window/new": 8} for step in range(STEPS)]
    assert advisories(Evidence.of(lines)) == []


def test_a_student_that_reads_the_candidates_does_not_pick_by_slot() -> None:
    sure = picks(short=0.95, long=0.05, right_first=0.98, right_second=0.03)
    assert found(run_of(sure)) == {}


def test_the_sentence_names_numbers_and_remedy() -> None:
    [advisory] = advisories(run_of(lambda step: SILENT if step >= STEPS - 3 else {}))
    assert advisory.sentence == (
        "severe teacher_silent: teacher answered none of its 60 tasks in the last 3 windows; see "
        "logs/teacher-0.log and mend actors.teacher or its server"
    )


def test_the_bound_of_silence_is_the_setting() -> None:
    def change(step: int) -> Line:
        return SILENT if step >= STEPS - 4 else {}

    assert found(run_of(change, silent_windows=5)) == {"teacher_silent": "warning"}
    assert found(run_of(change, silent_windows=4)) == {"teacher_silent": "severe"}
    assert found(run_of(change, silent_windows=0)) == {"teacher_silent": "severe"}
    assert Evidence(first=[], newest=[]).silent_windows == RunConfig().silent_teacher_windows


windows = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=12)


@given(windows)
def test_silence_agrees_with_a_walk_over_the_windows(counts: list[tuple[int, int]]) -> None:
    """(answered, given up) of each window; those without a task do not count."""
    lines = [{"tasks/answered/teacher": a, "tasks/given_up/teacher": g} for a, g in counts]
    asked = [(a, g) for a, g in counts if a or g]
    streak: list[int] = []
    for a, g in asked:
        streak = [*streak, g] if not a else []
    expected = [("teacher", len(streak), sum(streak))] if streak else []
    assert [tuple(silence) for silence in silences(lines)] == expected


def test_each_teacher_is_judged_by_itself() -> None:
    line = {"tasks/answered/teacher": 3, "tasks/given_up/teacher": 1, "tasks/given_up/teacher2": 2}
    assert [tuple(silence) for silence in silences([line] * 2)] == [("teacher2", 2, 4)]
    assert silences([{"tasks/given_up/rollout": 1}]) == []
