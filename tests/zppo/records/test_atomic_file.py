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


WRITES = """
import sys
from pathlib import Path
from zppo.records.atomic_file import written_whole

print("before", flush=True)
with written_whole(Path(sys.argv[1])) as file:
    file.write(b"whole\\n")
print("after")
"""


def test_what_stands_for_the_output_is_written_to_where_that_is_a_file(tmp_path: Path) -> None:
    """As `--out /dev/stdout >> log`: nothing is lost, and the link stays one."""
    link, log = tmp_path / "link", tmp_path / "log"
    link.symlink_to("/dev/stdout")
    log.write_text("earlier\n")
    command = [sys.executable, "-P", "-c", WRITES, str(link)]
    with log.open("ab") as output:
        subprocess.run(command, stdout=output, check=True)
    assert log.read_text() == "earlier\nbefore\nwhole\nafter\n"
    closed = ["sh", "-c", '"$@" >&-', "sh", *command]
    done = subprocess.run(closed, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "Bad file descriptor" in done.stderr
    assert link.is_symlink() and sorted(tmp_path.iterdir()) == [link, log]


def test_links_in_a_circle_are_replaced(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    path.symlink_to(other)
    other.symlink_to(path)
    with written_whole(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and not path.is_symlink()


def test_a_folder_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, Path()):
        with pytest.raises(IsADirectoryError), written_whole(folder) as file:
            file.write(b"")
    assert list(tmp_path.iterdir()) == []
