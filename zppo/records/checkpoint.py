"""Checkpoints that are whole or not there.

A checkpoint is built in a hidden *partial* folder, `checkpoints/.step-N.partial`. The trainer
writes its share there, the controller adds the state of the scheduler and calls `commit`. The
invariant: a folder called `step-N` holds every file its `manifest.json` names, byte for byte. It is
kept by order alone: files are synced first, the manifest (size and SHA-256 of each file) is written
last, and only then the folder gets its name. A crash at any point leaves the earlier checkpoints as
they were. `find_latest` trusts no name: it re-reads the files and steps over what does not match.

File work only: nothing here knows what the files mean.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

from zppo.errors import UserError
from zppo.records.binding import MadeWith

MANIFEST = "manifest.json"
SCHEDULER = "scheduler.msgpack"
MODEL = "model"

_STEP = re.compile(r"step-(0|[1-9]\d*)")
_LEFTOVER = re.compile(r"\.step-(\d+)\.(?:partial|removed)")
_BLOCK = 1 << 20


class FileRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and SHA-256 (hex) of one file."""

    size: int
    sha256: str


class Manifest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a checkpoint consists of; `files` maps POSIX paths inside the folder to their records.
    `made_with`: what it belongs to, None in those of earlier versions."""

    format: int = 1
    step: int
    files: dict[str, FileRecord]
    made_with: MadeWith | None = None


class Found(Struct, frozen=True):
    """The newest whole checkpoint (or None), and one sentence for each newer one that is torn."""

    step: int
    folder: Path | None
    warnings: list[str]


# ---- names ---------------------------------------------------------------------------------------


def checkpoints_folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def final_folder(run_dir: Path, step: int) -> Path:
    return checkpoints_folder(run_dir) / f"step-{step}"


def partial_folder(run_dir: Path, step: int) -> Path:
    return checkpoints_folder(run_dir) / f".step-{step}.partial"


# ---- writing -------------------------------------------------------------------------------------


def begin(run_dir: Path, step: int) -> Path:
    """Make the empty partial folder of `step`; what a crash left there under the same name goes
    away."""
    folder = partial_folder(run_dir, step)
    _take_away(folder)
    folder.mkdir(parents=True)
    return folder


def discard(run_dir: Path, step: int) -> None:
    """Remove the partial folder of `step`, so that a checkpoint that failed takes no space."""
    shutil.rmtree(partial_folder(run_dir, step), ignore_errors=True)


def write_file(path: Path, data: bytes) -> None:
    """Write one file of a partial folder and sync it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_manifest(folder: Path, step: int, made_with: MadeWith | None = None) -> Manifest:
    """Sync every file below `folder`, then write `manifest.json` with their sizes and digests.
    Returns the manifest."""
    files = {
        path.relative_to(folder).as_posix(): _record(path, sync=True) for path in _files(folder)
    }
    manifest = Manifest(step=step, files=files, made_with=made_with)
    for directory in _directories(folder):
        _sync_directory(directory)
    write_file(folder / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest)))
    _sync_directory(folder)
    return manifest


def commit(run_dir: Path, step: int, made_with: MadeWith | None = None) -> Path:
    """Turn the partial folder of `step` into the checkpoint `step-<step>` and return its folder.

    An older folder of that name (a torn one, when a resumed run reaches the step again) is
    replaced.
    """
    partial, final = partial_folder(run_dir, step), final_folder(run_dir, step)
    write_manifest(partial, step, made_with)
    if os.path.lexists(final):
        _remove(final)
    os.replace(partial, final)
    _sync_directory(final.parent)
    return final


def prune(run_dir: Path, keep: int, newest: int) -> list[int]:
    """Remove all but the `keep` newest checkpoints up to step `newest`, and what crashes left
    behind.

    Call it after `commit` of `newest`. Later checkpoints belong to a future that was lost (a resume
    stepped over them) and go as well; a later partial folder is being written and stays. Returns
    the steps removed. `keep` is at least 1.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    kept = [step for step in list_steps(run_dir) if step <= newest][:keep]
    steps = [step for step in list_steps(run_dir) if step not in kept]
    for step in steps:
        _remove(final_folder(run_dir, step))
    for path in _leftovers(run_dir, newest):
        _take_away(path)
    return steps


def _remove(final: Path) -> None:
    """Take the name away first, so that a crash half-way leaves no torn folder under a checkpoint's
    name."""
    hidden = final.with_name(f".{final.name}.removed")
    _take_away(hidden)
    os.replace(final, hidden)
    _take_away(hidden)


def _take_away(folder: Path) -> None:
    """Remove a folder if it is there. Of one that was moved elsewhere and linked to, the link
    goes."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


# ---- reading -------------------------------------------------------------------------------------


def list_steps(run_dir: Path) -> list[int]:
    """Steps of the folders that carry a checkpoint's name, newest first, whole or not."""
    folder = checkpoints_folder(run_dir)
    if not folder.is_dir():
        return []
    matches = (_STEP.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def find_latest(run_dir: Path) -> Found:
    """Return the newest whole checkpoint; `step` is 0 and `folder` None when there is none."""
    warnings: list[str] = []
    for step in list_steps(run_dir):
        folder = final_folder(run_dir, step)
        problem = find_problem(folder)
        if problem is None:
            return Found(step, folder, warnings)
        warnings.append(f"checkpoint {folder} is not whole and is skipped: {problem}")
    return Found(0, None, warnings)


def verify(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint folder after checking every file. Raises UserError if
    anything differs."""
    problem = find_problem(folder)
    if problem is not None:
        raise UserError(f"{folder}: not a whole checkpoint: {problem}")
    return _read_manifest(folder)


def read_made_with(folder: Path) -> MadeWith | None:
    """What a whole checkpoint says it was made with."""
    return _read_manifest(folder).made_with


def find_problem(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint folder, or None if every file is as its manifest says."""
    try:
        manifest = _read_manifest(folder)
        if manifest.step != int(folder.name.removeprefix("step-")):
            return f"{MANIFEST} speaks of step {manifest.step}"
        problems = (_file_problem(folder, name, record) for name, record in manifest.files.items())
        return next((problem for problem in problems if problem), None)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return f"it cannot be read ({error})"


def _read_manifest(folder: Path) -> Manifest:
    return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)


def _file_problem(folder: Path, name: str, record: FileRecord) -> str | None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        return f"{MANIFEST} names a file outside the folder, {name!r}"
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != record.size:
        return f"{name} has {size} bytes instead of {record.size}"
    return (
        None
        if _record(path, sync=False) == record
        else f"{name} has other content than its SHA-256 says"
    )


# ---- files ---------------------------------------------------------------------------------------


def _files(folder: Path) -> Iterator[Path]:
    return (
        path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST
    )


def _directories(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_dir())


def _leftovers(run_dir: Path, newest: int) -> list[Path]:
    found = (
        (path, _LEFTOVER.fullmatch(path.name)) for path in checkpoints_folder(run_dir).iterdir()
    )
    return [path for path, match in found if match and int(match[1]) <= newest]


def _record(path: Path, *, sync: bool) -> FileRecord:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
        if sync:
            os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def _sync_directory(path: Path) -> None:
    """Make renames and new names in a folder durable; a no-op where folders cannot be opened
    (Windows)."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
