from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from zppo.algorithm.window import Candidate, Window
from zppo.errors import UserError
from zppo.records import rollouts
from zppo.records.metrics import window_metrics
from zppo.records.rollouts import RolloutRow
from zppo_protocol.codec import dumps
from zppo_protocol.places import PLACE
from zppo_protocol.samples import GroupSamples
from zppo_protocol.values import ChatMessage, PictureReference, Prompt, Usage


def students(window: Window) -> set[tuple[str, int]]:
    """What Algorithm 1 trains on."""
    return {(group.id, i) for group in window.student_groups() for i in range(len(group.rewards))}


def rows_of(window: Window, folder: Path, **outcome: str) -> list[RolloutRow]:
    path = rollouts.write_step(folder, 4, window, outcome, students(window))
    return [msgspec.convert(row, RolloutRow) for row in rollouts.read_step(path)]


def test_every_rollout_comes_back_as_it_was(window: Window, tmp_path: Path) -> None:
    rows = rows_of(window, tmp_path)
    groups = [
        g
        for v in window.visits
        for g in (v.plain, v.teacher, *(r.group for r in v.reformulations))
        if g
    ]
    assert [row.group_id for row in rows] == [g.id for g in groups for _ in g.grades or []]
    at = 0
    for group in groups:
        assert group.samples is not None and group.grades is not None
        for i, grade in enumerate(group.grades):
            row, begin, end = rows[at], group.samples.offsets[i], group.samples.offsets[i + 1]
            assert (row.response, row.answer, row.reward) == (
                group.samples.texts[i],
                grade.answer,
                grade.reward,
            )
            assert (row.rollout, row.length, row.kind) == (i, end - begin, group.kind)
            assert row.log_prob_mean == pytest.approx(
                float(np.mean(group.samples.log_probs[begin:end]))
            )
            at += 1
    assert at == len(rows)


def test_the_teacher_is_in_the_store_but_not_trained(window: Window, tmp_path: Path) -> None:
    rows = rows_of(window, tmp_path)
    assert {row.kind for row in rows if not row.trained} == {"teacher"}
    assert all(row.version_min is None for row in rows if row.kind == "teacher")
    assert all(row.version_min is not None for row in rows if row.kind != "teacher")


def test_a_teachers_rollout_is_trained_where_the_method_says_so(
    window: Window, tmp_path: Path
) -> None:
    teacher = window.visits[0].teacher
    assert teacher is not None
    path = rollouts.write_step(tmp_path, 4, window, {}, {(teacher.id, 1)})
    rows = [msgspec.convert(row, RolloutRow) for row in rollouts.read_step(path)]
    assert [(row.group_id, row.rollout) for row in rows if row.trained] == [(teacher.id, 1)]


def test_teachers_that_failed_are_in_the_store(window: Window, tmp_path: Path) -> None:
    visit = window.visits[0]
    assert visit.teacher is not None
    failed = msgspec.structs.replace(visit.teacher, id=f"{visit.teacher.id}-failed")
    visit.failed_teachers.append(failed)
    names = list(
        dict.fromkeys(row.group_id for row in rows_of(window, tmp_path) if row.kind == "teacher")
    )
    assert names[:2] == [failed.id, visit.teacher.id]


def test_candidates_come_back_with_their_compressed_text(window: Window, tmp_path: Path) -> None:
    rows = rows_of(window, tmp_path)
    encoded = next(row.candidates for row in rows if row.kind == "bcq")
    assert encoded is not None
    expected = window.visits[0].reformulations[0].candidates
    assert msgspec.json.decode(encoded, type=list[Candidate]) == expected
    assert next(row.candidates for row in rows if row.kind == "plain") is None


def test_outcomes_default_to_none(window: Window, tmp_path: Path) -> None:
    rows = rows_of(window, tmp_path, **{"q-0000": "admitted"})
    assert {(row.question_id, row.outcome) for row in rows} == {
        ("q-0000", "admitted"),
        ("q-0001", "none"),
    }


def test_a_late_part_has_the_window_of_its_visit_and_no_outcome(
    window: Window, tmp_path: Path
) -> None:
    late = window.visits[0]
    late.trained = "plain"
    batch = Window(index=9, visits=[late])
    path = rollouts.write_step(tmp_path, 9, batch, {late.question.id: "kept"}, set())
    rows = [msgspec.convert(row, RolloutRow) for row in rollouts.read_step(path)]
    assert {row.kind for row in rows} == {"teacher", "bcq", "ncq"}
    assert {(row.step, row.window, row.outcome) for row in rows} == {(9, window.index, "none")}


def test_a_reformulation_cut_by_the_cap_has_no_rows(window: Window, tmp_path: Path) -> None:
    window.visits[0].reformulations[1].group = None
    assert "ncq" not in {row.kind for row in rows_of(window, tmp_path)}


def test_a_completion_without_tokens_has_no_versions_and_no_log_prob(
    window: Window, tmp_path: Path
) -> None:
    samples = window.visits[0].plain.samples
    assert samples is not None
    offsets = samples.offsets.copy()
    offsets[1] = 0
    window.visits[0].plain.samples = msgspec.structs.replace(samples, offsets=offsets)
    first = rows_of(window, tmp_path)[0]
    assert (first.length, first.version_min, first.log_prob_mean) == (0, None, None)


def test_lengths_that_only_a_server_may_know(window: Window, tmp_path: Path) -> None:
    teacher = window.visits[0].teacher
    assert teacher is not None and teacher.samples is not None
    texts, nothing = teacher.samples.texts, np.zeros(0, np.int32)
    rest = Usage(completions=len(texts) - 1, completion_tokens=30)
    teacher.samples = GroupSamples(
        prompt_ids=nothing,
        token_ids=nothing,
        log_probs=np.zeros(0, np.float32),
        offsets=np.zeros(len(texts) + 1, np.int32),
        version_spans=np.zeros((0, 2), np.int32),
        texts=texts,
        finish_reasons=["stop"] * len(texts),
        usage=[Usage(completions=1, completion_tokens=12, prompt_tokens=9), rest],
    )
    rows = [row for row in rows_of(window, tmp_path) if row.kind == "teacher"]
    assert [row.response for row in rows] == texts
    assert [row.length for row in rows] == [12] + [None] * (len(texts) - 1)
    assert {(row.prompt_length, row.log_prob_mean) for row in rows} == {(9, None)}
    assert window_metrics(window, 4)["tokens/teacher"] == 42


def test_columns_and_questions_can_be_picked(window: Window, tmp_path: Path) -> None:
    path = rollouts.write_step(tmp_path, 4, window, {}, students(window))
    rows = rollouts.read_step(path, ["kind"], question_ids=["q-0001"])
    assert rows == [{"kind": "plain"}] * 8


@pytest.mark.parametrize("question_ids", [None, ["q-0"]])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "Parquet magic bytes not found"),
        (lambda path: path.write_bytes(b""), "Parquet file size is 0 bytes"),
        (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
        (
            lambda path: parquet.write_table(pyarrow.table({"kind": [""], "rollout": [0]}), path),
            "question_id",
        ),
    ],
    ids=["cut", "empty", "folder", "another's"],
)
def test_a_damaged_file_is_named(
    window: Window,
    tmp_path: Path,
    damage: Callable[[Path], object],
    reason: str,
    question_ids: list[str] | None,
) -> None:
    path = rollouts.write_step(tmp_path, 3, window, {}, set())
    damage(path)
    with pytest.raises(UserError) as caught:
        rollouts.read_step(path, question_ids=question_ids)
    said = str(caught.value)
    assert said.startswith(f"{path}: cannot be read (") and reason in said
    assert said.endswith("); remove it to go on without this step")


@pytest.mark.parametrize("rows_at_once", [1, 5, 1000])
def test_a_file_is_read_in_parts(
    window: Window, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    """Against all rows, picked one by one."""
    monkeypatch.setattr(rollouts, "ROWS_READ_AT_ONCE", rows_at_once)
    path = rollouts.write_step(tmp_path, 4, window, {}, set())
    whole = rollouts.read_step(path)
    assert len(whole) == 36
    of_one = [row for row in whole if row["question_id"] == "q-0001"]
    assert rollouts.read_step(path, question_ids={"q-0001", "q-none"}) == of_one
    firsts = [row for row in whole if row["rollout"] == 0]
    assert rollouts.read_step(path, one_a_group=True) == firsts
    both = rollouts.read_step(path, ["group_id"], ["q-0001"], one_a_group=True)
    assert both == [{"group_id": row["group_id"]} for row in firsts if row in of_one]
    assert rollouts.read_step(path, question_ids=()) == []


def test_a_text_is_stored_once_for_its_group_in_however_many_parts(
    window: Window, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    distinct = 0
    for group in window.student_groups():
        text = rng.randbytes(20_000).hex()  # compression can make it half as long
        group.prompt = Prompt(messages=[ChatMessage(role="user", content=text)])
        distinct += len(text) // 2
    monkeypatch.setattr(rollouts, "ROWS_READ_AT_ONCE", 8)
    path = rollouts.write_step(tmp_path, 4, window, {}, set())
    assert parquet.ParquetFile(path).num_row_groups == 5
    assert distinct < path.stat().st_size < 1.5 * distinct


def test_only_columns_of_any_length_are_packed(window: Window, tmp_path: Path) -> None:
    path = rollouts.write_step(tmp_path, 4, window, {}, set())
    stored = parquet.read_metadata(path).row_group(0)
    columns = [stored.column(place) for place in range(stored.num_columns)]
    packed = {one.path_in_schema for one in columns if one.compression == "ZSTD"}
    assert packed == {
        "question", "gold", "prompt", "response", "answer", "note", "candidates", "reward_parts",
        "media",
    }  # fmt: skip
    assert {one.path_in_schema for one in columns if one.is_stats_set} == {
        one.path_in_schema for one in columns
    } - packed


WRITES = """
import sys
from pathlib import Path
from zppo.algorithm.window import Window
from zppo.records.rollouts import write_step
from zppo_protocol.codec import loads
blob, folder = map(Path, sys.argv[1:])
write_step(folder, 4, loads(blob.read_bytes(), Window), {}, set())
sys.exit("pyarrow.compute" in sys.modules)
"""


def test_a_step_is_written_without_all_functions_of_arrow(window: Window, tmp_path: Path) -> None:
    """To make them takes as long as a file of two thousand rollouts."""
    blob = tmp_path / "window"
    blob.write_bytes(dumps(window))
    command = [sys.executable, "-P", "-c", WRITES, str(blob), str(tmp_path)]
    subprocess.run(command, check=True)
    assert rollouts.step_path(tmp_path, 4).exists()


def test_writing_leaves_nothing_aside_and_replaces_whole(window: Window, tmp_path: Path) -> None:
    rollouts.write_step(tmp_path, 4, window, {}, students(window))
    window.visits.pop()
    path = rollouts.write_step(tmp_path, 4, window, {}, students(window))
    assert list(tmp_path.iterdir()) == [path]
    assert {row["question_id"] for row in rollouts.read_step(path)} == {"q-0000"}


def test_a_failed_write_leaves_the_old_file(
    window: Window, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rollouts.write_step(tmp_path, 4, window, {}, students(window))
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        rollouts.write_step(tmp_path, 4, Window(index=4, visits=[]), {}, set())
    assert path.read_bytes() == before
    assert list(rollouts.step_files(tmp_path)) == [path]


def test_roll_back_removes_later_steps_and_half_written_files(
    window: Window, tmp_path: Path
) -> None:
    for step in (3, 4, 12):
        rollouts.write_step(tmp_path, step, window, {}, students(window))
    (tmp_path / ".step-000013.parquet.partial").write_bytes(b"half")
    rollouts.roll_back(tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003.parquet"]


def test_roles_are_named_when_there_is_a_system_message() -> None:
    user = ChatMessage(role="user", content="hello")
    assert rollouts.prompt_text(Prompt(messages=[user])) == "hello"
    system = ChatMessage(role="system", content="be brief")
    assert (
        rollouts.prompt_text(Prompt(messages=[system, user])) == "[system]\nbe brief\n[user]\nhello"
    )


def test_places_of_pictures_are_words(window: Window, tmp_path: Path) -> None:
    """Of a question the last turn's, counted from those of the turns before it."""
    picture = PictureReference(path="a.png", sha256="0" * 64, width=8, height=8)
    visit = window.visits[0]
    messages = [
        ChatMessage(role="user", content=f"a {PLACE}"),
        ChatMessage(role="user", content=PLACE),
    ]
    prompt = Prompt(messages=messages, media=[picture, picture])
    visit.plain.prompt = prompt
    visit.question = msgspec.structs.replace(
        visit.question, text=f"Is it {PLACE}?", media=(picture, picture)
    )
    row = next(row for row in rows_of(window, tmp_path) if row.kind == "plain")
    assert row.question == "Is it [picture 2]?"
    assert row.prompt == "[user]\na [picture 1]\n[user]\n[picture 2]"
