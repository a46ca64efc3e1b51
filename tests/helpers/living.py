"""What processes are, asked while they may end at any moment."""

from __future__ import annotations

from collections.abc import Iterable

import psutil


def is_living(process: psutil.Process) -> bool:
    """A zombie is not."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def command_of(process: psutil.Process) -> list[str]:
    """Its command line; nothing of one that has ended."""
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def titled(processes: Iterable[psutil.Process], title: str) -> list[psutil.Process]:
    """Those whose name or command line holds `title`: vLLM's have it in the one or the other."""
    found = []
    for process in processes:
        try:
            if title in process.name() + " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found
