"""From a name in the topology to a value of the user's own, and to what identifies its code.

Three spellings: `./file.py:name` (made absolute when the topology is read), `package.module:name`,
and a name that an installed package announces by an entry point of the group `zppo.KINDs`. Built-in
names win over entry points.

Invariant: the code that runs is the code that was identified: a file is read once, and both its
SHA-256 and what Python compiles come from those bytes, never from a bytecode cache. Importing runs
code of the user's, so only a process that is about to use a value calls `load`; commands that read
run directories never do.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import metadata
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeAlias

from msgspec import Struct

from zppo.errors import UserError, nearest, words_of

Kind: TypeAlias = Literal["reward", "method", "source", "engine", "sink"]
GROUPS: dict[Kind, str] = {
    "reward": "zppo.rewards",
    "method": "zppo.methods",
    "source": "zppo.sources",
    "engine": "zppo.engines",
    "sink": "zppo.sinks",
}
"""Kind -> group of entry points under which packages announce theirs."""
SPELLINGS = "package.module:name or ./file.py:name"
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


class Extension(Struct, frozen=True, kw_only=True):
    """A value of the user's own. `identity` changes when its code does: the SHA-256 of the file,
    and before it name and version of the package that it belongs to, if any."""

    value: Any
    identity: str


class _Code(Struct, frozen=True, kw_only=True):
    """Where a value is: `name` in a file or in a module of an installed package."""

    module: str
    name: str
    file: Path | None = None
    package: str = ""
    """`NAME VERSION ` of the distribution of an entry point, else empty."""


def names_of(kind: Kind) -> list[str]:
    """The names that installed packages announce."""
    return sorted({point.name for point in metadata.entry_points(group=GROUPS[kind])})


def load(setting: str, use: str, kind: Kind, built_in: Iterable[str] = ()) -> Extension:
    """Import what `use` names; it is none of the names `built_in`, which only help to find the
    nearest. Raises UserError, which begins with `setting`."""
    code = _locate(setting, use, kind, built_in)
    content = _content(setting, code)
    value = _value(setting, code, _imported(setting, code, content))
    return Extension(value=value, identity=_identity(code, content))


def identity_of(setting: str, use: str, kind: Kind, built_in: Iterable[str] = ()) -> str:
    """The identity of what `use` names, without importing it (of a module, its parent packages are
    imported). Raises UserError."""
    code = _locate(setting, use, kind, built_in)
    return _identity(code, _content(setting, code))


def check_call(
    setting: str, use: str, value: Any, expected: Sequence[str], args: Iterable[str] = ()
) -> None:
    """Raise UserError unless `value` can be called with as many positional arguments as `expected`
    names, and the keywords `args`."""
    if not callable(value):
        raise UserError(
            f"{setting}: {use!r} is of type {type(value).__name__}; expected a function of "
            f"({', '.join(expected)})"
        )
    try:
        signature = inspect.signature(value)
    except (ValueError, TypeError):  # of some functions written in C nothing is known
        return
    try:
        signature.bind(*expected, **dict.fromkeys(args))
    except TypeError as error:
        raise UserError(
            f"{setting}: {use!r} takes {signature}; expected a function of "
            f"({', '.join([*expected, *(f'{name}=' for name in args)])}): {error}"
        ) from None


# ---- where it is ---------------------------------------------------------------------------------


def _locate(setting: str, use: str, kind: Kind, built_in: Iterable[str]) -> _Code:
    target, colon, name = use.rpartition(":")
    if use.endswith(".py"):
        raise UserError(
            f"{setting} is {use!r}, a file; expected the name in it as well: {use}:name"
        )
    if not colon:
        return _announced(setting, use, kind, built_in)
    if not name.isidentifier():
        raise UserError(f"{setting} is {use!r}; expected {SPELLINGS}")
    if target.endswith(".py"):
        return _Code(module=target, name=name, file=Path(target))
    if not _MODULE.fullmatch(target):
        raise UserError(f"{setting} is {use!r}; expected {SPELLINGS}")
    return _Code(module=target, name=name)


def _announced(setting: str, use: str, kind: Kind, built_in: Iterable[str]) -> _Code:
    points = [p for p in metadata.entry_points(group=GROUPS[kind]) if p.name == use]
    if not points:
        known = nearest(use, {*built_in, *names_of(kind)})
        raise UserError(f"{setting}: there is no {kind} {use!r}{known}; or name {SPELLINGS}")
    packages = sorted({f"{p.dist.name} {p.dist.version}" for p in points if p.dist is not None})
    if len({point.value for point in points}) > 1:
        raise UserError(
            f"{setting}: several packages announce the {kind} {use!r} ({', '.join(packages)}); "
            "name one by package.module:name"
        )
    package = f"{packages[0]} " if packages else ""
    return _Code(module=points[0].module, name=points[0].attr, package=package)


def _content(setting: str, code: _Code) -> bytes:
    """The source of the file, or of the module; empty for a module without one."""
    file = code.file if code.file is not None else _file_of_module(setting, code.module)
    if file is None:
        return b""
    if file.exists() and not file.is_file():  # reading a named pipe would wait for ever
        raise UserError(f"{setting}: {str(file)!r} is no file; expected one with Python code")
    try:
        return file.read_bytes()
    except FileNotFoundError:
        near = [path.name for path in file.parent.glob("*.py")] if file.parent.is_dir() else []
        hint = nearest(file.name, near) if near else ""
        raise UserError(f"{setting}: there is no file {str(file)!r}{hint}") from None
    except OSError as error:
        raise UserError(f"{setting}: {str(file)!r} cannot be read ({error.strerror})") from None


def _file_of_module(setting: str, module: str) -> Path | None:
    with _explained(setting, module):
        spec = importlib.util.find_spec(module)
    if spec is None:
        raise UserError(
            f"{setting}: there is no module {module!r}; expected one of an installed package (the "
            "current folder is not searched), or ./file.py:name"
        )
    return Path(spec.origin) if spec.has_location and spec.origin else None


def _identity(code: _Code, content: bytes) -> str:
    package = code.package
    if not package and code.file is None:
        names = metadata.packages_distributions().get(code.module.partition(".")[0], [])
        package = "".join(f"{name} {metadata.version(name)} " for name in sorted(set(names)))
    return f"{package}sha256:{hashlib.sha256(content).hexdigest()}"


# ---- importing -----------------------------------------------------------------------------------


class _FromBytes(SourceFileLoader):
    """Compiles the bytes that it was given, whatever has become of the file or its cache."""

    def __init__(self, name: str, path: str, content: bytes) -> None:
        super().__init__(name, path)
        self._content = content

    def get_data(self, path: str) -> bytes:
        return self._content

    def path_stats(self, path: str) -> Any:
        raise OSError("no bytecode cache is read or written")


def _imported(setting: str, code: _Code, content: bytes) -> ModuleType:
    with _explained(setting, code.module):
        if code.file is None:
            return importlib.import_module(code.module)
        return _import_file(str(code.file), content)


def _value(setting: str, code: _Code, module: ModuleType) -> Any:
    """The value of that name; a module may make its values when they are asked for."""
    with _explained(setting, code.module):
        value = getattr(module, code.name, None)
    if value is not None:
        return value
    if code.name in vars(module):
        raise UserError(f"{setting}: {code.name!r} of {code.module!r} is None")
    public = [name for name in vars(module) if not name.startswith("_")]
    raise UserError(f"{setting}: {code.module!r} has no {code.name!r}{nearest(code.name, public)}")


@contextmanager
def _explained(setting: str, module: str) -> Iterator[None]:
    """Turn whatever the user's code raises into a sentence, and let nothing that it prints into the
    output of a command."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # even SystemExit: an import must not end this process
        raise UserError(_not_imported(setting, module, error)) from None


def _import_file(path: str, content: bytes) -> ModuleType:
    """The module of a file, under a name that no package has; the same bytes are one module."""
    digest = hashlib.sha256(path.encode() + b"\0" + content).hexdigest()[:16]
    name = f"zppo_own_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    loader = _FromBytes(name, path, content)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and msgspec look a class's module up there
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _not_imported(setting: str, module: str, error: BaseException) -> str:
    lines = words_of(error).splitlines()
    what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    beside = module.endswith(".py") and _wants_neighbour(Path(module), error)
    hint = (
        "; files beside it are not searched, so put several files into a package" if beside else ""
    )
    return f"{setting}: {module!r} cannot be imported: {what}{hint}"


def _wants_neighbour(file: Path, error: BaseException) -> bool:
    """Whether a file fails because it imports another one of its folder."""
    if not isinstance(error, ImportError):
        return False
    name = (error.name or "").partition(".")[0]
    near = bool(name) and any((file.parent / one).exists() for one in (f"{name}.py", name))
    return near or "relative import" in words_of(error)
