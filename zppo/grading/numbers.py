r"""Plain numbers as exact fractions: integers, decimals, thousands separators, powers of ten,
`\frac{a}{b}` and a/b.

The invariant: nothing here can take long. Digits and exponents are capped before any arithmetic, so
`1e999999999` is simply not a number.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_LENGTH = 120
MAX_EXPONENT = 300
MAX_PLACES = 30
SIGNIFICANT = 6
"""Digits a rounded decimal must show to stand for the number it was rounded from."""

_DIGITS = r"(?:\d{1,3}(?:(?:,|\{,\})\d{3})+|\d{1,3}(?: \d{3})+|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_POWER = r"(?:[eE]([+-]?\d{1,4})|\s*(?:\\times|\\cdot|\*|×|·)\s*10\s*\^\s*(?:\{\s*([+-]?\d{1,4})\s*\}|([+-]?\d{1,4})))"
_SIGN = r"\s*([+−-]?)\s*"
_NUMBER = re.compile(rf"{_SIGN}({_DECIMAL})(?:{_POWER})?\s*")
_RATIO = re.compile(
    rf"{_SIGN}(?:\\frac\s*\{{{_SIGN}({_DECIMAL})\s*\}}\s*\{{{_SIGN}({_DECIMAL})\s*\}}|\\frac\s*(\d)\s*(\d)"
    rf"|({_DECIMAL})\s*/\s*({_DECIMAL}))\s*"
)


def as_number(text: str) -> Fraction | None:
    """The exact value of a tidy answer that is a plain number, else None."""
    if len(text) > MAX_LENGTH:
        return None
    return _as_decimal(text) if "/" not in text and "frac" not in text else _as_ratio(text)


def _as_decimal(text: str) -> Fraction | None:
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign, digits, *powers = match.groups()
    exponent = int(next((power for power in powers if power), "0"))
    if abs(exponent) > MAX_EXPONENT:
        return None
    return _signed(sign) * _value(digits) * Fraction(10) ** exponent


def _as_ratio(text: str) -> Fraction | None:
    match = _RATIO.fullmatch(text)
    if match is None:
        return None
    sign, sign_over, over, sign_under, under, *rest = match.groups()
    parts = [part for part in (over, under, *rest) if part]
    if _value(parts[1]) == 0:
        return None
    signs = _signed(sign) * _signed(sign_over) * _signed(sign_under)
    return signs * _value(parts[0]) / _value(parts[1])


def _signed(sign: str | None) -> int:
    return -1 if sign in {"-", "−"} else 1


def _value(digits: str) -> Fraction:
    plain = digits.replace("{,}", "").replace(",", "").replace(" ", "")
    return Fraction(plain.rstrip(".") if plain.endswith(".") else plain)


def same_number(answer: Fraction, gold: Fraction) -> bool:
    """Equal; or, unless the gold number is whole, one is the other rounded to SIGNIFICANT digits or
    more."""
    return answer == gold or (
        gold.denominator != 1 and (_rounds_to(gold, answer) or _rounds_to(answer, gold))
    )


def _rounds_to(number: Fraction, decimal: Fraction) -> bool:
    """Whether `decimal`, at the places it is written with, is `number` rounded: 0.333333 for 1/3,
    0.33 not."""
    for places in range(1, MAX_PLACES):
        shifted = decimal * 10**places
        if shifted.denominator == 1:
            return bool(
                abs(shifted) >= 10 ** (SIGNIFICANT - 1) and round(number * 10**places) == shifted
            )
    return False
