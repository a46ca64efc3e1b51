"""The style sheet of the pages: two themes, each readable."""

from __future__ import annotations

import re

import pytest

from zppo.report.frame import ASSETS

CSS = (ASSETS / "page.css").read_text("utf-8")
LIGHT, DARK = (
    dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", block))
    for block in re.findall(r":root \{(.*?)\}", CSS, flags=re.DOTALL)
)
WORDS = {"ink", "dim", "blue", "green", "red"}
GROUNDS = {"paper", "ground", "chosen"}
READABLE = 4.5
"""Contrast of small text, by WCAG 2 (AA)."""


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb` by WCAG 2."""
    shares = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (
        share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_words_can_be_read_on_every_ground(theme: dict[str, str]) -> None:
    faint = {
        (word, ground): round(contrast(theme[word], theme[ground]), 2)
        for word in WORDS
        for ground in GROUNDS
        if contrast(theme[word], theme[ground]) < READABLE
    }
    assert faint == {}


def test_every_colour_is_of_a_theme() -> None:
    """But the ground of figures, which are drawn for white."""
    rules = re.sub(r":root \{.*?\}", "", CSS, flags=re.DOTALL)
    assert LIGHT.keys() == DARK.keys() >= WORDS | GROUNDS
    assert re.findall(r"#[0-9a-fA-F]{6}\b", rules) == ["#ffffff"]
    assert luminance(LIGHT["paper"]) > 0.9 and luminance(DARK["paper"]) < 0.1
