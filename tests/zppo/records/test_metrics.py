from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zppo.algorithm.steps import Fate
from zppo.algorithm.window import Group, Window
from zppo.grading import NO_BOX
from zppo.records import metrics
from zppo.records.metrics import Metric
from zppo.records.summary import read_lines
from zppo.training.metrics import TRAINER_METRICS
from zppo_protocol.samples import GroupSamples
from zppo_protocol.values import TIMED_OUT, ChatMessage, Grade, Prompt

DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"


def group_of(versions_per_rollout: list[list[int]]) -> Group:
    """A group whose tokens have exactly these versions, run-length encoded over the whole token
    axis."""
    flat = [version for rollout in versions_per_rollout for version in rollout]
    spans: list[list[int]] = []
    for version in flat:
        if spans and spans[-1][1] == version:
            spans[-1][0] += 1
        else:
            spans.append([1, version])
    samples = GroupSamples(
        prompt_ids=np.zeros(1, np.int32),
        token_ids=np.zeros(len(flat), np.int32),
        log_probs=np.zeros(len(flat), np.float32),
        offsets=np.cumsum([0, *map(len, versions_per_rollout)]).astype(np.int32),
        version_spans=np.array(spans, np.int32).reshape(-1, 2),
        texts=[""] * len(versions_per_rollout),
        finish_reasons=["stop"] * len(versions_per_rollout),
    )
    prompt = Prompt(messages=[ChatMessage(role="user", content="q")])
    return Group(id="g", kind="plain", prompt=prompt, samples=samples, grades=[Grade(reward=1.0)])


rollouts = st.lists(st.lists(st.integers(0, 5), max_size=6), min_size=1, max_size=5)


@pytest.mark.slow
@given(st.lists(rollouts, min_size=1, max_size=4), st.integers(5, 9))
def test_staleness_agrees_with_a_walk_over_every_token(
    groups: list[list[list[int]]], step: int
) -> None:
    result = metrics.staleness_metrics([group_of(group) for group in groups], step)
    ages = [step - version for group in groups for rollout in group for version in rollout]
    spoken = [rollout for group in groups for rollout in group if rollout]
    if not ages:
        assert result == {}
        return
    assert result["staleness/mean"] == pytest.approx(sum(ages) / len(ages))
    assert result["staleness/max"] == max(ages)
    assert result["staleness/in_flight"] == pytest.approx(
        np.mean([max(r) - min(r) for r in spoken])
    )
    assert result["staleness/in_queue"] == pytest.approx(np.mean([step - max(r) for r in spoken]))


def test_a_window_tells_its_composition_and_accuracies(window: Window) -> None:
    result = metrics.window_metrics(window, 4)
    hard, easy = window.visits
    assert (result["window/new"], result["window/replayed"], result["window/hard"]) == (1, 1, 1)
    assert (result["window/bcq"], result["window/ncq"]) == (1, 1)
    assert result["accuracy/new"] == hard.plain.accuracy < 0.5
    assert result["accuracy/replay"] == easy.plain.accuracy == 1.0
    assert result["accuracy/plain"] == (hard.plain.accuracy + 1.0) / 2
    bcq = hard.reformulations[0].group
    assert bcq is not None and result["accuracy/bcq"] == bcq.accuracy


def test_teacher_tokens_are_not_counted_as_generated(window: Window) -> None:
    result = metrics.window_metrics(window, 4)
    sizes = [
        g.samples.token_ids.size for v in window.visits for g in v.student_groups() if g.samples
    ]
    assert result["tokens/generated"] == sum(sizes)
    teacher = window.visits[0].teacher
    assert teacher is not None and teacher.samples is not None
    assert result["tokens/teacher"] == teacher.samples.token_ids.size


def test_a_kind_without_groups_has_a_count_but_no_accuracy(window: Window) -> None:
    for visit in window.visits:
        visit.reformulations = []
    result = metrics.window_metrics(window, 4)
    assert result["window/bcq"] == 0
    assert "accuracy/bcq" not in result


def test_answers_that_are_missing_or_late_and_what_became_of_tasks(window: Window) -> None:
    hard, easy = window.visits
    hard.reformulations = []
    hard.plain.grades = [Grade(reward=0.0, note=NO_BOX)] * 6 + [Grade(reward=0.0, answer="1")] * 2
    easy.plain.grades = [Grade(reward=0.0, note=TIMED_OUT)] * 4 + [
        Grade(reward=1.0, answer="2")
    ] * 4
    for outcome in ("answered/teacher", "answered/teacher", "failed/teacher/teacher-0"):
        window.count_task(outcome)
    result = metrics.window_metrics(window, 4)
    assert (result["answers/missing"], result["answers/timed_out"]) == (6 / 16, 4 / 16)
    assert result["tasks/answered/teacher"] == 2 and result["tasks/failed/teacher/teacher-0"] == 1
    assert list(metrics.failed_tries(result)) == [("teacher", "teacher-0", 1)]


def test_buffer_metrics_count_the_fates_of_one_step() -> None:
    def fate(name: str, entry: float) -> Fate:
        return Fate(question_id="q", fate=name, entry_accuracy=entry, visits=2)  # type: ignore[arg-type]

    fates = [
        fate("graduated", 0.375),
        fate("graduated", 0.375),
        fate("evicted", 0.0),
        fate("kept", 0.0),
    ]
    assert metrics.buffer_metrics(3, 10, {0.0: 2, 0.125: 1}, fates) == {
        "buffer/size": 3,
        "buffer/fill": 0.3,
        "buffer/admitted": 0,
        "buffer/graduated": 2,
        "buffer/evicted": 1,
        "buffer/by_entry_accuracy/0": 2,
        "buffer/by_entry_accuracy/0.125": 1,
        "graduated/by_entry/0.375": 2,
    }


def test_an_eviction_is_not_the_outcome_of_a_visit() -> None:
    fates = [Fate(question_id="a", fate="kept", entry_accuracy=0.0, visits=2)]
    fates.append(Fate(question_id="a", fate="evicted", entry_accuracy=0.0, visits=2))
    assert metrics.outcomes(fates) == {"a": "kept"}


@pytest.mark.parametrize(
    "accuracy, name", [(0.0, "0"), (0.125, "0.125"), (1 / 3, "0.3333"), (0.5, "0.5")]
)
def test_entry_names(accuracy: float, name: str) -> None:
    assert metrics.entry_name(accuracy) == name


@pytest.mark.slow
def test_every_name_that_a_run_writes_is_documented(fake_run: Callable[..., Path]) -> None:
    patterns = [
        re.compile(re.sub("<[a-z]+>", "[^/]+", metric.name)) for metric in metrics.STEP_METRICS
    ]
    for line in read_lines(fake_run(steps=6) / "metrics.jsonl"):
        strangers = [
            name for name in line if not any(pattern.fullmatch(name) for pattern in patterns)
        ]
        assert strangers == []


@pytest.mark.parametrize(
    "table",
    [
        metrics.STEP_METRICS,
        metrics.FATE_FIELDS,
        metrics.HELDOUT_FIELDS,
        metrics.STATUS_COUNTERS,
        metrics.STATUS_GAUGES,
        TRAINER_METRICS,
    ],
)
def test_the_documentation_has_every_row(table: tuple[Metric, ...]) -> None:
    text = DOCS.read_text("utf-8")
    assert [metric.name for metric in table if metrics.table_row(metric) not in text] == []
