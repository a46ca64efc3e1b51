"""What a checkpoint was made with."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from worlds import topology

from zppo.config.topology import Topology
from zppo.errors import UserError
from zppo.records import checkpoint
from zppo.records.binding import (
    FIXED,
    MadeWith,
    check_folders,
    first_difference,
    fixed_settings,
    made_with,
)


def test_every_fixed_setting_is_there_and_no_other() -> None:
    names = set(fixed_settings(topology()))
    raw = msgspec.to_builtins(topology())
    for path in FIXED:
        section, _, name = path.partition(".")
        assert ({path} if name else {f"{section}.{key}" for key in raw[section]}) & names
    assert {name.partition(".")[0] for name in names} == {
        "actors", "method", "data", "student", "run", "optimizer", "scheduler",
    }  # fmt: skip
    some = ("run.", "optimizer.", "scheduler.", "actors.")
    assert {name for name in names if name.startswith(some)} == {
        "run.seed", "optimizer.state_dtype", "scheduler.max_staleness", "scheduler.batches",
        "actors.trainer.ranks",
    }  # fmt: skip


def test_the_first_difference_is_named_with_its_reason() -> None:
    old = fixed_settings(topology())
    new = fixed_settings(topology(student={"model": "student", "sampling": {"top_k": 3}}))
    assert first_difference(old, old) is None
    assert first_difference(old, new) == (
        "student.sampling.top_k", 0, 3, "the checkpoint holds another student",
    )  # fmt: skip
    wider = fixed_settings(topology(scheduler={"max_staleness": 4}, run={"steps": 9}))
    assert first_difference(old, wider) is None, "these may change"
    assert first_difference({**old, "method.of_old": 1}, {**new, **old, "method.new": 2}) is None


def test_batches_that_are_not_set_are_windows() -> None:
    old = fixed_settings(topology())
    before = {name: value for name, value in old.items() if name != "scheduler.batches"}
    windows = fixed_settings(topology(scheduler={"batches": "windows"}))
    filled = fixed_settings(topology(scheduler={"batches": "filled"}))
    assert first_difference(old, windows) is None and first_difference(windows, old) is None
    assert first_difference(before, filled) is None, "a run of before there was a choice"
    assert first_difference(old, filled) == (
        "scheduler.batches", "windows", "filled", "what is in flight was begun for the other",
    )  # fmt: skip


def test_a_manifest_keeps_it_and_those_without_it_are_read(tmp_path: Path) -> None:
    made = made_with(topology(), "digest")
    for step, value in ((1, made), (2, None)):
        checkpoint.begin(tmp_path, step)
        folder = checkpoint.commit(tmp_path, step, value)
        assert checkpoint.find_problem(folder) is None
        assert checkpoint.read_made_with(folder) == value
    manifest = tmp_path / "checkpoints/step-2/manifest.json"
    raw = msgspec.json.decode(manifest.read_bytes())
    del raw["made_with"]
    manifest.write_bytes(msgspec.json.encode(raw))
    assert checkpoint.find_latest(tmp_path).step == 2
    assert checkpoint.read_made_with(tmp_path / "checkpoints/step-2") is None


@pytest.fixture
def setting(small: Path) -> Topology:
    return topology(
        student={"model": str(small / "student")}, teacher={"model": str(small / "teacher")}
    )


@pytest.mark.parametrize(
    ("name", "advice"),
    [("student", ""), ("teacher", ", or name a copy of the new model in teacher.model")],
)
def test_a_swapped_model_folder_is_named(
    small: Path, setting: Topology, name: str, advice: str
) -> None:
    made = made_with(setting, "digest")
    assert set(made.models) == {str(small / "student"), str(small / "teacher")}
    check_folders(made, setting, made_with(setting, "digest"), 2)
    (small / name / "tokenizer_config.json").write_text('{"eos_token": "<unk>"}')
    with pytest.raises(UserError) as caught:
        check_folders(made, setting, made_with(setting, "digest"), 2)
    assert str(caught.value) == (
        f"{name}.model: the files of {str(small / name)!r} have changed since the checkpoint of "
        f"step 2 was written; put the old ones back{advice}"
    )


def test_a_teacher_of_another_path_may_come(small: Path, setting: Topology) -> None:
    made = made_with(setting, "digest")
    (small / "teacher").rename(small / "other")
    other = topology(
        student={"model": str(small / "student")}, teacher={"model": str(small / "other")}
    )
    check_folders(made, other, made_with(other, "digest"), 2)


def test_a_model_behind_a_server_has_no_files(setting: Topology) -> None:
    served = msgspec.structs.replace(
        setting, teacher=msgspec.structs.replace(setting.teacher, model="org/served")
    )
    assert list(made_with(served, "digest").models) == [setting.student.model]
    assert isinstance(made_with(served, "digest"), MadeWith)
