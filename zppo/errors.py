"""What every command shares: the one exception a user may see, the exit codes, the parser of the
command line, how a command ends, and the handing over to the process that does the work."""

from __future__ import annotations

import argparse
import difflib
import errno
import io
import logging
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, TextIO

from zppo.signals import take_for_ctrl_c

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
"""The user can mend it; one sentence on stderr says what."""
EXIT_FATAL = 70
"""Of an actor: a promise of the run is broken, so starting again would not help; its last line on
stderr says which. 70 is what sysexits.h calls an internal software error. The run itself ends with
`EXIT_FAILED`."""
EXIT_INTERRUPTED = 130
"""Stopped by Ctrl-C or SIGTERM (128 + SIGINT)."""
LONGEST_SAID = 300
"""Characters of another library's error in a sentence of ours."""
FULL = (errno.ENOSPC, errno.EDQUOT)
"""The errors of a disk, a quota or a tmpfs without room."""
_EXPECTED = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "what this user may use"),
    **dict.fromkeys(FULL, "room for what is written"),
    errno.ENOENT: "what is there",
    errno.EEXIST: "what is not there yet",
    errno.EISDIR: "a file",
    errno.ENOTDIR: "a folder",
}
"""Error of a file -> what would have done."""


class UserError(ValueError):
    """A mistake in the topology, the data or the surroundings: a single sentence that says what is
    wrong and how to mend it. The doors print it on stderr and exit with code 2."""

    def __str__(self) -> str:
        return printable(super().__str__())


def count_of(number: float, one: str, several: str = "") -> str:
    """`1 step`, `1,234 steps`, `1 question is`, `2 questions are`: a number and what it counts."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


def printable(text: str) -> str:
    """Words of others (of data, a model, a server) as a terminal may be given them: what steers it
    or turns the direction of writing is spelled out. Blanks of any width, tabs and the joiners of
    emoji and of Persian are words."""
    if text.isprintable():
        return text
    return "".join(
        one if _is_harmless(one) else one.encode("unicode_escape").decode() for one in text
    )


def _is_harmless(one: str) -> bool:
    """Of a single character."""
    return one.isprintable() or one in "\n\t\u200c\u200d" or unicodedata.category(one) == "Zs"


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the closest valid name, or the list of valid names if none
    is close; nothing where no name is valid."""
    names = sorted(valid)
    if not names:
        return ""
    return closest(name, names) or f" (valid: {', '.join(names)})"


def closest(name: str, valid: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the closest valid name in capitals or not, or nothing if
    none is close."""
    by_letters = {one.lower(): one for one in sorted(valid)}
    close = difflib.get_close_matches(name.lower(), by_letters, n=1, cutoff=0.5)
    return f" (did you mean {by_letters[close[0]]!r}?)" if close else ""


class PrintableFormatter(logging.Formatter):
    """Lines that a terminal may be given: what is logged may hold a server's or a model's words."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def words_of(error: BaseException) -> str:
    """What an exception says, as text that every file can hold; one of a user's own may fail at
    that too."""
    try:
        said = str(error)
    except Exception:
        return ""
    return sendable(said).strip()


def sendable(text: str) -> str:
    """The text without half surrogate pairs, which neither files nor messages can carry."""
    return text.encode("utf-8", "replace").decode()


def first_line(error: BaseException) -> str:
    """What another library's error says, for a sentence around it: some list all that they know."""
    line = (words_of(error) or type(error).__name__).splitlines()[0]
    return line if len(line) <= LONGEST_SAID else f"{line[:LONGEST_SAID].rstrip()} …"


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and leave: a mistake on the command
    line is one sentence, like every other user error.

    `settings` says of a name that is no option whether it is a setting, in words that follow it.
    """

    def __init__(
        self, *, settings: Callable[[str], str | None] | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self._settings = settings or (lambda name: None)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")

    def _print_message(self, message: str, file: Any = None) -> None:
        """The help, like every other output: argparse would pass over one that is not taken."""
        stream = file or sys.stderr
        if stream is not None:
            stream.write(message)

    def parse_args(  # type: ignore[override]  # of argparse's overloads we use this one
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown(unknown[0]))
        return found

    def _unknown(self, argument: str) -> str:
        """The sentence about the first argument that nothing takes."""
        name = argument.partition("=")[0]
        said = self._settings(name.lstrip("-").replace("-", "_")) or ""
        if not name.startswith("-"):
            return f"{argument!r} is one argument too many{said if '=' in argument else ''}"
        options = [option for action in self._actions for option in action.option_strings]
        close = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
        return (
            f"there is no option {name}{said or (f' (did you mean {close[0]}?)' if close else '')}"
        )


class Output(io.TextIOWrapper):
    """Standard output of a command. What it does not take is a user error, or `ReaderGone`; what
    follows goes nowhere, so that the end of the process does not fail once more."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._give_up(error)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> NoReturn:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        if isinstance(error, BrokenPipeError):
            raise ReaderGone from None
        raise UserError(
            f"the output cannot be written ({error.strerror}); expected room where it is led to"
        ) from None


class ReaderGone(BrokenPipeError):
    """Nobody reads on what a command prints (`zppo … | head`)."""


def run_command(command: Callable[[], int | None]) -> int:
    """Run a command that has this process to itself, and return its exit code. A UserError ends it
    with its sentence; so does a file or folder, met anywhere, that cannot be used, Ctrl-C or
    SIGTERM that the command does not take, as while its modules are still imported, and an output
    that cannot be written. Where nobody reads on it ends without a word."""
    take_for_ctrl_c()
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout is sys.__stdout__:
        settings = {
            name: getattr(sys.stdout, name)
            for name in ("encoding", "errors", "line_buffering", "write_through")
        }
        sys.stdout = sys.__stdout__ = Output(sys.stdout.detach(), **settings)  # type: ignore[misc]
    exit_code = _code_of(command)
    # What is left is written now; when all is over it could only fail.
    return max(exit_code, _code_of(lambda: _flush(sys.stdout)))


def _code_of(command: Callable[[], int | None]) -> int:
    try:
        return command() or 0
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR
    except ReaderGone:
        return EXIT_FAILED
    except SystemExit as end:  # argparse's, behind the help, or that of a user's code
        if isinstance(end.code, int | None):
            return end.code or 0
        print(printable(str(end.code)), file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    except OSError as error:
        expected = _EXPECTED.get(error.errno or 0)
        full = error.errno in FULL
        if expected is None or (error.filename is None and not full):
            raise  # no file's, so nothing that its name would explain
        where = "a file" if error.filename is None else error.filename
        print(f"{where}: {error.strerror}; expected {expected}", file=sys.stderr)
        return EXIT_USER_ERROR


def _flush(stream: TextIO | None) -> None:
    """Write what waits, and nothing where nothing waits: to a disk that is full even that fails."""
    if stream is not None and not stream.closed:
        stream.flush()


def become_actor(role: str, *arguments: str) -> NoReturn:
    """Replace this process by `python -m zppo_actors ROLE …`: same process id, same terminal. `-P`
    keeps the current folder off the import path."""
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)
    command = [sys.executable, "-P", "-m", "zppo_actors", role, *arguments]
    os.execv(sys.executable, command)
