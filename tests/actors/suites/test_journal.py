"""The journal of answers: whole lines count, whatever is cut."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from zppo_actors.suites.journal import Answer, Journal


def answer(number: int, text: str) -> Answer:
    return Answer(key=f"k{number}", text=text, cut_off=False, tokens=number)


@given(st.lists(st.text(max_size=20), max_size=6), st.data())
def test_a_file_cut_anywhere_keeps_the_answers_before(
    texts: list[str], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        journal = Journal(path)
        ends = []
        for number, text in enumerate(texts):
            journal.add(answer(number, text))
            ends.append(path.stat().st_size)
        journal.close()
        size = data.draw(st.integers(0, ends[-1] if ends else 0))
        path.write_bytes(path.read_bytes()[:size])
        again = Journal(path)
        kept = sum(end <= size for end in ends)
        assert len(again) == kept
        assert [again.get(f"k{i}") for i in range(kept)] == [
            answer(i, text) for i, text in enumerate(texts[:kept])
        ]
        again.add(answer(99, "new"))
        again.close()
        last = Journal(path)
        assert (len(last), last.get("k99")) == (kept + 1, answer(99, "new"))
        last.close()
