"""Keys and the files they lie in: whole or refused, and never shown."""

from __future__ import annotations

import copy
import os
import pickle
import stat
import string
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zppo_protocol import keys
from zppo_protocol.errors import AccessError
from zppo_protocol.keys import Access, Credentials, Member, SecretKey

ADDRESS = "tcp://10.0.0.1:5555"
ROLES = {"rollout-0": "rollout", "trainer": "trainer", "supervisor": "supervisor"}
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True).filter(
    lambda name: name != "controller"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "keys"


@pytest.fixture
def made(folder: Path) -> tuple[Access, dict[str, Credentials]]:
    access, credentials = keys.issue(ADDRESS, ROLES)
    keys.write_all(folder, access, credentials)
    return access, credentials


@given(st.dictionaries(NAMES, st.sampled_from(["rollout", "teacher"]), max_size=20))
def test_what_was_written_is_read(roles: dict[str, str]) -> None:
    access, credentials = keys.issue(ADDRESS, roles, reached_at="tcp://[::1]:5555")
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "keys"
        keys.write_all(folder, access, credentials)
        assert keys.read_access(folder / "controller.key") == access
        for name in roles:
            found = keys.read_credentials(keys.key_file(folder, name))
            assert found == credentials[name]
            assert found.secret.reveal() == credentials[name].secret.reveal()
            assert access.names[found.secret.public] == name and access.roles[name] == found.role
            assert found.address == "tcp://[::1]:5555"


def test_files_and_folder_are_private_whatever_the_umask(folder: Path) -> None:
    before = os.umask(0)
    try:
        keys.write_all(folder, *keys.issue(ADDRESS, ROLES))
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {path.name for path in folder.iterdir()} == {f"{n}.key" for n in [*ROLES, "controller"]}
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_every_life_has_other_keys() -> None:
    one, two = (keys.issue(ADDRESS, ROLES)[0] for _ in range(2))
    assert one.secret != two.secret
    assert not one.names.keys() & two.names.keys() and len(one.names) == len(ROLES)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o601])
def test_a_key_file_that_others_can_reach(made: Any, folder: Path, mode: int) -> None:
    path = folder / "trainer.key"
    path.chmod(mode)
    with pytest.raises(AccessError) as caught:
        keys.read_credentials(path)
    assert str(caught.value) == (
        f"the key file {str(path)!r} is open to other users (mode {mode:04o}); whoever could read "
        "it can take this place in the run: have a new key made, and keep it at mode 0600"
    )


def test_a_key_folder_that_others_can_enter(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    with pytest.raises(AccessError) as caught:
        keys.write_all(folder, *keys.issue(ADDRESS, ROLES))
    assert str(caught.value) == (
        f"the key folder {str(folder)!r} is open to other users (mode 0755); whoever could read it "
        "can take this place in the run: have a new key made, and keep it at mode 0700"
    )
    assert list(folder.iterdir()) == []


def test_a_key_folder_that_cannot_be_made(folder: Path, made: Any) -> None:
    """As with `zppo launch --keys`, where nobody has made the folder around it."""
    path = folder / "none" / "keys" / "rollout-0.key"
    with pytest.raises(AccessError) as caught:
        keys.write_credentials(path, made[1]["rollout-0"])
    assert (
        str(caught.value) == f"cannot write the key file {str(path)!r}: No such file or directory"
    )


def test_a_key_file_that_is_not_there(folder: Path) -> None:
    with pytest.raises(AccessError) as caught:
        keys.read_credentials(folder / "trainer.key")
    assert str(caught.value) == (
        f"cannot read the key file '{folder}/trainer.key': No such file or directory"
    )


def test_a_link_a_folder_and_a_pipe_are_no_key_files(made: Any, folder: Path) -> None:
    (folder / "link.key").symlink_to(folder / "trainer.key")
    (folder / "folder.key").mkdir()
    os.mkfifo(folder / "pipe.key", 0o600)
    for name, sentence in (
        ("link", "cannot read the key file .*: Too many levels of symbolic links"),
        ("folder", "the key file .* is not a file"),
        ("pipe", "the key file .* is not a file"),
    ):
        with pytest.raises(AccessError, match=sentence):
            keys.read_credentials(folder / f"{name}.key")


def test_one_kind_of_key_is_not_the_other(made: Any, folder: Path) -> None:
    with pytest.raises(AccessError) as caught:
        keys.read_credentials(folder / "controller.key")
    assert str(caught.value) == (
        f"the key file '{folder}/controller.key' is not the key of an actor of this version"
    )
    with pytest.raises(AccessError, match="is not the key of a controller of this version"):
        keys.read_access(folder / "trainer.key")


def test_a_key_file_without_end(made: Any, folder: Path) -> None:
    with (folder / "trainer.key").open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(AccessError, match="is longer than the 4194304 bytes of any key"):
        keys.read_credentials(folder / "trainer.key")


@given(st.data())
def test_a_damaged_key_is_refused_without_its_words(data: st.DataObject) -> None:
    credentials = keys.issue(ADDRESS, ROLES)[1]["trainer"]
    secret, whole = credentials.secret.reveal(), keys.pack_credentials(credentials)
    begin = data.draw(st.integers(0, len(whole) - 1))
    end = data.draw(st.integers(begin, len(whole)))
    damaged = whole[:begin] + data.draw(st.binary(max_size=8)) + whole[end:]
    try:
        found = keys.unpack_credentials(damaged, "the key file 'x'")
    except AccessError as error:
        assert secret not in str(error) and str(error).count("\n") == 0
    else:
        assert keys.pack_credentials(found)


@pytest.mark.parametrize(
    "changes",
    [
        {"secret": "x" * 39}, {"secret": "ü" * 40}, {"server": ""}, {"name": "../up"},
        {"name": ""}, {"address": "inproc://x"}, {"address": "tcp://x"}, {"extra": 1},
        {"type": "controller"},
    ],
)  # fmt: skip
def test_values_that_no_key_has(changes: dict[str, Any]) -> None:
    whole = msgspec.json.decode(keys.pack_credentials(keys.issue(ADDRESS, ROLES)[1]["trainer"]))
    with pytest.raises(AccessError, match=r"^what was sent"):
        keys.unpack_credentials(msgspec.json.encode({**whole, **changes}))


def test_two_names_never_have_one_key() -> None:
    secret = SecretKey.new()
    member = Member("rollout", secret.public)
    with pytest.raises(AccessError, match="two names have one key"):
        Access(ADDRESS, secret, {"rollout-0": member, "rollout-1": member})


def test_a_secret_shows_itself_to_nobody() -> None:
    access, credentials = keys.issue(ADDRESS, ROLES)
    everything = f"{access!r} {access} {credentials!r} {vars(access)}"
    for secret in (access.secret, *(one.secret for one in credentials.values())):
        assert secret.reveal() not in everything
        assert repr(secret) == str(secret) == "SecretKey(...)"
        for show in (pickle.dumps, copy.copy, msgspec.json.encode):
            with pytest.raises(TypeError):
                show(secret)  # type: ignore[operator]


def test_keys_are_printable_and_of_full_length() -> None:
    text = SecretKey.new().reveal()
    assert len(text) == 40 and set(text) <= set(string.printable) - set(" \n'\"\\")
