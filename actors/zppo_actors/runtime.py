"""The runtime folder: the socket, keys and shared weights of one attempt at a run, on memory where
there is such a file system.

Invariant: a runtime folder whose lock nobody holds belongs to a dead supervisor and may be removed
by anyone of the same user. None is without its lock from the moment it has its name.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from zppo.records.atomic_file import written_whole
from zppo.records.run_directory import (
    SOCKET_NAME,
    hold,
    make_runtime_folder,
    runtime_base,
    runtime_prefix,
)
from zppo_protocol import keys
from zppo_protocol.errors import AccessError
from zppo_protocol.keys import Access, Credentials
from zppo_protocol.values import SUPERVISOR, Role

TRAINING_NAME = "training"
KEYS_NAME = "keys"
MEETING_PORT = "ZPPO_MEETING_PORT"
"""The variable that tells further ranks of the trainer where on the first host they all meet."""


def create(run_id: str, base: Path | None = None) -> tuple[Path, int]:
    """Make and lock `<base>/zppo-<uid>-<run_id>` (mode 0700). Returns the folder and the descriptor
    of its lock.

    Raises UserError if the folder cannot be made or its socket path is too long for the system.
    """
    return make_runtime_folder(run_id, base if base is not None else runtime_base())


def remove(folder: Path) -> None:
    """Remove the folder; several processes may do so at once."""
    shutil.rmtree(folder, ignore_errors=True)


def sweep(base: Path | None = None) -> list[Path]:
    """Remove our folders whose supervisor is dead. Returns what was removed."""
    base = base if base is not None else runtime_base()
    return [
        folder
        for folder in sorted(base.glob(f"{runtime_prefix()}*"))
        if _is_ours(folder) and _remove_if_free(folder)
    ]


def issue_keys(
    folder: Path,
    roles: Mapping[str, str],
    address: str | None = None,
    reached_at: str | None = None,
) -> Access:
    """Make the keys of this attempt and write them into the folder: one for the controller, one
    for the supervisor, one for each process in `roles`, name → role, that speaks to the controller.
    It listens at `address`, or at the folder's own socket, and is reached at `reached_at`, if that
    is another."""
    speak = {name: role for name, role in roles.items() if speaks(role)}
    access, credentials = keys.issue(
        address or f"ipc://{folder / SOCKET_NAME}",
        {SUPERVISOR: SUPERVISOR, **speak},
        reached_at=reached_at,
    )
    keys.write_all(folder / KEYS_NAME, access, credentials)
    return access


def speaks(role: str) -> bool:
    """Whether processes of this role speak to the controller; the further ranks of a trainer do
    not."""
    return role in get_args(Role)


def write_keys(folder: Path, packed: Mapping[str, bytes]) -> None:
    """Write key files that came from another host, by the names of their actors. Raises AccessError
    for what is none, or another's."""
    for name, data in packed.items():
        found = keys.unpack_credentials(data)
        if found.name != name:
            raise AccessError(f"the key of {found.name} was sent as that of {name}")
        keys.write_credentials(keys.key_file(folder / KEYS_NAME, name), found)


def access(folder: Path) -> Access:
    """Where the controller listens, and whom it lets in. Raises AccessError if its key file cannot
    be used."""
    return keys.read_access(keys.key_file(folder / KEYS_NAME, keys.ACCESS_NAME))


def credentials(folder: Path, actor: str) -> Credentials:
    """What `actor` needs to be let in. Raises AccessError if its key file cannot be used."""
    return keys.read_credentials(keys.key_file(folder / KEYS_NAME, actor))


def mark_training(folder: Path, step: int | None) -> None:
    """The trainer says which step it works on, so that its death can be laid to a window; None:
    none."""
    path = folder / TRAINING_NAME
    if step is None:
        path.unlink(missing_ok=True)
        return
    with written_whole(path) as file:
        file.write(str(step).encode())


def step_in_training(folder: Path) -> int | None:
    """The step that the trainer of this attempt was at work on, if any."""
    path = folder / TRAINING_NAME
    return int(path.read_bytes()) if path.exists() else None


def _is_ours(folder: Path) -> bool:
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()


def _remove_if_free(folder: Path) -> bool:
    try:
        lock = hold(folder)
    except OSError:
        return False
    if lock is None:
        return False
    remove(folder)
    os.close(lock)
    return True
