from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo.algorithm.window import Group, Visit, Window
from zppo.data.question import Question
from zppo.records.ledger import read_ledger
from zppo_actors.controller.journal import Journal, TrainedRow
from zppo_actors.controller.recorder import Recorder
from zppo_protocol.values import ChatMessage, Prompt

prompt = Prompt(messages=[ChatMessage(role="user", content="what?")])


def row(question: str, kind: str = "plain", origin: str = "new", window: int = 0) -> TrainedRow:
    return window, f"{window}/{question}/{kind}", question, kind, origin


def test_a_clean_run_counts_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for question in ("a", "b"):
        journal.record_dispatched(question, 0)
    journal.record_trained(0, [row("a"), row("a", "bcq"), row("b")], [0])
    journal.record_dispatched("c", 1)
    assert journal.counts() == (0, 0)
    journal.close()


def test_a_group_trained_twice_shows(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.record_trained(0, [row("a"), row("a", "bcq")], [0])
    journal.record_trained(1, [row("a", "bcq")], [0])
    assert journal.counts().trained_twice == 1
    journal.close()


def test_a_question_may_be_new_again_only_in_another_epoch(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.record_dispatched("a", 0, epoch=0)
    journal.record_dispatched("a", 5, epoch=1)
    journal.record_trained(0, [row("a")], [0])
    journal.record_trained(5, [row("a", window=5)], [5])
    assert journal.counts().trained_twice == 0
    journal.record_dispatched("a", 6, epoch=1)
    journal.record_trained(6, [row("a", window=6)], [6])
    assert journal.counts().trained_twice == 1
    journal.close()


def test_replays_are_not_double_training(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.record_dispatched("a", 0)
    for window in range(3):
        origin = "new" if window == 0 else "replay"
        journal.record_trained(window, [row("a", origin=origin, window=window)], [window])
    assert journal.counts() == (0, 0)
    journal.close()


def test_a_dropped_question_is_lost_once_its_window_is_past(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.record_dispatched("a", 0)
    journal.record_dispatched("b", 0)
    assert journal.counts().lost == 0
    journal.record_trained(0, [row("a")], [0])
    assert journal.counts().lost == 1
    journal.record_trained(0, [row("b", "none")], [0])
    assert journal.counts().lost == 0, "its window had nothing to train of it, which is no loss"
    journal.close()


def test_groups_of_a_window_may_be_trained_in_several_steps(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for question in "ab":
        journal.record_dispatched(question, 0)
    journal.record_trained(0, [row("a")], [])
    assert journal.counts() == (0, 0), "the rest of the window is still to come"
    journal.record_trained(1, [row("a", "bcq"), row("b")], [0])
    assert journal.counts() == (0, 0)
    journal.roll_back(1)
    assert journal.counts() == (0, 0), "it is not settled any more"
    journal.record_trained(1, [row("a", "bcq")], [0])
    assert journal.counts() == (0, 1)
    journal.close()


def test_a_journal_of_before_windows_were_settled_one_by_one_counts_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for window, question in enumerate("abc"):
        journal.record_dispatched(question, window)
    for window, question in enumerate("ac"):
        journal.record_trained(window, [row(question, window=window)], [window])
    journal.close()
    with sqlite3.connect(tmp_path / "journal.sqlite") as connection:
        connection.execute("DROP TABLE settled")
    assert read_ledger(tmp_path, 2).lost == 1
    journal = Journal(tmp_path)
    assert journal.counts() == (0, 1)
    journal.record_trained(2, [], [2])
    assert journal.counts() == (0, 2)
    journal.close()


def test_a_journal_is_brought_up_to_date_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the disk is full when half of it is done; what is on it then is the copy."""
    run, copy = tmp_path / "run", tmp_path / "copy"
    run.mkdir()
    journal = Journal(run)
    journal.record_trained(0, [row("a")], [0])
    journal.close()
    with sqlite3.connect(run / "journal.sqlite") as connection:
        connection.execute("DROP TABLE settled")
    with monkeypatch.context() as patch:
        patch.setattr("zppo_actors.controller.journal.SETTLED_IN_ORDER", "INSERT INTO full;")
        with pytest.raises(sqlite3.OperationalError):
            Journal(run)
    shutil.copytree(run, copy)
    journal = Journal(copy)
    with sqlite3.connect(copy / "journal.sqlite") as connection:
        assert connection.execute("SELECT * FROM settled").fetchall() == [(0, 0)]
    journal.close()


def test_roll_back_forgets_later_steps_and_dispatches(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for window in range(3):
        journal.record_dispatched(f"q{window}", window)
        journal.record_trained(window, [row(f"q{window}", window=window)], [window])
    journal.roll_back(1)
    journal.record_dispatched("q1", 1)
    journal.record_dispatched("q1", 1)
    journal.record_trained(1, [row("q1", window=1)], [1])
    assert journal.counts() == (0, 0)
    journal.close()


def test_a_window_of_which_a_part_is_trained_is_opened_again(tmp_path: Path) -> None:
    """By a resumed controller with its journal, and with one that had to be begun anew."""
    visits = [
        Visit(
            question=q,
            origin="new",
            epoch=1,
            plain=Group(id=f"5/{q.id}/plain", kind="plain", prompt=prompt),
        )
        for q in [Question(id=name, text="what?", answer="0") for name in ("q0", "q1")]
    ]
    window = Window(index=5, visits=visits)
    journal = Journal(tmp_path)
    opened(journal, window)
    journal.record_trained(1, [row("q0", window=2)], [])
    journal.record_dispatched("q0", 2, epoch=0)
    journal.record_trained(3, [row("q0", window=5)], [])
    journal.roll_back(4)
    visits[0].trained = "plain"
    opened(journal, window)
    journal.record_trained(4, [row("q0", "bcq", window=5), row("q1", window=5)], [5])
    assert journal.counts() == (0, 0), "q0 is new once in each pass"
    journal.close()
    (tmp_path / "journal.sqlite").unlink()
    journal = Journal(tmp_path, start_step=4)
    journal.roll_back(4)
    opened(journal, window)
    journal.record_trained(4, [row("q1", window=5)], [5])
    assert journal.counts() == (0, 0), "q0 was trained before this journal"
    journal.close()


def opened(journal: Journal, window: Window) -> None:
    """As a controller does it."""
    recorder = object.__new__(Recorder)
    recorder.journal = journal
    recorder.opened(window)


def test_events_are_kept_in_order_across_openings(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for second in range(5):
        journal.record_event(float(second), "rollout-0", "died", f"signal {second}")
    journal.close()
    again = Journal(tmp_path)
    assert again.events(limit=2) == [
        (3.0, "rollout-0", "died", "signal 3"),
        (4.0, "rollout-0", "died", "signal 4"),
    ]
    again.close()


questions = st.sampled_from("abcd")
kinds = st.sampled_from(["plain", "bcq", "none"])
trained = st.tuples(st.integers(0, 3), questions, kinds, st.sampled_from(["new", "replay"]))
dispatched = st.tuples(questions, st.integers(0, 4))


def naive_counts(
    rows: list[tuple[int, str, str, str]], sent: set[tuple[str, int]]
) -> tuple[int, int]:
    groups = Counter((question, window, kind) for window, question, kind, _ in rows)
    as_new: dict[str, set[int]] = {}
    for window, question, _, origin in rows:
        if origin == "new":
            as_new.setdefault(question, set()).add(window)
    seen = {(question, window) for window, question, *_ in rows}
    settled = {window for window, *_ in rows}
    twice = sum(n > 1 for n in groups.values()) + sum(
        len(windows) > 1 for windows in as_new.values()
    )
    return twice, sum(pair not in seen and pair[1] in settled for pair in sent)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.lists(trained, max_size=12), st.sets(dispatched, max_size=8))
def test_counts_agree_with_plain_python(
    rows: list[tuple[int, str, str, str]], sent: set[tuple[str, int]]
) -> None:
    with TemporaryDirectory() as folder:
        journal = Journal(Path(folder))
        for question, window in sent:
            journal.record_dispatched(question, window)
        for window, question, kind, origin in rows:
            journal.record_trained(window, [row(question, kind, origin, window)], [window])
        assert journal.counts() == naive_counts(rows, sent)
        journal.close()


WRITER = """
import os, signal, sys
from pathlib import Path
from zppo_actors.controller.journal import Journal
journal = Journal(Path(sys.argv[1]))
journal.record_trained(0, [(0, "0/a/plain", "a", "plain", "new")], [0])

def rows():
    yield (1, "1/a/plain", "a", "plain", "replay")
    os.kill(os.getpid(), signal.SIGKILL)

journal.record_trained(1, rows(), [1])
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_whole_steps(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", WRITER, str(tmp_path)], env=environment, timeout=600
    )
    assert done.returncode == -signal.SIGKILL
    journal = Journal(tmp_path)
    journal.record_trained(1, [row("a", origin="replay", window=1)], [1])
    assert journal.counts() == (0, 0)
    journal.close()


def test_what_teachers_cost_outlives_a_roll_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.record_cost("draw", 1, 0)
    journal.record_cost("draw", 0, 40)
    journal.record_cost("judge", 1, 7)
    journal.roll_back(0)
    assert journal.spent() == {"draw": (1, 40), "judge": (1, 7)}
    journal.close()
    assert read_ledger(tmp_path, 0).spent == {"draw": (1, 40), "judge": (1, 7)}


def test_a_journal_of_an_earlier_version_knows_no_cost_and_can_go_on(tmp_path: Path) -> None:
    Journal(tmp_path).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "journal.sqlite")) as connection:
        connection.execute("DROP TABLE spent")
    assert read_ledger(tmp_path, 0).spent == {}
    journal = Journal(tmp_path)
    journal.record_cost("draw", 1, 3)
    assert journal.spent() == {"draw": (1, 3)}
    journal.close()
