"""The folder of a corpus while it is built and when it is whole.

    OUT/corpus.json        what the corpus is (`zppo.data.sources.built`), written last
    OUT/train.jsonl        its rows
    OUT/media/ab/ab….png   its pictures, named by the SHA-256 of what is in them
    OUT/report.txt, .json  what was dropped by which rule
    OUT/.build/            the ledger and half-written files, until the corpus is whole

Every file is written aside and then gets its name, so what has a name is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from zppo.curation.examples import Picture
from zppo.curation.ledger import Ledger
from zppo.curation.report import Report, report_text
from zppo.curation.shards import Shard
from zppo.data.media import MEDIA, keep
from zppo.data.sources.built import MANIFEST, ROWS, Manifest, read_manifest
from zppo.errors import UserError

REPORT, TEXT = "report.json", "report.txt"
LOCK, LEDGER, ASIDE = "lock", "ledger.sqlite", "aside"
_AT_WORK = {LOCK, ASIDE, LEDGER, *(f"{LEDGER}-{kind}" for kind in ("wal", "shm", "journal"))}
"""All that `.build` may hold: it is removed in the end, and other programs call folders so, too."""


class Hopeless(UserError):
    """Nothing can come of this build; what it found out is thrown away, so that the next one looks
    at the data again."""


class Folder:
    """One `--out`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._work = out / ".build"

    # ---- whole -----------------------------------------------------------------------------------

    def manifest(self, recipe: str, recipe_digest: str, prompt_digest: str) -> Manifest | None:
        """Of the whole corpus of this recipe, if it is there. Raises UserError if another is."""
        if not (self.out / MANIFEST).is_file():
            return None
        manifest = read_manifest(self.out)
        found = (manifest.recipe_sha256, manifest.prompt_sha256)
        self._refuse_other((manifest.recipe, *found), (recipe, recipe_digest, prompt_digest))
        shutil.rmtree(self._work, ignore_errors=True)
        return manifest

    def report(self) -> Report:
        """Raises UserError where it is damaged."""
        file = self.out / REPORT
        try:
            return msgspec.json.decode(file.read_bytes(), type=Report)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UserError(
                f"{file}: cannot be read ({error}); build the corpus again in another --out"
            ) from None

    def _refuse_other(self, found: tuple[str, str, str], given: tuple[str, str, str]) -> None:
        if found[1] != given[1]:
            same = " of the same name" if found[0] == given[0] else ""
            raise UserError(
                f"--out {self.out}: holds what another recipe{same} made, {found[0]} "
                f"({found[1][:12]}…), and this is {given[0]} ({given[1][:12]}…); expected an empty "
                "folder"
            )
        if found[2] != given[2]:
            raise UserError(
                f"--out {self.out}: prompts were measured with another --tokenizer or other "
                "--templates; expected the same, or an empty folder"
            )

    # ---- at work ---------------------------------------------------------------------------------

    @contextmanager
    def work(
        self, recipe: str, recipe_digest: str, prompt_digest: str, shards: Sequence[Shard]
    ) -> Iterator[Ledger]:
        """The ledger of a build, begun or gone on with; when the block ends without an exception
        the work is removed. Raises UserError for a folder that holds something else."""
        self._refuse_other_files()
        try:
            self._work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--out {self.out}: cannot be made ({error.strerror}); expected a folder that can "
                "be written"
            ) from None
        with (self._work / LOCK).open("w") as lock:
            self._lock(lock.fileno())
            ledger = Ledger(self._work / LEDGER)
            try:
                self._bind(ledger, (recipe, recipe_digest, prompt_digest), shards)
                yield ledger
            except Hopeless:
                ledger.close()
                shutil.rmtree(self._work)
                raise
            finally:
                ledger.close()
            shutil.rmtree(self._work)

    def _refuse_other_files(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out}: is a file; expected a folder")
        if self._work.is_dir():
            found = {one.name for one in self._work.iterdir()}
            others = [f".build/{name}" for name in found - _AT_WORK]
        else:
            others = [one.name for one in self.out.iterdir()] if self.out.is_dir() else []
        if others:
            raise UserError(
                f"--out {self.out}: holds {min(others)!r} and nothing of a corpus; expected an "
                "empty folder"
            )

    def _lock(self, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--out {self.out}: another zppo build-data is at work there; expected one at a "
                "time"
            ) from None

    def _bind(self, ledger: Ledger, given: tuple[str, str, str], shards: Sequence[Shard]) -> None:
        """What was begun is gone on with by the same recipe, prompts and files."""
        stamps = [shard.stamp for shard in shards]
        told = msgspec.json.encode([given, stamps]).decode()
        before = ledger.fact("order")
        if before is None:
            ledger.note("order", told)
            return
        (recipe, recipe_digest, prompt_digest), old = msgspec.json.decode(
            before, type=tuple[tuple[str, str, str], list[tuple[str, str, int, int]]]
        )
        self._refuse_other((recipe, recipe_digest, prompt_digest), given)
        if old != stamps:
            source, name, *_ = sorted(set(old) ^ set(stamps))[0]
            raise UserError(
                f"--out {self.out}: was begun with other files, the first that differs is {name!r} "
                f"of {source}; expected the same files, or an empty folder"
            )

    # ---- files -----------------------------------------------------------------------------------

    def keep(self, picture: Picture, data: bytes) -> None:
        """Put a picture into `media`, unless it is there."""
        keep(self.out / MEDIA / picture.file, data, picture.sha256, self._work / ASIDE)

    def pictures(self) -> int:
        """Files in `media`."""
        return sum(1 for _ in (self.out / MEDIA).glob("*/*"))

    def write_rows(self, lines: Iterable[bytes]) -> tuple[int, str]:
        """Write the rows; their number, and the SHA-256 (hex) of the file."""
        sha, rows = hashlib.sha256(), 0

        def told() -> Iterator[bytes]:
            nonlocal rows
            for line in lines:
                sha.update(line)
                rows += 1
                yield line

        self._put(self.out / ROWS, told(), sync=True)
        return rows, sha.hexdigest()

    def write_report(self, report: Report) -> None:
        self._put(self.out / REPORT, [_pretty(report)])
        self._put(self.out / TEXT, [report_text(report).encode()])

    def write_manifest(self, manifest: Manifest) -> None:
        self._put(self.out / MANIFEST, [_pretty(manifest)], sync=True)

    def _put(self, file: Path, parts: Iterable[bytes], sync: bool = False) -> None:
        aside = self._work / ASIDE
        with aside.open("wb") as stream:
            stream.writelines(parts)
            if sync:
                stream.flush()
                os.fsync(stream.fileno())
        aside.replace(file)


def _pretty(value: Report | Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
