from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from worlds import questions, topology

from zppo.algorithm.methods import get_method
from zppo.algorithm.steps import Recipe, compose
from zppo.algorithm.window import Group, Visit, Window
from zppo.errors import UserError
from zppo.records.summary import accuracy_ends, read_lines, summarise
from zppo.scheduling.events import Trained
from zppo_actors.controller.journal import Journal
from zppo_actors.controller.recorder import journal_rows
from zppo_protocol.values import Grade, Prompt

STABLE_KEYS = [
    "run", "method", "steps", "questions_new", "questions_replayed", "groups_bcq", "groups_ncq",
    "max_staleness_seen", "accuracy_first", "accuracy_last", "tokens_generated", "updates",
    "answers_missing", "truncated", "answers_timed_out", "failed_tasks", "failed_tasks_by_actor",
    "wall_seconds", "admitted", "graduated", "evicted", "graduated_by_entry_accuracy",
    "heldout_before", "heldout_after", "trained_twice", "lost", "journal_from_step",
    "journal_problem", "verdict", "teacher_requests", "teacher_tokens",
]  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run.json").write_text('{"run_id": "ab", "topology": {"method": {"name": "grpo"}}}')
    return tmp_path


def write_lines(path: Path, *lines: dict[str, object]) -> None:
    path.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))


def test_a_run_without_a_step_has_all_keys(run_dir: Path) -> None:
    summary = summarise(run_dir)
    assert list(summary) == STABLE_KEYS
    assert summary["method"] == "grpo"
    assert (summary["steps"], summary["accuracy_first"], summary["heldout_before"]) == (
        0,
        None,
        None,
    )


def test_sums_and_extremes(run_dir: Path) -> None:
    write_lines(
        run_dir / "metrics.jsonl", {"step": 0, "window/new": 32, "window/replayed": 0,
        "window/bcq": 3, "staleness/max": 0, "wall_seconds": 1.5,
         "accuracy/new": 0.25, "tokens/generated": 100},
        {"step": 1, "window/new": 32, "window/replayed": 16, "window/bcq": 4, "window/ncq": 2,
        "staleness/max": 2,
         "wall_seconds": 2.5, "accuracy/new": 0.5, "tokens/generated": 50},
    )  # fmt: skip
    summary = summarise(run_dir)
    assert (summary["steps"], summary["questions_new"], summary["questions_replayed"]) == (
        2,
        64,
        16,
    )
    assert (summary["groups_bcq"], summary["groups_ncq"], summary["tokens_generated"]) == (
        7,
        2,
        150,
    )
    assert (summary["max_staleness_seen"], summary["wall_seconds"]) == (2, 2.5)
    assert (summary["accuracy_first"], summary["accuracy_last"]) == (0.25, 0.5)


def test_failures_updates_and_shares_of_responses(run_dir: Path) -> None:
    write_lines(
        run_dir / "metrics.jsonl",
        {"step": 0, "train/updates": 2, "answers/missing": 0.5, "length/truncated": 0.25,
         "answers/timed_out": 0.0, "tasks/failed/teacher/teacher-0": 4,
         "tasks/failed/teacher/teacher-1": 1, "tasks/given_up/teacher": 1},
        {"step": 1, "train/updates": 1, "answers/missing": 1.0,
         "tasks/failed/compress/teacher-0": 3},
    )  # fmt: skip
    summary = summarise(run_dir)
    assert summary["updates"] == 3
    assert (summary["answers_missing"], summary["truncated"]) == (0.75, 0.25)
    assert summary["answers_timed_out"] == 0.0
    assert summary["failed_tasks"] == {"teacher": 5, "compress": 3}
    assert summary["failed_tasks_by_actor"] == {"teacher-0": 7, "teacher-1": 1}


def test_fates_are_counted_by_entry_accuracy(run_dir: Path) -> None:
    fates = [
        ("admitted", 0.0),
        ("admitted", 0.375),
        ("graduated", 0.375),
        ("graduated", 0.0),
        ("evicted", 0.125),
    ]
    lines = [
        {"step": 0, "question_id": "q", "fate": f, "entry_accuracy": a, "visits": 1}
        for f, a in fates
    ]
    write_lines(run_dir / "fates.jsonl", *lines)
    summary = summarise(run_dir)
    assert (summary["admitted"], summary["graduated"], summary["evicted"]) == (2, 2, 1)
    assert summary["graduated_by_entry_accuracy"] == {"0": 1, "0.375": 1}


@pytest.mark.parametrize(
    "lines, ends",
    [
        ([], (None, None)),
        ([(0, 0.4)], (0.4, None)),
        ([(0, 0.4), (5, 0.5), (9, 0.6)], (0.4, 0.6)),
        ([(9, 0.6)], (None, 0.6)),
    ],
)
def test_held_out_before_and_after(
    run_dir: Path, lines: list[tuple[int, float]], ends: tuple[float | None, float | None]
) -> None:
    write_lines(
        run_dir / "heldout.jsonl",
        *({"step": step, "accuracy": accuracy} for step, accuracy in lines),
    )
    summary = summarise(run_dir)
    assert (summary["heldout_before"], summary["heldout_after"]) == ends


def test_accuracy_ends_are_means_over_a_tenth() -> None:
    steps = [
        {"accuracy/new": 0.0},
        {"accuracy/new": 0.2},
        *[{"accuracy/new": 0.5}] * 16,
        *[{"accuracy/new": 0.9}] * 2,
    ]
    first, last = accuracy_ends(steps)
    assert first == pytest.approx(0.1)
    assert last == pytest.approx(0.9)


def test_the_journal_gives_counts_and_the_verdict(run_dir: Path) -> None:
    journal = Journal(run_dir)
    journal.record_dispatched("q-1", 0)
    journal.record_dispatched("q-2", 0)
    journal.record_trained(0, [(0, "0/q-1/plain", "q-1", "plain", "new")] * 2, [0])
    journal.record_event(1.0, "controller", "run_ended", "gave up")
    journal.close()
    summary = summarise(run_dir)
    assert (summary["trained_twice"], summary["lost"], summary["verdict"]) == (1, 1, "gave up")


def trained_window(index: int, name: str, *, correct: dict[str, bool]) -> Trained:
    """A window of the method whose teacher is right about some questions and wrong about others."""
    visits = []
    for question in questions(len(correct)):
        groups = [graded(f"{index}/{question.id}/{kind}", kind) for kind in ("plain", "teacher")]
        groups[1].grades = [Grade(reward=float(correct[question.id]))] * 2
        visits.append(Visit(question=question, origin="new", plain=groups[0], teacher=groups[1]))
    window = Window(index=index, visits=visits, phase="composed")
    recipe = Recipe.of(
        topology(method={"name": name, "dynamic_sampling": name == "zppo"}), get_method(name)
    )
    composed = compose(window, recipe)
    return Trained(window=window, composed=composed, tokens=0, fates=[], settled=[index])


def graded(name: str, kind: str) -> Group:
    return Group(id=name, kind=kind, prompt=Prompt(messages=[]), grades=[Grade(reward=0.0)] * 2)


def test_a_question_with_nothing_to_train_has_a_row_of_its_own() -> None:
    trained = trained_window(3, "off_distill", correct={"q0": True, "q1": False})
    rows = journal_rows(trained, ["3/q0/teacher"])
    assert rows == [
        (3, "3/q0/teacher", "q0", "teacher", "new"),
        (3, "3/q1/plain/none", "q1", "none", "new"),
    ]


def test_a_question_that_dynamic_sampling_drops_has_a_row_of_its_own() -> None:
    trained = trained_window(0, "zppo", correct={"q0": False})
    assert journal_rows(trained, []) == [(0, "0/q0/plain/none", "q0", "none", "new")]


def test_a_group_that_nobody_sent_is_written_as_unknown() -> None:
    trained = trained_window(0, "off_distill", correct={"q0": True})
    rows = journal_rows(trained, ["0/q0/teacher", "9/q9/plain"])
    assert rows[1] == (0, "9/q9/plain", "?", "?", "?")


@pytest.mark.parametrize(
    ("reported", "counts"),
    [
        (["0/q0/teacher"], (0, 0)),
        ([], (0, 1)),
        (["0/q0/teacher", "0/q0/teacher"], (1, 0)),
    ],
)
def test_lost_and_twice_are_counted_where_the_teacher_is_trained(
    run_dir: Path, reported: list[str], counts: tuple[int, int]
) -> None:
    journal = Journal(run_dir)
    for question in ("q0", "q1"):
        journal.record_dispatched(question, 0)
    trained = trained_window(0, "off_distill", correct={"q0": True, "q1": False})
    journal.record_trained(0, journal_rows(trained, reported), [0])
    journal.close()
    summary = summarise(run_dir)
    assert (summary["trained_twice"], summary["lost"]) == counts


def test_a_question_with_nothing_to_train_twice_is_trained_twice(run_dir: Path) -> None:
    journal = Journal(run_dir)
    for window in (0, 1):
        journal.record_dispatched("q0", window)
        trained = trained_window(window, "off_distill", correct={"q0": False})
        journal.record_trained(window, journal_rows(trained, []), [window])
    journal.close()
    assert summarise(run_dir)["trained_twice"] == 1


def test_groups_of_every_reformulation_are_summed(run_dir: Path) -> None:
    lines = [
        {"step": 0, "window/new": 4, "window/hint": 2},
        {"step": 1, "window/new": 4, "window/hint": 1},
    ]
    write_lines(run_dir / "metrics.jsonl", *lines)
    summary = summarise(run_dir)
    assert (summary["groups_hint"], summary["groups_bcq"], summary["groups_ncq"]) == (3, 0, 0)


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":0}\n{"step":1}\n{"step":2,"accu')
    assert read_lines(path) == [{"step": 0}, {"step": 1}]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":0}\nnonsense\n{"step":1}\n')
    with pytest.raises(UserError) as caught:
        read_lines(path)
    assert str(caught.value).startswith(f"{path}:2: is not a JSON object (")


@pytest.mark.parametrize(
    ("file", "line", "reason"),
    [
        ("metrics.jsonl", b"[1]", "Expected `object`, got `array`"),
        ("metrics.jsonl", b'{"window/new": 8}', "Object missing required field `step`"),
        ("metrics.jsonl", b'{"step": -1}', "Expected `int` >= 0 - at `$.step`"),
        (
            "metrics.jsonl",
            b'{"step": 1, "a": "8"}',
            "Expected `int | float`, got `str` - at `$[...]`",
        ),
        ("fates.jsonl", b'{"step": 1}', "Object missing required field `question_id`"),
        (
            "fates.jsonl",
            b'{"step": 1, "question_id": "q", "fate": "graduated", "entry_accuracy": null}',
            "Expected `float`, got `null` - at `$.entry_accuracy`",
        ),
        ("heldout.jsonl", b'{"step": 1}', "Object missing required field `accuracy`"),
    ],
)
def test_a_line_that_somebody_has_edited_is_named(
    tmp_path: Path, file: str, line: bytes, reason: str
) -> None:
    path = tmp_path / file
    path.write_bytes(b"\n" + line + b"\n")
    with pytest.raises(UserError) as caught:
        read_lines(path)
    assert str(caught.value) == f"{path}:2: is no line that a run writes ({reason})"


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        summarise(tmp_path)
    assert str(caught.value) == f"{tmp_path}: is not the directory of a run (it has no run.json)"
    with pytest.raises(UserError) as caught:
        summarise(tmp_path / "nowhere")
    assert (
        str(caught.value)
        == f"{tmp_path / 'nowhere'}: no such folder; expected the directory of a run"
    )


@pytest.mark.slow
def test_a_made_up_run_adds_up(fake_run: Callable[..., Path]) -> None:
    summary = summarise(fake_run(steps=12))
    assert (summary["steps"], summary["questions_new"]) == (12, 12 * 16)
    assert summary["graduated"] == sum(summary["graduated_by_entry_accuracy"].values()) > 0
    assert (summary["trained_twice"], summary["lost"], summary["verdict"]) == (0, 0, "finished")
    assert summary["max_staleness_seen"] <= 2
