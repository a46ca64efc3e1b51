"""A file is whole or absent, whatever happens while it is written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from zppo.records.atomic_file import aside_of, written_whole


@pytest.mark.parametrize("synced", [False, True])
def test_the_old_content_stays_until_the_new_is_whole(tmp_path: Path, synced: bool) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(b"old")
    with written_whole(path, synced=synced) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old" and aside_of(path).read_bytes() == b"new"
    assert path.read_bytes() == b"new"
    assert [one.name for one in tmp_path.iterdir()] == ["state.json"]


def test_a_failure_leaves_the_old_content_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), written_whole(path) as file:
        file.write(b"ne")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == ["state.json"]


def test_a_killed_writer_leaves_the_old_content_and_the_next_one_is_not_disturbed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(b"old")
    program = (
        "import os, pathlib, signal, sys\n"
        "from zppo.records.atomic_file import written_whole\n"
        "with written_whole(pathlib.Path(sys.argv[1])) as file:\n"
        "    file.write(b'a long half of it'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, str(path)], env=dict(os.environ), check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old" and aside_of(path).exists()
    with written_whole(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and not aside_of(path).exists()


def test_a_folder_that_is_missing_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), written_whole(tmp_path / "nowhere" / "x") as file:
        file.write(b"")


def test_a_link_that_lies_aside_is_not_followed(tmp_path: Path) -> None:
    path, other = tmp_path / "page.html", tmp_path / "other"
    other.write_bytes(b"another's")
    aside_of(path).symlink_to(other)
    with written_whole(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and not path.is_symlink()
    assert other.read_bytes() == b"another's" and not aside_of(path).exists()


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    """As `--out /dev/stdout`, which an administrator could replace by a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with written_whole(pipe) as file:
        file.write(b"new")
    assert os.read(reader, 10) == b"new" and pipe.is_fifo()
    os.close(reader)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, Path()):
        with pytest.raises(IsADirectoryError), written_whole(folder) as file:
            file.write(b"")
    assert list(tmp_path.iterdir()) == []
