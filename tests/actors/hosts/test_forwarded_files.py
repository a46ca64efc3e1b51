"""Logs and timelines of a further host reach the run directory in parts, whatever is lost between."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo.records.atomic_file import written_whole
from zppo_actors.hosts import tails
from zppo_actors.hosts.tails import Tails
from zppo_actors.supervisor import received_files
from zppo_actors.supervisor.received_files import ReceivedFiles
from zppo_protocol.values import FilePart

LOG = "logs/rollout-0.log"
TIMELINE = "timeline/rollout-0.jsonl"


class Pair:
    """The folder of a host and the run directory, both with both files' folders."""

    def __init__(self, folder: Path) -> None:
        self.there, self.here = folder / "there", folder / "here"
        for path in (self.there / LOG, self.there / TIMELINE, self.here / LOG):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.tails, self.files = Tails(self.there), ReceivedFiles(self.here)
        self.files.allow("rollout-0")
        self.files.begin()

    def write(self, name: str, data: bytes) -> None:
        with (self.there / name).open("ab") as file:
            file.write(data)

    def pass_on(self, received: dict[str, tuple[int, int]] | None = None) -> None:
        for part in self.tails.parts(self.files.received if received is None else received):
            self.files.take(part)

    def read(self, name: str) -> bytes:
        return (self.here / name).read_bytes()


Steps = st.lists(
    st.one_of(
        st.binary(min_size=1, max_size=50),
        st.sampled_from(["pass on", "repeat", "lose", "thin"]),
    ),
    max_size=40,
)


@given(Steps)
@settings(deadline=None)
def test_every_byte_comes_once(
    tmp_path_factory: pytest.TempPathFactory, steps: list[object]
) -> None:
    pair = Pair(tmp_path_factory.mktemp("pair"))
    for step in steps:
        known = dict(pair.files.received)
        if isinstance(step, bytes):
            pair.write(LOG, step)
            pair.write(TIMELINE, step)
        elif step == "thin":  # as the timeline does when it has become long
            with written_whole(pair.there / TIMELINE) as file:
                file.write(b"thinned")
        elif step == "lose":
            pair.tails.parts(known)
        else:
            pair.pass_on()
            if step == "repeat":  # the word of what has come is late
                pair.pass_on(known)
    pair.pass_on()
    for name in (LOG, TIMELINE):
        if (pair.there / name).exists():
            assert pair.read(name) == (pair.there / name).read_bytes()


def test_what_was_there_before_stays(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    (pair.here / LOG).write_bytes(b"an earlier attempt\n")
    pair.write(LOG, b"this one\n")
    pair.pass_on()
    assert pair.read(LOG) == b"an earlier attempt\nthis one\n"


def test_a_log_that_is_too_fast_is_cut_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tails, "PART_BYTES", 10)
    monkeypatch.setattr(tails, "MOST_BEHIND", 100)
    pair = Pair(tmp_path)
    pair.write(LOG, bytes(range(200)))
    pair.pass_on()
    assert pair.read(LOG) == b"\n[190 bytes are left out]\n" + bytes(range(190, 200))


def test_a_long_log_does_not_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tails, "LONGEST_LOG", 10)
    pair = Pair(tmp_path)
    pair.write(LOG, b"twenty bytes of a log")
    pair.pass_on()
    pair.pass_on()
    assert (pair.there / LOG).read_bytes() == b""
    pair.write(LOG, b", and more")
    pair.pass_on()
    assert pair.read(LOG) == b"twenty bytes of a log, and more"


@pytest.mark.parametrize("path", ["run.json", "logs/supervisor.log", "logs/../run.json", "/etc/x"])
def test_a_host_writes_nothing_but_the_files_of_its_actors(tmp_path: Path, path: str) -> None:
    pair = Pair(tmp_path)
    pair.files.take(FilePart(path, 0, 0, b"x"))
    assert [found for found in pair.here.rglob("*") if found.is_file()] == []


def test_the_files_of_an_attempt_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(received_files, "MOST_BYTES", 10)
    pair = Pair(tmp_path)
    for start in range(0, 100, 5):
        pair.files.take(FilePart(LOG, 0, start, b"12345"))
    assert len(pair.read(LOG)) == 10
