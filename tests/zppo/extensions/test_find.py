"""What users bring: found by path, module or entry point; every mistake is one sentence."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from zppo import extensions
from zppo.errors import UserError

REWARD = "def right(question, response, row):\n    return 1.0\n"
SETTING = "data.reward[0].use"


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(REWARD)
    return file


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], Path]:
    """Lays an installed package into a folder on the path: its module and its entry point."""

    def install(package: str, version: str, entry_point: str) -> Path:
        (tmp_path / f"{package}.py").write_text(REWARD)
        info = tmp_path / f"{package}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        )
        (info / "entry_points.txt").write_text(f"[zppo.rewards]\n{entry_point}\n")
        (info / "top_level.txt").write_text(f"{package}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, package, raising=False)
        return tmp_path / f"{package}.py"

    return install


def sentence(use: str, built_in: tuple[str, ...] = ()) -> str:
    with pytest.raises(UserError) as caught:
        extensions.load(SETTING, use, "reward", built_in)
    return str(caught.value)


def test_a_file_is_imported_and_identified_by_its_bytes(mine: Path) -> None:
    found = extensions.load(SETTING, f"{mine}:right", "reward")
    assert found.value("q", "r", {}) == 1.0
    assert found.identity == f"sha256:{hashlib.sha256(REWARD.encode()).hexdigest()}"
    assert extensions.identity_of(SETTING, f"{mine}:right", "reward") == found.identity


def test_an_edit_of_the_same_size_is_seen(mine: Path) -> None:
    """No bytecode cache stands between the file and what runs."""
    first = extensions.load(SETTING, f"{mine}:right", "reward")
    mine.write_text(REWARD.replace("1.0", "0.5"))
    second = extensions.load(SETTING, f"{mine}:right", "reward")
    assert (first.value("", "", {}), second.value("", "", {})) == (1.0, 0.5)
    assert first.identity != second.identity
    assert not (mine.parent / "__pycache__").exists()


def test_an_entry_point_is_identified_by_package_and_file(
    installed: Callable[[str, str, str], Path],
) -> None:
    file = installed("acme_rewards", "1.2", "acme = acme_rewards:right")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    for use in ("acme", "acme_rewards:right"):
        found = extensions.load(SETTING, use, "reward")
        assert found.value("q", "r", {}) == 1.0
        assert found.identity == f"acme_rewards 1.2 sha256:{digest}"
    assert "acme" in extensions.names_of("reward")
    assert sentence("acne", ("math",)) == (
        "data.reward[0].use: there is no reward 'acne' (did you mean 'acme'?); or name "
        "package.module:name or ./file.py:name"
    )


def test_a_name_that_two_packages_announce_is_refused(
    installed: Callable[[str, str, str], Path],
) -> None:
    installed("acme_one", "1.0", "same = acme_one:right")
    installed("acme_two", "2.0", "same = acme_two:right")
    assert sentence("same") == (
        "data.reward[0].use: several packages announce the reward 'same' (acme_one 1.0, acme_two "
        "2.0); name one by package.module:name"
    )


def test_mistakes_are_sentences(mine: Path) -> None:
    folder = mine.parent
    assert sentence(f"{mine}:rigth") == (
        f"data.reward[0].use: {str(mine)!r} has no 'rigth' (did you mean 'right'?)"
    )
    assert sentence(f"{folder}/mien.py:right") == (
        f"data.reward[0].use: there is no file '{folder}/mien.py' (did you mean 'mine.py'?)"
    )
    assert sentence("no_such_package.here:right") == (
        "data.reward[0].use: 'no_such_package.here' cannot be imported: ModuleNotFoundError: No "
        "module named 'no_such_package'"
    )
    assert sentence("no_such_module_here:right") == (
        "data.reward[0].use: there is no module 'no_such_module_here'; expected one of an "
        "installed package (the current folder is not searched), or ./file.py:name"
    )
    for use in ("a-b:right", "./mine.py:", "mine.py:a.b", ":x"):
        assert sentence(use) == (
            f"data.reward[0].use is {use!r}; expected package.module:name or ./file.py:name"
        )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import sys\nsys.exit(3)\n", "SystemExit: 3"),
        ("def f(:\n", r"SyntaxError: invalid syntax.*"),
        ("raise ValueError('no licence\\nmore')\n", "ValueError: no licence"),
        (
            "import not_installed_here\n",
            "ModuleNotFoundError: No module named 'not_installed_here'",
        ),
        ("raise SystemExit\n", "SystemExit"),
        ("def __getattr__(name):\n    raise RuntimeError('lazy')\n", "RuntimeError: lazy"),
        (
            "class E(Exception):\n    def __str__(self):\n        raise ValueError\nraise E\n",
            "E",
        ),
        (
            "import neighbour\n",
            "ModuleNotFoundError: No module named 'neighbour'; files beside it are not searched, so "
            "put several files into a package",
        ),
        (
            "from .neighbour import right\n",
            "ImportError: attempted relative import with no known parent package; files beside it "
            "are not searched, so put several files into a package",
        ),
    ],
)
def test_what_cannot_be_imported_is_one_sentence(mine: Path, text: str, reason: str) -> None:
    mine.write_text(text)
    (mine.parent / "neighbour.py").write_text(REWARD)
    said = sentence(f"{mine}:right")
    prefix = f"data.reward[0].use: {str(mine)!r} cannot be imported: "
    assert said.startswith(prefix) and re.fullmatch(reason, said.removeprefix(prefix))


def test_a_package_that_leaves_while_it_is_imported_does_not_end_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaves_at_once").mkdir()
    (tmp_path / "leaves_at_once/__init__.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "leaves_at_once/inner.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert sentence("leaves_at_once.inner:right") == (
        "data.reward[0].use: 'leaves_at_once.inner' cannot be imported: SystemExit: 0"
    )


def test_what_is_no_file_of_code_is_said(mine: Path) -> None:
    assert sentence(str(mine)) == (
        f"data.reward[0].use is {str(mine)!r}, a file; expected the name in it as well: {mine}:name"
    )
    pipe, folder = mine.parent / "pipe.py", mine.parent / "folder.py"
    os.mkfifo(pipe)
    folder.mkdir()
    for odd in (pipe, folder):
        assert sentence(f"{odd}:right") == (
            f"data.reward[0].use: {str(odd)!r} is no file; expected one with Python code"
        )
    mine.write_text("right = None\n")
    assert sentence(f"{mine}:right") == f"data.reward[0].use: 'right' of {str(mine)!r} is None"
    mine.write_text("")
    assert sentence(f"{mine}:right") == f"data.reward[0].use: {str(mine)!r} has no 'right'"


def test_what_an_import_prints_is_no_output_of_the_command(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine.write_text(f"print('hello')\n{REWARD}")
    extensions.load(SETTING, f"{mine}:right", "reward")
    assert capsys.readouterr() == ("", "hello\n")


def test_the_signature_is_checked() -> None:
    expected = ("question", "response", "row")
    extensions.check_call(SETTING, "m:f", lambda q, r, w: 0.0, expected)
    extensions.check_call(SETTING, "m:f", lambda q, r, w, *, a: 0.0, expected, ("a",))
    with pytest.raises(UserError) as caught:
        extensions.check_call(SETTING, "m:f", lambda completions: 0.0, expected)
    assert str(caught.value) == (
        "data.reward[0].use: 'm:f' takes (completions); expected a function of (question, "
        "response, row): too many positional arguments"
    )
    with pytest.raises(UserError) as caught:
        extensions.check_call(SETTING, "m:f", lambda q, r, w: 0.0, expected, ("pattern",))
    assert str(caught.value) == (
        "data.reward[0].use: 'm:f' takes (q, r, w); expected a function of (question, response, "
        "row, pattern=): got an unexpected keyword argument 'pattern'"
    )
    with pytest.raises(UserError) as caught:
        extensions.check_call(SETTING, "m:f", 3, expected)
    assert str(caught.value) == (
        "data.reward[0].use: 'm:f' is of type int; expected a function of (question, response, row)"
    )
