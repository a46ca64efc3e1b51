"""The page for readers names every message, once, and no other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from zppo_protocol.limits import MIB, Limits
from zppo_protocol.messages import AnyMessage

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")


def test_the_table_of_messages_is_complete() -> None:
    named = re.findall(r"^\| `([A-Z]\w+)` \|", PAGE, flags=re.MULTILINE)
    assert sorted(named) == sorted(cls.__name__ for cls in get_args(AnyMessage))


def test_the_limits_are_those_of_the_code() -> None:
    limits = Limits()
    assert (
        f"{limits.header_bytes // MIB} MiB" in PAGE
        and f"({limits.payload_bytes // MIB} MiB)" in PAGE
    )
    assert (
        f"{limits.queue} messages per direction and peer, {limits.send_seconds:g} s to send" in PAGE
    )
    assert f"{limits.linger_seconds:g} s to linger" in PAGE
