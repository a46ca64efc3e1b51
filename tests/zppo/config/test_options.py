"""What the options of commands take, and the words for what they do not."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import Any

import pytest

from zppo.config.options import counting, finite, positive, rate, seconds, several, share, threads

LONG = "9" * 5000


@pytest.mark.parametrize(
    ("kind", "text", "sentence"),
    [
        (counting, "-1", "'-1' is not a whole number of at least 0"),
        (counting, "", "'' is not a whole number of at least 0"),
        (counting, "1_0", "'1_0' is not a whole number of at least 0"),
        (counting, "²", "'²' is not a whole number of at least 0"),
        (counting, str(2**63), f"'{2**63}' is not a whole number from 0 to {2**63 - 1}"),
        (positive, LONG, f"'{LONG[:40]}…' is not a whole number from 1 to {2**63 - 1}"),
        (positive, "0", "'0' is not a whole number of at least 1"),
        (threads, "1025", "'1025' is not a whole number from 1 to 1024"),
        (several(counting), "1,x", "'x' is not a whole number of at least 0"),
        (finite, "inf", "'inf' is not a number"),
        (share, "0", "'0' is not a number above 0, at most 1"),
        (share, "nan", "'nan' is not a number above 0, at most 1"),
        (rate, "inf", "'inf' is not a number above 0"),
        (seconds, "1e10", "'1e10' is not a number of seconds above 0, at most 1e9"),
        (seconds, "nan", "'nan' is not a number of seconds above 0, at most 1e9"),
    ],
)
def test_nonsense_is_one_sentence(kind: Callable[[str], Any], text: str, sentence: str) -> None:
    with pytest.raises(ArgumentTypeError, match=f"^{re.escape(sentence)}$"):
        kind(text)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (counting, "0", 0),
        (counting, str(2**63 - 1), 2**63 - 1),
        (several(positive), "1,02", [1, 2]),
        (share, "1", 1.0),
        (seconds, "1e9", 1e9),
        (finite, "-2.5", -2.5),
    ],
)
def test_what_is_taken(kind: Callable[[str], Any], text: str, value: object) -> None:
    assert kind(text) == value
