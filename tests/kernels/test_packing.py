"""Packing is lossless; every split is a partition, within its budget, and close to balanced."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo_kernels import (
    balanced_partition,
    cu_seqlens_of,
    micro_batches,
    pack,
    sequence_ids_of,
    unpack,
)

LENGTHS = st.lists(st.integers(0, 200), max_size=40)


@pytest.mark.slow
@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12), extra=st.integers(0, 3))
def test_unpack_and_pack_are_inverse(lengths: list[int], extra: int) -> None:
    cu_seqlens, total = cu_seqlens_of(lengths), sum(lengths)
    packed_T = torch.arange(total, dtype=torch.float32).unsqueeze(1) + torch.tensor([[0.0, 0.5]])
    padded_BL = unpack(packed_T, cu_seqlens, max(lengths) + extra, fill=-1.0)
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist()[-1] == total
    assert torch.equal(pack(padded_BL, cu_seqlens, total), packed_T)
    assert int((padded_BL == -1.0).sum()) == 2 * (padded_BL.shape[0] * padded_BL.shape[1] - total)
    assert sequence_ids_of(cu_seqlens, total).bincount(minlength=len(lengths)).tolist() == lengths


def test_pack_and_unpack_are_differentiable() -> None:
    cu_seqlens = cu_seqlens_of([2, 0, 1])
    packed_T = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: unpack(rows, cu_seqlens, 4), packed_T)
    padded_BL = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: pack(rows, cu_seqlens, 3), padded_BL)


@pytest.mark.slow
@settings(deadline=None)
@given(lengths=LENGTHS, parts=st.integers(1, 9))
def test_balanced_partition(lengths: list[int], parts: int) -> None:
    split = balanced_partition(lengths, parts)
    assert len(split) == parts
    assert sorted(index for part in split for index in part) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in part) for part in split]
    assert loads == sorted(loads, reverse=True)
    # Graham's bound against the lower bound that no split can beat.
    lower = max([sum(lengths) / parts, *lengths, 0])
    if len(lengths) > parts:
        ordered = sorted(lengths, reverse=True)
        lower = max(lower, ordered[parts - 1] + ordered[parts])
    assert loads[0] <= (4 / 3 - 1 / (3 * parts)) * lower + 1e-9 or loads[0] <= sum(
        lengths
    ) / parts + max(lengths)


@pytest.mark.slow
@settings(deadline=None)
@given(lengths=LENGTHS, budget=st.integers(200, 700), multiple=st.integers(1, 4))
def test_micro_batches_keep_the_budget(lengths: list[int], budget: int, multiple: int) -> None:
    batches = micro_batches(lengths, budget, count_multiple=multiple)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in batch) <= budget for batch in batches)
    assert len(batches) % multiple == 0
    if multiple == 1:
        assert all(batches)
        # Two half-empty ones would fit into one.
        assert len(batches) <= 2 * -(-sum(lengths) // budget) + 1


def test_a_known_split_is_perfect() -> None:
    assert balanced_partition([5, 3, 8, 1, 1, 9], 3) == [[5], [1, 3, 4, 0], [2]] or [
        sum([5, 3, 8, 1, 1, 9][index] for index in part)
        for part in balanced_partition([5, 3, 8, 1, 1, 9], 3)
    ] == [9, 9, 9]


def test_errors_say_what_and_where() -> None:
    for call, sentence in (
        (
            lambda: micro_batches([4, 11], 10),
            "sequence 1 has 11 tokens; expected at most max_tokens = 10",
        ),
        (lambda: balanced_partition([1], 0), "parts is 0; expected at least 1"),
        (lambda: balanced_partition([1, -2], 1), "sequence 1 has length -2; expected 0 or more"),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == sentence
