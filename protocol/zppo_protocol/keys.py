"""Keys: who may speak on the wire, under which name and in which role, and the files they lie in.

One life of a run (an attempt) has one key of the controller and one of each actor; all
incarnations of an actor have its key, and it ends with the life. A key is a Curve25519 secret: on
`tcp` it makes the CURVE handshake of ZeroMQ, on `ipc` it is shown to the controller alone, through
a socket that no other user can reach (see `doors`).

Invariant: a secret is in memory and in files of mode 0600 in folders of mode 0700, nowhere else: no
`repr`, log, command line, environment or pickle holds one.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import msgspec
import zmq
from msgspec import Meta, Struct

from zppo_protocol.addresses import scheme_of
from zppo_protocol.errors import AccessError
from zppo_protocol.limits import MAX_KEY_FILE_BYTES
from zppo_protocol.values import ACTOR_NAME, ActorName

ACCESS_NAME = "controller"
"""The name of the controller's own file; no actor has it."""
SUFFIX = ".key"

Z85 = Annotated[str, Meta(pattern=r"^[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}$")]
"""32 bytes in ZeroMQ's printable form, Z85."""
T = TypeVar("T")


class SecretKey:
    """A Curve25519 secret. It shows itself to nobody who does not call `reveal`."""

    __slots__ = ("_z85", "public")

    def __init__(self, z85: str) -> None:
        """Take a secret in Z85. Raises AccessError if it is none."""
        try:
            self.public: str = zmq.curve_public(z85.encode()).decode()
        except (ValueError, zmq.ZMQError):
            raise AccessError("the secret key is not 40 characters of Z85") from None
        self._z85 = z85

    @classmethod
    def new(cls) -> SecretKey:
        """A secret that nobody has had before, from the system's random numbers."""
        return cls(zmq.curve_keypair()[1].decode())

    def reveal(self) -> str:
        """The secret itself, in Z85: for a socket or a key file, nothing else."""
        return self._z85

    def __repr__(self) -> str:
        return "SecretKey(...)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SecretKey) and other.public == self.public

    def __hash__(self) -> int:
        return hash(self.public)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret key is not pickled")


class Member(Struct, frozen=True, forbid_unknown_fields=True):
    """One name on the list of those who are let in. `public` is its key, in Z85."""

    role: str
    public: Z85


@dataclass(frozen=True)
class Credentials:
    """All that an actor needs to reach the controller and to be let in: where it is, who I am, the
    controller's public key and my secret."""

    address: str
    name: str
    role: str
    server: str
    secret: SecretKey


@dataclass(frozen=True)
class Access:
    """What the controller needs: the address that it binds, its secret, and whom it lets in, by
    name. One key opens one name."""

    address: str
    secret: SecretKey
    members: Mapping[str, Member]
    names: dict[str, str] = field(init=False, repr=False)
    """Name by public key."""

    def __post_init__(self) -> None:
        scheme_of(self.address)
        names = {member.public: name for name, member in self.members.items()}
        if len(names) < len(self.members):
            raise AccessError("two names have one key")
        object.__setattr__(self, "names", names)

    @property
    def roles(self) -> dict[str, str]:
        """Role by name."""
        return {name: member.role for name, member in self.members.items()}


def issue(
    address: str, roles: Mapping[str, str], *, reached_at: str | None = None
) -> tuple[Access, dict[str, Credentials]]:
    """Make the keys of one life: those of a controller that binds `address`, and of the actors in
    `roles`, name → role, which connect to `reached_at`, or to `address` itself. Raises ValueError
    for an address or a name that cannot be used."""
    for name in roles:
        if not re.fullmatch(ACTOR_NAME, name) or name == ACCESS_NAME:
            raise ValueError(
                f"the actor name {name!r} must be 1 to 64 letters, digits, '.', '_' or '-', and "
                f"not {ACCESS_NAME!r}"
            )
    server = SecretKey.new()
    credentials = {
        name: Credentials(reached_at or address, name, role, server.public, SecretKey.new())
        for name, role in roles.items()
    }
    members = {name: Member(one.role, one.secret.public) for name, one in credentials.items()}
    return Access(address, server, members), credentials


# ---- files ---------------------------------------------------------------------------------------


class _CredentialsFile(Struct, frozen=True, forbid_unknown_fields=True, tag="actor"):
    address: str
    name: ActorName
    role: str
    server: Z85
    secret: Z85


class _AccessFile(Struct, frozen=True, forbid_unknown_fields=True, tag="controller"):
    address: str
    secret: Z85
    members: dict[ActorName, Member]


def key_file(folder: Path, name: str) -> Path:
    """Where the key of this name lies."""
    return folder / f"{name}{SUFFIX}"


def write_all(folder: Path, access: Access, credentials: Mapping[str, Credentials]) -> None:
    """Write the keys of one life into `folder`, which is made (mode 0700) if it is not there."""
    write_access(key_file(folder, ACCESS_NAME), access)
    for name, one in credentials.items():
        write_credentials(key_file(folder, name), one)


def write_credentials(path: Path, credentials: Credentials) -> None:
    """Write an actor's key: mode 0600, whole or not at all, in a folder of mode 0700. Raises
    AccessError if that cannot be, or if others may enter the folder."""
    _write(path, pack_credentials(credentials))


def write_access(path: Path, access: Access) -> None:
    """Write the controller's key and its list, as `write_credentials` does."""
    file = _AccessFile(access.address, access.secret.reveal(), dict(access.members))
    _write(path, msgspec.json.encode(file))


def read_credentials(path: Path) -> Credentials:
    """Read an actor's key. Raises AccessError if others can read it, or if it is none."""
    return unpack_credentials(_read(path), f"the key file {str(path)!r}")


def read_access(path: Path) -> Access:
    """Read the controller's key and its list. Raises AccessError as `read_credentials` does."""
    file = _decode(_read(path), _AccessFile, f"the key file {str(path)!r}")
    return Access(file.address, SecretKey(file.secret), file.members)


def pack_credentials(credentials: Credentials) -> bytes:
    """The content of a key file, secret included: for such a file, or for a channel that is
    encrypted."""
    one = credentials
    return msgspec.json.encode(
        _CredentialsFile(one.address, one.name, one.role, one.server, one.secret.reveal())
    )


def unpack_credentials(data: bytes, source: str = "what was sent") -> Credentials:
    """The credentials in `data`; `source` names it in the AccessError that anything else raises."""
    file = _decode(data, _CredentialsFile, source)
    try:
        scheme_of(file.address)
    except ValueError as error:
        raise AccessError(f"{source}: {error}") from None
    return Credentials(file.address, file.name, file.role, file.server, SecretKey(file.secret))


def _decode(data: bytes, type: type[T], source: str) -> T:
    try:
        return msgspec.json.decode(data, type=type)
    except (msgspec.DecodeError, UnicodeDecodeError):
        # Not the decoder's words: they may quote what it read.
        kind = "an actor" if type is _CredentialsFile else "a controller"
        raise AccessError(f"{source} is not the key of {kind} of this version") from None


def _write(path: Path, data: bytes) -> None:
    try:
        _write_whole(path, data)
    except OSError as error:
        raise AccessError(f"cannot write the key file {str(path)!r}: {error.strerror}") from None


def _write_whole(path: Path, data: bytes) -> None:
    with contextlib.suppress(FileExistsError):
        path.parent.mkdir(mode=0o700)
    _check(path.parent, path.parent.stat(), "folder", 0o700)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _read(path: Path) -> bytes:
    with _opened(path) as descriptor:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise AccessError(f"the key file {str(path)!r} is not a file")
        _check(path, found, "file", 0o600)
        data = os.read(descriptor, MAX_KEY_FILE_BYTES + 1)
    if len(data) > MAX_KEY_FILE_BYTES:
        raise AccessError(
            f"the key file {str(path)!r} is longer than the {MAX_KEY_FILE_BYTES} bytes of any key"
        )
    return data


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise AccessError(f"cannot read the key file {str(path)!r}: {error.strerror}") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _check(path: Path, found: os.stat_result, what: str, mode: int) -> None:
    """Raise AccessError if anyone but this user can get at it."""
    if found.st_uid != os.getuid():
        raise AccessError(f"the key {what} {str(path)!r} belongs to another user")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise AccessError(
            f"the key {what} {str(path)!r} is open to other users (mode "
            f"{stat.S_IMODE(found.st_mode):04o}); whoever could read it can take this place in the "
            f"run: have a new key made, and keep it at mode {mode:04o}"
        )
