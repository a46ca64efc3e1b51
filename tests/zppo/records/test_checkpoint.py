"""Checkpoints are whole or not there: the order of writing, a kill at every point, damage,
pruning."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo.errors import UserError
from zppo.records import checkpoint
from zppo.records.checkpoint import (
    begin,
    commit,
    find_latest,
    find_problem,
    list_steps,
    partial_folder,
    prune,
    verify,
)


def make(run_dir: Path, step: int, content: bytes = b"weights") -> Path:
    """Commit a small checkpoint with a nested file."""
    folder = begin(run_dir, step)
    (folder / "model").mkdir()
    checkpoint.write_file(folder / "model" / "model.safetensors", content * 10)
    checkpoint.write_file(folder / "scheduler.msgpack", b"%d" % step)
    return commit(run_dir, step)


def test_commit_names_every_file_with_its_size_and_digest(tmp_path: Path) -> None:
    folder = make(tmp_path, 20)
    assert folder == tmp_path / "checkpoints" / "step-20"
    assert not partial_folder(tmp_path, 20).exists()
    manifest = verify(folder)
    assert manifest.step == 20
    assert sorted(manifest.files) == ["model/model.safetensors", "scheduler.msgpack"]
    assert manifest.files["scheduler.msgpack"].size == 2
    digest = "f5ca38f748a1d6eaf726b8a42fb575c3c71f1864a8143301782de13da2d9202b"
    assert manifest.files["scheduler.msgpack"].sha256 == digest


def test_find_latest_of_nothing(tmp_path: Path) -> None:
    assert find_latest(tmp_path) == checkpoint.Found(0, None, [])


def test_find_latest_takes_the_highest_number_not_the_last_word(tmp_path: Path) -> None:
    for step in (9, 10):
        make(tmp_path, step)
    assert find_latest(tmp_path).step == 10


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (_truncate, "model/model.safetensors has 69 bytes instead of 70"),
        (_flip, "model/model.safetensors has other content than its SHA-256 says"),
        (Path.unlink, "model/model.safetensors is missing"),
    ],
)
def test_a_torn_checkpoint_is_named_and_skipped(
    tmp_path: Path, damage: Callable[[Path], None], problem: str
) -> None:
    whole, torn = make(tmp_path, 2), make(tmp_path, 4)
    damage(torn / "model" / "model.safetensors")
    found = find_latest(tmp_path)
    assert (found.step, found.folder) == (2, whole)
    assert found.warnings == [f"checkpoint {torn} is not whole and is skipped: {problem}"]
    with pytest.raises(UserError) as error:
        verify(torn)
    assert str(error.value) == f"{torn}: not a whole checkpoint: {problem}"


def test_a_checkpoint_without_its_manifest_is_torn(tmp_path: Path) -> None:
    folder = make(tmp_path, 4)
    (folder / "manifest.json").unlink()
    assert find_problem(folder) == "manifest.json is missing"


@pytest.mark.parametrize("data", [b"", b"{", b'{"step": 4}', b"\xff\xfe", b"[" * 10_000])
def test_a_damaged_manifest_is_a_problem_not_a_crash(tmp_path: Path, data: bytes) -> None:
    folder = make(tmp_path, 4)
    (folder / "manifest.json").write_bytes(data)
    problem = find_problem(folder)
    assert problem is not None and problem.startswith("it cannot be read (")


def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    folder = make(tmp_path, 4)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["files"]["../../secret"] = {"size": 1, "sha256": "0"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert find_problem(folder) == "manifest.json names a file outside the folder, '../../secret'"


def test_a_renamed_checkpoint_is_not_another_step(tmp_path: Path) -> None:
    folder = make(tmp_path, 4)
    folder.rename(folder.with_name("step-40"))
    assert find_problem(tmp_path / "checkpoints" / "step-40") == "manifest.json speaks of step 4"


def test_a_torn_folder_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    torn = make(tmp_path, 4)
    (torn / "scheduler.msgpack").unlink()
    make(tmp_path, 4, b"again")
    assert find_latest(tmp_path) == checkpoint.Found(4, torn, [])


def test_begin_clears_what_a_crash_left(tmp_path: Path) -> None:
    (begin(tmp_path, 4) / "half.safetensors").write_bytes(b"x")
    assert list(begin(tmp_path, 4).iterdir()) == []


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(steps=st.sets(st.integers(0, 2000), max_size=6), keep=st.integers(1, 4))
def test_prune_keeps_the_newest(
    tmp_path_factory: pytest.TempPathFactory, steps: set[int], keep: int
) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    for step in steps:
        (run_dir / "checkpoints" / f"step-{step}").mkdir(parents=True)
    begin(run_dir, 5000)
    newest_first = sorted(steps, reverse=True)
    assert prune(run_dir, keep, newest=5000) == newest_first[keep:]
    assert list_steps(run_dir) == newest_first[:keep]
    assert not partial_folder(run_dir, 5000).exists()
    shutil.rmtree(run_dir)


def test_a_checkpoint_that_was_moved_and_linked_to_stays_where_it_is(tmp_path: Path) -> None:
    """Pruned or written again, its link goes; what it leads to is not this run's any more."""
    run_dir, elsewhere = tmp_path / "run", tmp_path / "archive"
    elsewhere.mkdir()
    for step in (1, 2, 3):
        moved = shutil.move(make(run_dir, step), elsewhere)
        (checkpoint.checkpoints_folder(run_dir) / f"step-{step}").symlink_to(moved)
    assert find_latest(run_dir).step == 3
    assert make(run_dir, 3).is_symlink() is False
    assert prune(run_dir, keep=1, newest=3) == [2, 1]
    assert list_steps(run_dir) == [3]
    assert all(find_problem(elsewhere / f"step-{step}") is None for step in (1, 2, 3))


def test_prune_leaves_foreign_names_alone(tmp_path: Path) -> None:
    for name in ("notes", "step-x", "step-007", ".step-3.backup"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert prune(tmp_path, 1, newest=9) == []
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4


def test_prune_must_keep_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1, not 0"):
        prune(tmp_path, 0, newest=9)


def test_prune_after_a_resume_removes_the_lost_future_and_keeps_the_whole_checkpoint(
    tmp_path: Path,
) -> None:
    for step in (10, 12):
        make(tmp_path, step)
    (tmp_path / "checkpoints" / "step-20").mkdir()
    begin(tmp_path, 14)
    assert prune(tmp_path, 1, newest=12) == [20, 10]
    assert find_latest(tmp_path).step == 12
    assert partial_folder(tmp_path, 14).exists(), "the next checkpoint may be on its way already"


KILLED = """
import os, sys
from pathlib import Path
from zppo.records import checkpoint

run_dir, fatal = Path(sys.argv[1]), int(sys.argv[2])
count = 0

def dying(original):
    def call(*arguments):
        global count
        count += 1
        if count == fatal:
            if original is os.fsync and os.path.isfile(f"/proc/self/fd/{arguments[0]}"):
                os.truncate(f"/proc/self/fd/{arguments[0]}", os.fstat(arguments[0]).st_size // 2)
            os._exit(9)
        return original(*arguments)
    return call

os.fsync, os.replace = dying(os.fsync), dying(os.replace)
folder = checkpoint.begin(run_dir, 3)
for name in ("model.safetensors", "scheduler.msgpack"):
    checkpoint.write_file(folder / name, b"3" * 1000)
checkpoint.commit(run_dir, 3)
checkpoint.prune(run_dir, 1, newest=3)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="tears files through /proc")
def test_a_kill_at_any_write_or_rename_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """The child dies at its n-th sync or rename, having lost half of the file being synced, for
    every n."""
    seen, fatal, code = set(), 0, 9
    while code == 9:
        fatal += 1
        run_dir = tmp_path / str(fatal)
        make(run_dir, 1)
        code = subprocess.run(
            [sys.executable, "-c", KILLED, str(run_dir), str(fatal)], check=False
        ).returncode
        found = find_latest(run_dir)
        assert found.folder is not None and found.warnings == []
        seen.add(found.step)
        make(run_dir, 5)
        assert prune(run_dir, 1, newest=5) is not None and find_latest(run_dir).step == 5
        assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-5"]
    assert code == 0 and seen == {1, 3} and fatal > 8
