"""The changes that `tools/mutation_check.py` makes can still be made, each at one place."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import mutation_check as tool  # noqa: E402


def test_every_change_has_its_one_place() -> None:
    places = {
        (mutant.file, mutant.old): (ROOT / mutant.file).read_text().count(mutant.old)
        for mutant in tool.MUTANTS
    }
    assert {place: count for place, count in places.items() if count != 1} == {}
