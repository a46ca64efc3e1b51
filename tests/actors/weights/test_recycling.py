"""Files of released versions are written over, and no reader ever sees it happen."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zppo_actors.weights import PublicationRefused, shared_memory
from zppo_actors.weights.layout import weight_path
from zppo_actors.weights.recycling import SPARE, begun, opened, set_aside
from zppo_protocol.values import PolicyManifest

HOLD = """\
import mmap, pathlib, sys, time
from zppo_actors.weights.recycling import opened
with opened(pathlib.Path(sys.argv[1])) as file:
    memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
print(memory[:4].hex(), flush=True)
time.sleep(3600)
"""


def publish(version: int, folder: Path, count: int = 5000) -> PolicyManifest:
    return shared_memory.publish({"a": torch.full((count,), version)}, version, folder)


def content(manifest: PolicyManifest) -> Tensor:
    return shared_memory.open_policy(manifest)["a"]


def inode(version: int, folder: Path) -> int:
    return weight_path(folder, version).stat().st_ino


def inode_of(descriptor: int) -> int | None:
    """None where it is not open."""
    try:
        return os.fstat(descriptor).st_ino
    except OSError:
        return None


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_two_files_carry_all_versions(tmp_path: Path) -> None:
    """The newest, and the one before it, whose pages the next version takes."""
    inodes = set()
    for version in range(6):
        manifest = publish(version, tmp_path)
        assert torch.equal(content(manifest), torch.full((5000,), version))
        inodes.add(inode(version, tmp_path))
        shared_memory.remove(tmp_path, version - 1)
    assert len(inodes) == 2 and names(tmp_path) == [SPARE, "policy-5.bin"]


def test_a_folder_keeps_one_spare(tmp_path: Path) -> None:
    for version in range(3):
        publish(version, tmp_path)
    last = inode(1, tmp_path)
    for version in range(2):
        shared_memory.remove(tmp_path, version)
    assert names(tmp_path) == [SPARE, "policy-2.bin"]
    publish(3, tmp_path)
    assert names(tmp_path) == ["policy-2.bin", "policy-3.bin"] and inode(3, tmp_path) == last


@pytest.mark.parametrize("count", [1, 5000, 90_000])
def test_a_version_of_another_length_is_whole_on_old_pages(count: int, tmp_path: Path) -> None:
    publish(1, tmp_path)
    first = inode(1, tmp_path)
    shared_memory.remove(tmp_path, 1)
    manifest = publish(2, tmp_path, count)
    assert torch.equal(content(manifest), torch.full((count,), 2)) and inode(2, tmp_path) == first


def test_what_is_read_late_is_not_written_over(tmp_path: Path) -> None:
    """An engine that was taken for dead still holds tensors of a version that was released."""
    held = content(publish(1, tmp_path))
    first = inode(1, tmp_path)
    shared_memory.remove(tmp_path, 1)
    manifest = publish(2, tmp_path)
    assert torch.equal(held, torch.full((5000,), 1)) and inode(2, tmp_path) != first
    assert names(tmp_path) == ["policy-2.bin"], "the old pages go with the last reader"
    assert torch.equal(content(manifest), torch.full((5000,), 2))


def test_the_lock_of_a_killed_reader_is_gone_with_it(tmp_path: Path) -> None:
    publish(1, tmp_path)
    first, path = inode(1, tmp_path), weight_path(tmp_path, 1)
    reader = subprocess.Popen(
        [sys.executable, "-P", "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
    )
    with reader:
        assert reader.stdout is not None and reader.stdout.readline() == "01000000\n"
        shared_memory.remove(tmp_path, 1)
        publish(2, tmp_path)
        assert inode(2, tmp_path) != first, "another process maps it"
        reader.kill()
        assert reader.wait() == -signal.SIGKILL
    second = inode(2, tmp_path)
    shared_memory.remove(tmp_path, 2)
    publish(3, tmp_path)
    assert inode(3, tmp_path) == second


def test_a_killed_writer_leaves_a_file_that_nobody_takes_for_a_version(tmp_path: Path) -> None:
    publish(1, tmp_path)
    shared_memory.remove(tmp_path, 1)
    program = (
        "import os, pathlib, signal, sys\n"
        "from zppo.records.atomic_file import written_whole\n"
        "from zppo_actors.weights.recycling import begun\n"
        "with written_whole(pathlib.Path(sys.argv[1]), begun=begun) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, str(weight_path(tmp_path, 2))], check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert not weight_path(tmp_path, 2).exists() and len(names(tmp_path)) == 1
    assert torch.equal(content(publish(2, tmp_path)), torch.full((5000,), 2))
    assert names(tmp_path) == ["policy-2.bin"]


def test_a_publication_that_fails_on_old_pages_leaves_nothing(tmp_path: Path) -> None:
    publish(1, tmp_path)
    shared_memory.remove(tmp_path, 1)
    odd = {"a": torch.ones(3), "z": torch.ones(1, dtype=torch.complex64)}
    with pytest.raises(TypeError, match="has dtype"):
        shared_memory.publish(odd, 2, tmp_path)
    assert names(tmp_path) == []


def test_a_file_that_is_being_written_cannot_be_opened(tmp_path: Path) -> None:
    """A reader that found the name just before it was taken away, and locks too late."""
    manifest = publish(1, tmp_path)
    path = weight_path(tmp_path, 1)
    late = tmp_path / "the name that was found"
    late.hardlink_to(path)
    set_aside(path)
    with begun(tmp_path / "aside") as file:
        with pytest.raises(BlockingIOError):
            opened(late)
        memory = mmap.mmap(file.fileno(), 0)
    with pytest.raises(BlockingIOError):
        opened(late)
    memory.close()
    opened(late).close()
    with pytest.raises(PublicationRefused, match="No such file"):
        shared_memory.open_policy(manifest)


class Released(type(Path())):  # type: ignore[misc]  # the class that Path() gives here
    """A path whose file is released, and written over, as soon as it was found."""

    def open(self, *arguments: object, **options: object) -> object:
        file = super().open(*arguments, **options)
        shared_memory.remove(self.parent, 1)
        publish(2, Path(self.parent))
        return file


def test_a_file_that_became_another_version_after_it_was_found_is_not_opened(
    tmp_path: Path,
) -> None:
    publish(1, tmp_path)
    first = inode(1, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"policy-1\.bin"):
        opened(Released(weight_path(tmp_path, 1)))
    assert inode(2, tmp_path) == first, "the file that was found holds another version now"


def test_a_spare_has_one_writer_of_several(tmp_path: Path) -> None:
    """As where a trainer starts anew while the one before it dies slowly."""

    def write(writer: int) -> None:
        for version in range(writer, 400, 4):
            manifest = publish(version, tmp_path)
            assert torch.equal(content(manifest), torch.full((5000,), version))
            shared_memory.remove(tmp_path, version)

    with ThreadPoolExecutor(4) as writers:
        list(writers.map(write, range(4)))
    assert names(tmp_path) == [SPARE]


def test_a_version_can_be_read_whoever_inherited_the_lock_of_its_writer(tmp_path: Path) -> None:
    """As a process that was forked while the file was written."""
    publish(1, tmp_path)
    first = inode(1, tmp_path)
    shared_memory.remove(tmp_path, 1)
    inherited: list[int] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        writers = [number for number in range(1024) if inode_of(number) == first]
        inherited.extend(map(os.dup, writers))
        yield "a", torch.full((5000,), 2)

    manifest = shared_memory.publish_each(tensors(), 2, tmp_path)
    assert inode(2, tmp_path) == first and len(inherited) == 1
    assert torch.equal(content(manifest), torch.full((5000,), 2))
    os.close(inherited[0])


def test_nothing_is_written_over_where_a_file_system_has_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    held = content(publish(1, tmp_path))
    first = inode(1, tmp_path)
    shared_memory.remove(tmp_path, 1)
    manifest = publish(2, tmp_path)
    assert inode(2, tmp_path) != first and torch.equal(held, torch.full((5000,), 1))
    assert torch.equal(content(manifest), torch.full((5000,), 2))
    assert names(tmp_path) == ["policy-2.bin"]


def test_a_reader_that_gets_no_lock_where_there_are_some_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer could get one."""

    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    manifest = publish(1, tmp_path)
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(PublicationRefused, match="No locks available"):
        shared_memory.open_policy(manifest)
