"""The ledger's choice against a plain one over all rows at once, in whatever order and batches the
rows come, and whatever is given twice after a stop."""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo.curation.ledger import Candidate, Ledger

ROWS = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 5), st.sampled_from("abc")), max_size=40
)
CAPS = {("s", "a"): 2, ("s", "b"): 1}


def candidate(identity: int, rank: int, name: str, row: int) -> Candidate:
    """The lot follows from the identity, and goes the other way round."""
    return Candidate(
        identity=bytes([identity]),
        rank=bytes([rank]) + name.encode(),
        lot=bytes([255 - identity]),
        source="s",
        name=name,
        shard=0,
        row=row,
        place=f"row {row}",
    )


def plain(rows: list[Candidate]) -> tuple[set[tuple[bytes, str]], Counter[str]]:
    """(identity, name) of what is kept, and what is dropped by which rule."""
    best: dict[bytes, Candidate] = {}
    for row in rows:
        if row.identity not in best or row.rank < best[row.identity].rank:
            best[row.identity] = row
    groups = defaultdict(list)
    for row in best.values():
        groups[row.source, row.name].append(row)
    kept = {
        (row.identity, row.name)
        for key, group in groups.items()
        for row in sorted(group, key=lambda row: row.lot)[: CAPS.get(key, len(group))]
    }
    return kept, +Counter(duplicate=len(rows) - len(best), cap=len(best) - len(kept))


@pytest.mark.slow
@settings(max_examples=60, deadline=None, database=None)
@given(ROWS, st.randoms(use_true_random=False), st.integers(1, 7))
def test_the_choice_of_a_plain_reference(rows, rng, size) -> None:  # type: ignore[no-untyped-def]
    candidates = [candidate(*row, number) for number, row in enumerate(rows, start=1)]
    expected, drops = plain(candidates)
    rng.shuffle(candidates)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ledger.sqlite"
        for start in range(0, len(candidates), size):
            ledger = Ledger(file)  # opened anew, as after a stop
            assert ledger.done(0)[0] == start
            ledger.record(0, candidates[start : start + size], start + size)
            ledger.close()
        ledger = Ledger(file)
        ledger.choose(CAPS)
        chosen = {one.identity: one.row for one in ledger.unwritten(0)}
        names = {row.row: row.name for row in candidates}
        assert {(identity, names[row]) for identity, row in chosen.items()} == expected
        found: Counter[str] = Counter()
        for rule, _, _, count in ledger.drops():
            found[rule] += count
        assert found == drops
        assert ledger.rows([0]) == len(rows)
        ledger.write([(identity, identity) for identity in chosen])
        assert list(ledger.lines()) == sorted(chosen, reverse=True)
        ledger.close()
