"""Supports laid end to end: against plain lists of sets, and every way to contradict oneself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo_protocol.codec import dumps, loads
from zppo_protocol.errors import ProtocolError
from zppo_protocol.messages import GenerateTask
from zppo_protocol.samples import GroupSamples
from zppo_protocol.support import Support, joined, support_of
from zppo_protocol.values import FROZEN, Prompt, Sampling

ROWS = st.lists(st.lists(st.integers(0, 2**31 - 1), unique=True, max_size=5), max_size=8)


def int32(*values: Any) -> np.ndarray:
    return np.array(values, np.int32)


def rows_of(support: Support) -> list[list[int]]:
    return [row.tolist() for row in np.split(support.ids, support.offsets[1:])][
        : len(support.offsets) - 1
    ]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(rows=ROWS, more=ROWS, data=st.data())
def test_rows_come_back_sorted_however_they_are_cut_and_joined(
    rows: list[list[int]], more: list[list[int]], data: st.DataObject
) -> None:
    wanted = [sorted(row) for row in rows]
    support = support_of([np.array(row, np.int32) for row in rows])
    assert rows_of(support) == wanted and rows_of(loads(dumps(support), Support)) == wanted
    assert support.lengths_T.tolist() == [len(row) for row in rows]
    kept = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    picked = support.picked(np.array(kept, np.bool_))
    assert rows_of(picked) == [row for row, keep in zip(wanted, kept, strict=True) if keep]
    first = data.draw(st.integers(0, len(rows)))
    end = data.draw(st.integers(first, len(rows)))
    assert rows_of(support.part(first, end)) == wanted[first:end]
    other = support_of([np.array(row, np.int32) for row in more])
    both = joined([(support, len(rows)), (None, 2), (other, len(more))])
    assert both is not None
    assert rows_of(both) == [*wanted, [], [], *(sorted(row) for row in more)]
    assert joined([(None, 3), (None, 0)]) is None


GOOD: dict[str, Any] = {
    "prompt_ids": int32(1),
    "token_ids": int32(4, 5, 6),
    "log_probs": np.array([-0.5, 0.0, -2.0], np.float32),
    "offsets": int32(0, 1, 3),
    "version_spans": int32([2, 7], [1, FROZEN]),
    "texts": ["four", "5"],
    "finish_reasons": ["stop", "length"],
}
PARTS: dict[str, Any] = {"ids": int32(3, 4, 5), "offsets": int32(0, 2, 3, 3)}
"""The last token has no row: no policy sampled it."""
BAD = [
    ({"ids": [3, 4, 5]}, "support.ids must be a numpy array, got list"),
    ({"ids": np.array([3, 4, 5])}, "support.ids must be int32, got int64"),
    ({"offsets": np.array([0, 2, 3, 3])}, "support.offsets must be int32, got int64"),
    ({"ids": int32(-1, 4, 5)}, "support.ids must not be negative, got -1"),
    ({"offsets": int32()}, "support.offsets must run from 0 to 3, got nothing"),
    ({"offsets": int32(0, 2, 2)}, "support.offsets must run from 0 to 3, got 0 to 2"),
    ({"offsets": int32(0, 4, 3, 3)}, "support.offsets must not fall"),
    ({"offsets": int32(0, -1, 3, 3)}, "support.offsets must not fall"),
    ({"ids": int32(4, 3, 5)}, "support.ids must rise within a row"),
    ({"ids": int32(4, 4, 5)}, "support.ids must rise within a row"),
    ({"offsets": int32(0, 2, 3)}, "support must have one row per token (3), got 2"),
    ({"ids": int32(3, 7, 5)}, "support must hold the sampled token of every row"),
    (
        {"ids": int32(5, 6), "offsets": int32(0, 0, 1, 2)},
        "support must have an id for every token that a policy sampled",
    ),
]


@pytest.mark.parametrize(("change", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_a_support_that_contradicts_itself_or_its_tokens_cannot_be_built(
    change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ProtocolError) as caught:
        GroupSamples(**GOOD, support=Support(**{**PARTS, **change}))
    assert str(caught.value) == sentence


def test_a_good_one_survives_the_trip_and_a_blob_without_one_is_read() -> None:
    samples = GroupSamples(**GOOD, support=Support(**PARTS))
    again = loads(dumps(samples), GroupSamples)
    assert again.support is not None and rows_of(again.support) == [[3, 4], [5], []]
    assert loads(dumps(GOOD), GroupSamples).support is None


def test_a_task_for_supports_says_how_large_they_may_be() -> None:
    fields: dict[str, Any] = {"task_id": "t", "kind": "plain", "prompt": Prompt([]), "n": 1}
    sampling = Sampling(max_new_tokens=1, top_p=0.5)
    with pytest.raises(ProtocolError, match=r"must be at least 1 with_support, got 0$"):
        GenerateTask(**fields, sampling=sampling, seed=0, with_support=True)
    bounded = Sampling(max_new_tokens=1, top_k=9)
    assert GenerateTask(**fields, sampling=bounded, seed=0, with_support=True).support_limit == 9
    assert GenerateTask(**fields, sampling=bounded, seed=0).support_limit == 0
