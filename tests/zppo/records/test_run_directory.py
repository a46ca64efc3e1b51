"""The record of a run: what it keeps from one life to the next."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from worlds import topology

from zppo.errors import UserError
from zppo.records import run_directory


def test_deaths_on_a_window_are_counted_over_lives_until_it_is_trained(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_directory.create(run, topology())
    assert run_directory.count_death(run, 3).redraws == {}
    assert run_directory.renew(run, 2).redraws == {}
    assert run_directory.count_death(run, 3).redraws == {3: 1}
    for window in (3, 5, 3):
        run_directory.count_death(run, window)
    record = run_directory.renew(run, 2)
    assert (record.trainer_deaths, record.redraws) == ({3: 4, 5: 1}, {3: 2})
    assert run_directory.read(run) == record
    assert run_directory.renew(run, 4).trainer_deaths == {5: 1}


def test_a_record_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    run = tmp_path / "run"
    record = run_directory.create(run, topology())
    raw = msgspec.json.decode((run / "run.json").read_bytes())
    del raw["trainer_deaths"]
    (run / "run.json").write_bytes(msgspec.json.encode(raw))
    assert run_directory.read(run) == record


def test_records_may_lie_on_another_disk(tmp_path: Path) -> None:
    """A link to a folder is the user's, and what is in that folder may be another run's."""
    run, elsewhere = tmp_path / "run", tmp_path / "big"
    run.mkdir()
    elsewhere.mkdir()
    (run / "checkpoints").symlink_to(elsewhere)
    run_directory.create(run, topology())
    assert (run / "checkpoints").is_symlink()
    (elsewhere / "mine").touch()
    with pytest.raises(UserError) as caught:
        run_directory.create(run, topology())
    assert str(caught.value) == (
        f"run.directory: {str(run / 'checkpoints')!r} leads to a folder that is not empty; empty "
        "it, or remove the link"
    )
    assert (elsewhere / "mine").exists()
