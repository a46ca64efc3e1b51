r"""Plain numbers as exact fractions: integers, decimals, thousands separators, powers of ten,
`\frac{a}{b}`, a/b, and mixed numbers (`1 1/4`, `1\frac{1}{4}`).

The invariant: nothing here can take long. Digits and exponents are capped before any arithmetic, so
`1e999999999` is simply not a number.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_LENGTH = 120
MAX_EXPONENT = 300
MAX_PLACES = MAX_LENGTH + MAX_EXPONENT
SIGNIFICANT = 6
"""Digits a rounded decimal must show to stand for the number it was rounded from."""

_DIGITS = r"(?:\d{1,3}(?:(?:,|\{,\})\d{3})+|\d{1,3}(?: \d{3})+|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_POWER = (
    r"(?:[eE]([+-]?\d{1,4})|\s*(?:\\times|\\cdot|\*|×|·)\s*10\s*\^\s*"
    r"(?:\{\s*([+-]?\d{1,4})\s*\}|([+-]?\d{1,4})))"
)
_SIGN = r"\s*([+−-]?)\s*"
_NUMBER = re.compile(rf"{_SIGN}({_DECIMAL})(?:{_POWER})?\s*")
_RATIO = re.compile(
    rf"{_SIGN}(?:\\frac\s*\{{{_SIGN}({_DECIMAL})\s*\}}\s*\{{{_SIGN}({_DECIMAL})\s*\}}|\\frac\s*(\d)\s*(\d)"
    rf"|({_DECIMAL})\s*/\s*({_DECIMAL}))\s*"
)
_MIXED = re.compile(
    rf"{_SIGN}(\d+)\s*(?:\\frac\s*\{{\s*(\d+)\s*\}}\s*\{{\s*(\d+)\s*\}}|\\frac\s*(\d)\s*(\d)|(?<=\s)(\d+)\s*/\s*(\d+))\s*"
)


def as_number(text: str) -> Fraction | None:
    """The exact value of a tidy answer that is a plain number, else None."""
    if len(text) > MAX_LENGTH:
        return None
    if "/" not in text and "frac" not in text:
        return _as_decimal(text)
    ratio = _as_ratio(text)
    return _as_mixed(text) if ratio is None else ratio


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


def _as_mixed(text: str) -> Fraction | None:
    """A whole number and a proper fraction behind it: two numbers that stand side by side are no
    product."""
    match = _MIXED.fullmatch(text)
    if match is None:
        return None
    sign, whole, *rest = match.groups()
    over, under = (int(part) for part in rest if part)
    return _signed(sign) * (int(whole) + Fraction(over, under)) if over < under else None


def _signed(sign: str | None) -> int:
    return -1 if sign in {"-", "−"} else 1


def _value(digits: str) -> Fraction:
    plain = digits.replace("{,}", "").replace(",", "").replace(" ", "")
    return Fraction(plain.rstrip(".") if plain.endswith(".") else plain)


def is_decimal(text: str) -> bool:
    """Whether a plain number is written with decimals, and so may be a rounded one."""
    return "." in text


def same_number(answer: str, gold: str, *, scale: int = 1, gold_scale: int = 1) -> bool | None:
    """Whether two tidy texts, each divided by its scale, are the same plain number; None if one is
    no plain number."""
    value, gold_value = as_number(answer), as_number(gold)
    if value is None or gold_value is None:
        return None
    return agree(
        value / scale,
        gold_value / gold_scale,
        decimal=is_decimal(answer),
        gold_decimal=is_decimal(gold),
    )


def agree(value: Fraction, gold: Fraction, *, decimal: bool, gold_decimal: bool) -> bool:
    """Equal; or, unless `gold` is whole, one is written as a decimal and is the other one
    rounded."""
    if value == gold or gold.denominator == 1:
        return value == gold
    return (decimal and rounds_to(gold, value)) or (gold_decimal and rounds_to(value, gold))


def rounds_to(number: Fraction, decimal: Fraction) -> bool:
    """Whether `decimal`, at the places it is written with, is `number` rounded: 0.333333 for 1/3,
    0.33 not."""
    places = next((n for n in range(1, MAX_PLACES) if (decimal * 10**n).denominator == 1), None)
    if places is None or decimal.denominator == 1:
        return False
    shifted = decimal * 10**places
    return bool(abs(shifted) >= 10 ** (SIGNIFICANT - 1) and round(number * 10**places) == shifted)
