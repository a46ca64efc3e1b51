"""Answers on disk, one JSON line each: what was answered once is not asked again.

Invariant: a line counts only when it is whole, so whatever is killed in the middle of one leaves
all answers before it.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import msgspec
from msgspec import Struct


class Answer(Struct, frozen=True, kw_only=True):
    """`key` stands for everything that was asked: model, seed, words, pictures and decoding."""

    key: str
    text: str
    cut_off: bool
    tokens: int | None


class Journal:
    """The answers of one model to the tasks of one row."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._answers: dict[str, Answer] = {}
        self._file: BinaryIO = path.open("a+b")
        self._read()

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> Answer | None:
        return self._answers.get(key)

    def add(self, answer: Answer) -> None:
        """Keep an answer; it survives this process from here on."""
        self._answers[answer.key] = answer
        self._file.write(msgspec.json.encode(answer) + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _read(self) -> None:
        """Take what is there, and cut off a line that was not finished."""
        self._file.seek(0)
        whole = 0
        for line in self._file.readlines():
            try:
                answer = msgspec.json.decode(line, type=Answer)
            except (msgspec.DecodeError, UnicodeDecodeError):  # damaged by more than a kill
                break
            if not line.endswith(b"\n"):
                break
            self._answers[answer.key] = answer
            whole += len(line)
        self._file.truncate(whole)
