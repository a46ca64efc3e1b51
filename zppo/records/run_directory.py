"""The run directory: where everything of a run lies, and `run.json`, the record of what the run is.

Layout: `run.json`, `journal.sqlite`, `checkpoints/step-N/`, `metrics.jsonl`, `tensorboard/`,
`sinks/`, `rollouts/`, `timeline/`, `logs/`, `bad_rows.txt`, `report/`. `run.json` is written aside
and renamed, so a reader sees a whole record or none. A run keeps its directory for good; its
`run_id` changes each time its processes start anew, so that a message from an earlier attempt can
be told apart. One process at a time may hold the directory: `hold` takes a file lock that the
kernel lets go of when the process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import msgspec
from msgspec import Struct

from zppo.config.topology import Topology
from zppo.errors import UserError
from zppo.plan.extensions import identities
from zppo.records.atomic_file import aside_of, written_whole
from zppo.records.checkpoint import list_steps
from zppo.records.ledger import JOURNAL, MAX_JOURNAL_ID

SOCKET_NAME = "controller.sock"
# sun_path holds 108 bytes on Linux and 104 on macOS, with the closing zero byte.
LONGEST_SOCKET_PATH = 103
RECORDED_PACKAGES = (
    "zppo",
    "torch",
    "transformers",
    "triton",
    "numpy",
    "numba",
    "msgspec",
    "pyzmq",
    *("tokenizers", "vllm", "pillow"),
    *("math-verify", "latex2sympy2_extended", "sympy", "reasoning-gym"),
)
"""Whose versions decide numbers: those of models, of prompts, and of grades."""


SKELETON = ("checkpoints", "logs", "rollouts")
"""The folders that every run directory has from its beginning."""
RECORDS = (
    *("checkpoints", "rollouts", "tensorboard", "sinks", "timeline", "report", "bad_rows.txt"),
    *("metrics.jsonl", "fates.jsonl", "heldout.jsonl"),
    *(f"{JOURNAL}{suffix}" for suffix in ("", "-wal", "-shm")),
)
"""What a run that is begun again leaves behind; its logs stay."""
DEADLY = 2
"""So many deaths of the trainer on one window, and its samples are to blame."""


class RunRecord(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Content of `run.json`. `start_step`: the step of the checkpoint that this attempt begins
    from, else 0. `corpus`: the digest of the training questions (`zppo.data.question.digest`);
    `contents`: digests of what else the steps are made of, by setting (`binding.CONTENTS`).
    `trainer_deaths`: how often the trainer died on a window that is not trained yet. `extensions`:
    identity of the user's own code, by its name in the topology (`zppo.plan.extensions`).
    `journal_id`: a number that the run's journal has too, 0 in runs of versions that gave none."""

    run_id: str
    created: str
    start_step: int
    corpus: str
    versions: dict[str, str]
    topology: Topology
    trainer_deaths: dict[int, int] = {}
    extensions: dict[str, str] = {}
    contents: dict[str, str] = {}
    journal_id: int = 0

    @property
    def redraws(self) -> dict[int, int]:
        """How often the samples of a window are to be thrown away: at each second death."""
        return {
            window: deaths // DEADLY
            for window, deaths in self.trainer_deaths.items()
            if deaths >= DEADLY
        }


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide numbers; absent packages are left out."""
    versions = {}
    for name in RECORDED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def create(
    path: Path,
    topology: Topology,
    corpus: str = "",
    bad_rows: str = "",
    contents: dict[str, str] | None = None,
) -> RunRecord:
    """Make the directory of a new run that trains on the questions of digest `corpus`; `bad_rows`
    are those left out, for its `bad_rows.txt`. One in which nothing was trained is begun again; its
    logs stay.

    Raises UserError if it is another's, in use, or cannot be made; then nothing is left that would
    be in the way of the next try.
    """
    fresh = _new_record(topology, 0, corpus, identities(topology))
    record = msgspec.structs.replace(
        fresh, contents=contents or {}, journal_id=1 + secrets.randbelow(MAX_JOURNAL_ID)
    )
    with _made(path):
        for folder in SKELETON:
            (path / folder).mkdir(exist_ok=True)
        if bad_rows:
            (path / "bad_rows.txt").write_text(bad_rows, encoding="utf-8")
        write(path, record)
    return record


@contextlib.contextmanager
def _made(path: Path) -> Iterator[None]:
    """A folder without records of steps, held while it is filled if others may see it already, and
    taken away if it is new and cannot be filled."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        if not untrained(path):
            raise UserError(in_the_way(path)) from None
        lock = hold(path)
        if lock is None:
            sentence = f"run.directory: {str(path)!r} is in use by a run that has not ended"
            raise UserError(sentence) from None
    except OSError as error:
        raise UserError(f"run.directory: cannot make {str(path)!r}: {error.strerror}") from None
    else:
        lock = None
    try:
        if lock is not None:
            _clear(path)
        yield
    except OSError as error:
        if lock is None:
            shutil.rmtree(path, ignore_errors=True)
        raise UserError(f"run.directory: cannot write in {str(path)!r}: {error.strerror}") from None
    finally:
        if lock is not None:
            os.close(lock)


def untrained(path: Path) -> bool:
    """Whether the folder is that of a run that trained nothing, begun in whole or in part; an empty
    one is, too."""
    if not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir()}
    ours = "run.json" in names or names <= {*SKELETON, "lock", aside_of(path / "run.json").name}
    return ours and not _steps_recorded(path) and not list_steps(path)


def _steps_recorded(path: Path) -> bool:
    file = path / "metrics.jsonl"
    return file.exists() and b"\n" in file.read_bytes()


def _clear(path: Path) -> None:
    """Raises UserError for a link to a folder that holds something: that may be another's."""
    for name in RECORDS:
        entry = path / name
        if entry.is_symlink() and entry.is_dir():  # somebody wants these on another disk
            if any(entry.iterdir()):
                raise UserError(
                    f"run.directory: {str(entry)!r} leads to a folder that is not empty; empty it, "
                    "or remove the link"
                )
        elif entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def in_the_way(path: Path) -> str:
    """The sentence for a directory that exists although a new run was asked for."""
    continued = "continue it with --resume" if list_steps(path) else "remove it"
    return f"run.directory: {str(path)!r} exists already; {continued}, or name another directory"


def read(path: Path) -> RunRecord:
    """Read `run.json`. Raises UserError if the folder is not a run or the record is damaged."""
    file = path / "run.json"
    try:
        return msgspec.json.decode(file.read_bytes(), type=RunRecord)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{str(path)!r} is not a run directory: it has no run.json") from None
    except OSError as error:
        raise UserError(f"{str(file)!r} cannot be read ({error.strerror})") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{str(file)!r} is not the record of a run: {error}") from None


def renew(path: Path, start_step: int, topology: Topology | None = None) -> RunRecord:
    """Begin another attempt at the run from the checkpoint of `start_step`, under a new run id.
    Raises UserError where the disk does not take its record."""
    old = read(path)
    # Attempts of one command go on with the code that it began with; a resume has compared it.
    extensions = identities(topology) if topology is not None else old.extensions
    topology = topology if topology is not None else old.topology
    record = msgspec.structs.replace(
        _new_record(topology, start_step, old.corpus, extensions),
        created=old.created,
        contents=old.contents,
        journal_id=old.journal_id,
        trainer_deaths={w: n for w, n in old.trainer_deaths.items() if w >= start_step},
    )
    _write_over(path, record)
    return record


def count_death(path: Path, window: int) -> RunRecord:
    """The trainer died on a window: count it, over all attempts of the run. Raises UserError as
    `renew` does."""
    old = read(path)
    deaths = {**old.trainer_deaths, window: old.trainer_deaths.get(window, 0) + 1}
    record = msgspec.structs.replace(old, trainer_deaths=deaths)
    _write_over(path, record)
    return record


def _write_over(path: Path, record: RunRecord) -> None:
    """Write `run.json` of a run that has begun. Raises UserError where the disk does not take it;
    the one before is whole then."""
    try:
        write(path, record)
    except OSError as error:
        raise UserError(
            f"{str(path / 'run.json')!r} cannot be written ({error.strerror}); expected room "
            "there, then zppo launch --resume"
        ) from None


def write(path: Path, record: RunRecord) -> None:
    """Write `run.json`, whole or not at all."""
    with written_whole(path / "run.json", synced=True) as file:
        file.write(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")


def hold(path: Path) -> int | None:
    """Lock the folder for this process. Returns the open descriptor of its lock file, or None if
    another holds it.

    The descriptor is not inherited by child processes: the lock ends with this process.
    """
    descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


class Place:
    """The folder that lies at a path now. It is kept open, so that no other gets its number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def problem(self) -> str | None:
        """The sentence for a folder that is no longer where it was, else None."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self.path), os.fstat(self._descriptor)):
                return None
        return (
            f"run.directory: {str(self.path)!r} was removed or replaced while the run went on, so "
            "what it recorded since then is lost; begin the run again, and leave its directory in "
            "its place"
        )

    def close(self) -> None:
        os.close(self._descriptor)


def runtime_base() -> Path:
    """Where the runtime folder of a run is made: `$ZPPO_RUNTIME_DIR`, else shared memory, else the
    temporary folder."""
    chosen = os.environ.get("ZPPO_RUNTIME_DIR")
    if chosen:
        if not Path(chosen).is_dir():
            raise UserError(f"ZPPO_RUNTIME_DIR is {chosen!r}; expected a folder that exists")
        return Path(chosen).absolute()
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def runtime_folder(run_id: str, base: Path) -> Path:
    """The runtime folder of one attempt of a run, `<base>/zppo-<uid>-<run_id>`. Raises UserError if
    the path of its socket is too long for the system."""
    folder = base / f"{runtime_prefix()}{run_id}"
    if len(os.fsencode(folder / SOCKET_NAME)) > LONGEST_SOCKET_PATH:
        raise UserError(
            f"the path of a socket in {str(folder)!r} is too long; set ZPPO_RUNTIME_DIR to a "
            "shorter one"
        )
    return folder


def make_runtime_folder(run_id: str, base: Path) -> tuple[Path, int]:
    """Make and lock the runtime folder (mode 0700). Returns it and the descriptor of its lock.

    It is made under another name, locked, and only then given its own, so that a sweep never meets
    a fresh folder without its lock. Raises UserError if it cannot be made.
    """
    folder = runtime_folder(run_id, base)
    try:
        unlocked = Path(tempfile.mkdtemp(prefix=".zppo-", dir=base))
        lock = hold(unlocked)
        unlocked.rename(folder)
    except OSError as error:
        raise UserError(
            f"cannot make the runtime folder {str(folder)!r}: {error.strerror}"
        ) from None
    if lock is None:
        raise UserError(f"the runtime folder {str(folder)!r} is held by another process")
    return folder, lock


def runtime_prefix() -> str:
    """How the names of all runtime folders of this user begin."""
    return f"zppo-{os.getuid()}-"


def new_run_id() -> str:
    """The name of one attempt of a run."""
    return secrets.token_hex(4)


def _new_record(
    topology: Topology, start_step: int, corpus: str, extensions: dict[str, str]
) -> RunRecord:
    return RunRecord(
        run_id=new_run_id(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        start_step=start_step,
        corpus=corpus,
        versions=package_versions(),
        topology=topology,
        extensions=extensions,
    )
