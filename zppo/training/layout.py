"""How sequences lie in one forward pass: right-padded rows, sorted by length, rollouts of a group
as one tree behind one prompt.

A *row* holds a prompt once and behind it one or more rollouts of its group. With one rollout it is
an ordinary causal sequence. With several it is their tree, branch behind branch: what rollouts
begin with alike is there once, as the prompt is. Each branch takes up the positions where it leaves
another, and a mask, or in long rows attention that goes branch by branch, shows each token its own
rollout's tokens before it and the prompt, so its hidden state is what it would be alone. That pays
where prompts are long against answers (BCQ and NCQ above all) and where a student is sure of how
answers begin. Padding stands on the right, where no real token can see it.

Several ranks deal the rows out among themselves, so that each gets about as many positions, and
make equally many passes.

Invariant: each response token of the sequences handed in has exactly one entry in exactly one
micro-batch of one rank, those of weight 0 aside.

Shape legend: B rows, L padded positions, R response tokens and S sequences of a micro-batch, K ids
of its longest support; T tokens of the window.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

from zppo.training.batch import Rollouts
from zppo.training.pictures import SeenPrompt

PAD_ID = 0

PASS_SHARE = 16
"""What a pass costs beside its positions: as much as this part of the most that it may hold."""

SHARED_WIDTH = 1024
"""Longest row with several rollouts whose attention has a mask. That makes it dense, L*L a row, so
long rows would lose again; in those a model must do without (`tree_mask`)."""


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass.

    input_ids_BL: prompts and responses. rows_R: positions in the flattened [B*L] whose hidden
    states predict the response tokens. tokens_R: indices of these tokens in the window.
    sequence_ids_R: their sequence, in [0, S). sequences_S: its index in the window. positions_BL
    and ends_BL (see `attention_mask`): only when some row holds several rollouts, else None.
    support_RK: the tokens that could have been sampled, -1 behind them
    (`zppo.training.supports`); None: all could.
    seen_B: the pictures of each row's prompt; empty where no row has any.
    weight: 0 for a pass that counts elsewhere, and is made here because others make one.
    """

    input_ids_BL: Tensor
    rows_R: Tensor
    tokens_R: Tensor
    sequence_ids_R: Tensor
    sequences_S: Tensor
    positions_BL: Tensor | None = None
    ends_BL: Tensor | None = None
    support_RK: Tensor | None = None
    seen_B: tuple[SeenPrompt | None, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True)
class Deal:
    """The passes of one rank, equally many on all of them, and how many over all ranks count."""

    batches: list[MicroBatch]
    total: int


@dataclass
class _Row:
    """One row in the making: its group, the sequences behind its prompt, how many tokens each
    begins with as the one before it does, the positions they take together, and how many tokens
    these predict."""

    group: int
    sequences: list[int]
    alike: list[int]
    width: int
    tokens: int

    def add(self, sequence: int, length: int, alike: int) -> None:
        """Another sequence, which takes `length` positions where it is alone."""
        self.sequences.append(sequence)
        self.alike.append(alike)
        self.width += length - alike
        self.tokens += length + 1


@dataclass(frozen=True)
class _Room:
    """What a row of several rollouts may hold: `width` positions, 0 for no such rows, `longest` if
    it needs no mask, and unless it may be `crowded`, one predicted token for each."""

    width: int
    longest: int
    crowded: bool

    def of_group(self, prompt: int, lengths: list[int]) -> _Room:
        """That of a group's rows, which need no mask if two of its mean length do not fit a row
        with one: where they do, attention branch by branch is slower than with a mask."""
        if prompt + 2 * sum(lengths) / len(lengths) > self.width:
            return replace(self, width=self.longest)
        return self

    def takes(self, row: _Row, length: int, alike: int) -> bool:
        """Whether a sequence of `length` positions, `alike` of which are there, may be added."""
        width = row.width + length - alike
        return width <= self.width and (self.crowded or row.tokens + length + 1 <= width)


def deal_passes(
    rollouts: Rollouts,
    sequences: np.ndarray,
    max_tokens: int,
    *,
    share: bool,
    long: bool = False,
    crowded: bool = True,
    rank: int = 0,
    ranks: int = 1,
) -> Deal:
    """Lay `sequences` into rows, sort these by length, longest first, deal them out among `ranks`,
    and cut each rank's into passes with B*L of at most `max_tokens` and little padding.

    Sequences without response tokens are left out; a row that is longer than `max_tokens` goes
    alone. `share` allows several rollouts behind one prompt, as far as the row stays within
    `max_tokens` and `SHARED_WIDTH`, or, if `long`, within `max_tokens` alone where two of the group
    do not fit otherwise, and unless `crowded` as far as a row predicts no more tokens than it has
    positions: the memory of logits that are there for each token grows with them. A rank with fewer
    passes than another repeats its last one, or, if it has none, another rank's, with weight 0.
    """
    masked = min(SHARED_WIDTH, max_tokens) if share else 0
    room = _Room(masked, max_tokens if share and long else masked, crowded)
    rows = sorted(_rows(rollouts, sequences, room), key=lambda row: -row.width)
    dealt = deal_rows([row.width for row in rows], ranks)
    passes = [_cut([rows[index] for index in own], max_tokens, room.width) for own in dealt]
    batches = [_collate(rollouts, part) for part in passes[rank]]
    spare = max(len(own) for own in passes) - len(batches)
    if spare:
        last = batches[-1] if batches else _collate(rollouts, passes[0][-1])
        batches += [replace(last, weight=0.0)] * spare
    return Deal(batches, sum(len(own) for own in passes))


def deal_rows(widths: list[int], ranks: int) -> list[list[int]]:
    """The rows, by their index, of each rank: one after the other to whoever has the fewest
    positions. Two ranks then differ by at most the longest row."""
    loads = [(0, rank) for rank in range(ranks)]
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for index, width in enumerate(widths):
        load, rank = loads[0]
        dealt[rank].append(index)
        heapq.heapreplace(loads, (load + width, rank))
    return dealt


def _cut(rows: list[_Row], max_tokens: int, limit: int) -> list[list[_Row]]:
    """Rows, longest first, as micro-batches of at most `max_tokens` padded positions.

    Rows longer than `limit` have passes of their own: the mask of a tree would take the place of a
    sliding window there, and L * L numbers. They are of one rollout each, or trees without a mask.
    """
    longer = sum(row.width > limit for row in rows)
    passes = []
    for part in (rows[:longer], rows[longer:]):
        bounds = cuts([row.width for row in part], max_tokens, max_tokens // PASS_SHARE)
        passes += [part[start:end] for start, end in pairwise(bounds)]
    return passes


def cuts(widths: list[int], max_tokens: int, pass_cost: int) -> list[int]:
    """Where to cut rows of these widths, longest first, into passes: 0, the ends of all but the
    last pass, and the number of rows.

    A pass takes its longest row's width for each of its rows, at most `max_tokens` unless it is
    one row, and beside them what `pass_cost` positions would. Of all ways to cut, one that takes
    least (a shortest path over the places to cut; of equals the one with the longest last pass).
    """
    count, widths_N = len(widths), np.array(widths, np.int64)
    least_N, before_N = np.zeros(count + 1, np.int64), np.zeros(count + 1, np.int64)
    first, rows_N = 0, np.arange(count, 0, -1)
    for end in range(1, count + 1):
        while first < end - 1 and (end - first) * widths[first] > max_tokens:
            first += 1
        costs = least_N[first:end] + rows_N[first - end :] * widths_N[first:end] + pass_cost
        best = int(costs.argmin())
        least_N[end], before_N[end] = costs[best], first + best
    bounds = [count]
    while bounds[-1]:
        bounds.append(int(before_N[bounds[-1]]))
    return bounds[::-1]


def _rows(rollouts: Rollouts, sequences: np.ndarray, room: _Room) -> list[_Row]:
    """Fill rows group by group as far as there is room; a rollout's last token predicts nothing
    and is left out."""
    rows: list[_Row] = []
    sequences = sequences[rollouts.lengths_S[sequences] > 0]
    sequences = sequences[np.argsort(rollouts.group_S[sequences], kind="stable")]
    grouped = zip(rollouts.group_S[sequences].tolist(), sequences.tolist(), strict=True)
    for group, members in groupby(grouped, key=itemgetter(0)):
        chosen = [(_inputs_of(rollouts, sequence), sequence) for _, sequence in members]
        prompt = len(rollouts.prompts_G[group])
        own = room.of_group(prompt, [len(inputs) for inputs, _ in chosen])
        if own.width:
            # Sorted by their tokens, what is alike at the beginning stands side by side.
            chosen.sort(key=lambda one: one[0][: own.width].tolist())
        before: np.ndarray | None = None
        for inputs, sequence in chosen:
            length, alike = len(inputs), 0
            if before is not None and rows[-1].width <= own.width:
                alike = _common_length(before, inputs)
            if before is None or not own.takes(rows[-1], length, alike):
                rows.append(_Row(group, [], [], prompt, 0))
                alike = 0
            rows[-1].add(sequence, length, alike)
            before = inputs
    return rows


def _inputs_of(rollouts: Rollouts, sequence: int) -> np.ndarray:
    """The tokens of a rollout that predict another."""
    start, length = int(rollouts.starts_S[sequence]), int(rollouts.lengths_S[sequence])
    return rollouts.host_ids_T[start : start + length - 1]


def _common_length(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens both begin with."""
    shorter = min(len(one), len(other))
    differs = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(differs[0]) if len(differs) else shorter


def _collate(rollouts: Rollouts, rows: list[_Row]) -> MicroBatch:
    """Write the rows into padded blocks and note where each response token is predicted."""
    shape = (len(rows), rows[0].width)
    ids_BL, positions_BL = np.full(shape, PAD_ID, np.int64), np.zeros(shape, np.int64)
    ends_BL, places = np.full(shape, shape[1], np.int64), np.arange(shape[1])
    predicted, tokens = [], []
    for index, row in enumerate(rows):
        prompt = rollouts.prompts_G[row.group]
        end = len(prompt)
        ids_BL[index, :end], positions_BL[index, :end] = prompt, places[:end]
        ends_BL[index, : row.width] = row.width
        path = places[end - 1 : end]  # what predicts the tokens of a rollout
        for sequence, alike in zip(row.sequences, row.alike, strict=True):
            ends_BL[index, path[alike + 1 :]] = end
            inputs = _inputs_of(rollouts, sequence)
            begin, length, end = end, len(inputs), end + len(inputs) - alike
            ids_BL[index, begin:end] = inputs[alike:]
            positions_BL[index, begin:end] = places[len(prompt) + alike :][: end - begin]
            path = np.concatenate([path[: alike + 1], places[begin:end]])
            predicted.append(index * shape[1] + path)
            tokens.append(rollouts.starts_S[sequence] + places[: length + 1])
    sequences_S = np.array([sequence for row in rows for sequence in row.sequences])
    tokens_R = np.concatenate(tokens)
    support_RK = None if rollouts.supports is None else rollouts.supports.padded(tokens_R)
    seen_B = tuple(rollouts.seen_G[row.group] for row in rows) if rollouts.seen_G else ()

    def placed(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(rollouts.device)

    batch = MicroBatch(
        input_ids_BL=placed(ids_BL),
        rows_R=placed(np.concatenate(predicted)),
        tokens_R=placed(tokens_R),
        sequence_ids_R=placed(
            np.repeat(np.arange(len(sequences_S)), rollouts.lengths_S[sequences_S])
        ),
        sequences_S=placed(sequences_S),
        support_RK=None if support_RK is None else placed(support_RK),
        seen_B=seen_B if any(seen_B) else (),
    )
    if len(sequences_S) == len(rows):
        return batch
    return replace(batch, positions_BL=placed(positions_BL), ends_BL=placed(ends_BL))


def with_row(batch: MicroBatch, ids: list[int], seen: SeenPrompt) -> MicroBatch:
    """The batch with one more row, which predicts nothing: `ids` with what is `seen` there."""
    rows, width = batch.input_ids_BL.shape
    wider = max(width, len(ids))

    def grown(tensor_BL: Tensor, row: list[int], filling: int) -> Tensor:
        padded_BL = torch.nn.functional.pad(tensor_BL, (0, wider - width, 0, 1), value=filling)
        padded_BL[-1, : len(row)] = torch.tensor(row, device=tensor_BL.device)
        return padded_BL

    positions_BL, ends_BL = batch.positions_BL, batch.ends_BL
    return replace(
        batch,
        input_ids_BL=grown(batch.input_ids_BL, ids, PAD_ID),
        rows_R=batch.rows_R // width * wider + batch.rows_R % width,
        positions_BL=None
        if positions_BL is None
        else grown(positions_BL, list(range(len(ids))), 0),
        ends_BL=None if ends_BL is None else grown(ends_BL, [len(ids)] * len(ids), wider),
        seen_B=(*(batch.seen_B or (None,) * rows), seen),
    )


def attention_mask(ends_BL: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask [B, 1, L, L] of rows that are trees, branch behind branch: `ends_BL` says
    where those that stand behind a position and see it end, so i sees j if j <= i < ends[j].

    Padding ends with the row, so that no row of the softmax is empty.
    """
    places_L = torch.arange(ends_BL.shape[1], device=ends_BL.device)
    before_LL = places_L[None, :] <= places_L[:, None]
    allowed_BLL = before_LL & (places_L[None, :, None] < ends_BL[:, None, :])
    mask_BLL = torch.zeros(allowed_BLL.shape, dtype=dtype, device=ends_BL.device)
    return mask_BLL.masked_fill_(~allowed_BLL, torch.finfo(dtype).min)[:, None]


def tree_mask(ends_BL: Tensor, dtype: torch.dtype, *, long: bool) -> Tensor:
    """What a model gets as attention mask of rows that are trees: the dense one, or, in rows longer
    than `SHARED_WIDTH` and if it shares `long` ones, their ends themselves, int64 [B, 1, 1, L], for
    attention that goes branch by branch (`zppo.training.trees`). Rows of another model may be as
    long where a picture that nobody reads was added to them (`with_row`)."""
    if long and ends_BL.shape[1] > SHARED_WIDTH:
        return ends_BL[:, None, None]
    return attention_mask(ends_BL, dtype)
