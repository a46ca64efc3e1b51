"""Continuous batching, synchronously: admit sequences, sample one token for all of them, hand back
those that ended.

`Decoder` owns the slots and the random numbers of the running sequences; threads and futures are
the engine's business. A prompt is read once per group and without its last token; that token is the
first input of every member, so the end of a prompt and a sampled token take the same step. Work per
token is a handful of tensor operations over all rows; Python runs per sequence only.

Members of a group that have sampled the same tokens so far are one *branch*: the model reads their
next token once, and each samples from the same logits with its own random number. Where these give
several tokens, the branch is copied, one for each token.

Invariant: row b of the cache, its bias and the next tokens belongs to branch b, row s of all other
buffers to `running[s]`; rows beyond the last branch and sequence hold nothing that is read. Each
branch has a running sequence, `_branch_R` says which branch each has.

Legend: S running sequences, B branches, R rows and C columns held, M prompts of one prefill, Q
their padded length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from zppo.plan.architecture import COLUMN_STEP
from zppo.prompting.picture_families import unsampled_ids
from zppo.training.pictures import Tower
from zppo_actors.engines.sequences import Completion, Running
from zppo_actors.engines.transformers.attention import mask_value
from zppo_actors.engines.transformers.sampling import Sampler
from zppo_actors.engines.transformers.slots import SlotCache, grown
from zppo_protocol.values import FROZEN

PREFILL_TOKENS = 8192
"""Padded prompt tokens of one pass; bounds the activations and how long the running sequences
wait."""

TOKEN_BITS = 32
"""A branch and a token as one number: the token has the low bits."""

Ended = tuple[Running, Completion]


class Decoder:
    """Samples up to `max_rows` sequences of up to `max_length` tokens (prompt and response) at
    once."""

    def __init__(
        self,
        model: Any,
        end_ids: frozenset[int],
        max_rows: int,
        max_length: int,
        tower: Tower | None = None,
    ) -> None:
        """`model` is a causal language model of transformers with our attention, in evaluation
        mode; `tower` is what sees pictures in it, for prompts that have some."""
        self.running: list[Running] = []
        self.version = FROZEN
        self._model = model
        self._device = torch.device(model.device)
        self._end_ids = np.asarray(sorted(end_ids), dtype=np.int64)
        self._max_rows = max_rows
        self._max_columns = _round_up(max_length + 1)
        self._tower = tower
        unsampled = unsampled_ids(model.config.to_dict())
        self._unsampled = torch.tensor(unsampled, device=self._device) if unsampled else None
        self._cache = SlotCache(model.config.get_text_config())
        self._bias_RC = torch.zeros((0, 0), dtype=model.dtype, device=self._device)
        self._hidden = mask_value(model.dtype)
        self._ids_RC, self._log_probs_RC, self._uniforms_RC = self._empty_buffers()
        self._position_R = np.zeros(max_rows, dtype=np.int64)
        """Position of the token each sequence feeds next; prompt length - 1 at first."""
        self._shift_R = np.zeros(max_rows, dtype=np.int64)
        """What the model counts a token beyond its place, because of the pictures before it."""
        self._left_R = np.zeros(max_rows, dtype=np.int64)
        self._branch_R = np.zeros(max_rows, dtype=np.int64)
        self._tokens_B = torch.zeros(0, dtype=torch.int64, device=self._device)
        self._changed = True
        if self._cache.recurrent:
            self._learn_shapes()

    @property
    def free(self) -> int:
        """How many more sequences can be admitted."""
        return self._max_rows - len(self.running)

    def set_version(self, version: int) -> None:
        """Stamp all tokens from the next one on with policy `version`."""
        self.version = version
        for row, sequence in enumerate(self.running):
            sequence.sampled_by(version, self._count(row))

    def admit(self, groups: list[list[Running]]) -> None:
        """Take in groups of sequences that share their prompt (same `prompt_ids`), at most `free`
        sequences."""
        groups = sorted(groups, key=lambda group: -len(group[0].prompt_ids))
        first = len(self.running)
        self._reserve(
            first + sum(len(group) for group in groups),
            max((len(group[0].prompt_ids) for group in groups), default=0),
        )
        for batch in _batches(groups, equal=self._cache.recurrent):
            self._prefill(batch)
        if groups:
            last_ids = [int(group[0].prompt_ids[-1]) for group in groups]
            self._tokens_B = torch.cat(
                [self._tokens_B, torch.tensor(last_ids, device=self._device)]
            )

    def step(self) -> list[Ended]:
        """Sample one token for every running sequence; return those that ended with it. Their rows
        are free again."""
        self._prepare()
        tokens_S, log_probs_S = self._sampler(
            self._logits().index_select(0, self._branch_S),
            self._uniforms_RC.view(-1)[self._places_S],
        )
        self._places_S += 1
        self._places_B += 1
        self._positions_B += 1
        self._ids_RC.view(-1).index_copy_(0, self._places_S, tokens_S)
        self._log_probs_RC.view(-1).index_copy_(0, self._places_S, log_probs_S)
        self._note_support()
        return self._end(tokens_S.cpu().numpy())

    def drop(self, unwanted: Callable[[Running], bool]) -> None:
        """Stop sequences nobody waits for."""
        self._remove([row for row, sequence in enumerate(self.running) if unwanted(sequence)])

    def reset(self) -> None:
        """Forget everything that runs and give the memory back."""
        self.running.clear()
        self._tokens_B = self._tokens_B[:0]
        self._cache.release()
        self._bias_RC = self._bias_RC.new_zeros((0, 0))
        self._ids_RC, self._log_probs_RC, self._uniforms_RC = self._empty_buffers()
        self._changed = True

    # ---- one step --------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Lay the batch out anew after a change, and see to it that the next column exists."""
        rows = len(self.running)
        furthest = int(self._position_R[:rows].max())
        if furthest + 1 >= self._cache.cursor.columns:
            self._reserve(rows, furthest + 2)
        if self._changed:
            columns, branch_S = self._cache.cursor.columns, self._branch_R[:rows]
            _, member_B = np.unique(branch_S, return_index=True)
            position_B = self._position_R[member_B]
            self._places_S = self._on_device(
                np.arange(rows, dtype=np.int64) * columns + self._position_R[:rows]
            )
            self._places_B = self._on_device(np.arange(len(position_B)) * columns + position_B)
            self._positions_B = self._on_device(position_B + self._shift_R[member_B])
            self._branch_S = self._on_device(branch_S)
            self._sampler = Sampler(
                [sequence.sampling for sequence in self.running],
                self._device,
                self._seen(),
                [sequence.support_limit for sequence in self.running],
                self._unsampled,
            )
            self._changed = False
        self._cache.at_tokens(
            self._places_B, min(_round_up(furthest + 1), self._cache.cursor.columns)
        )

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.tensor(array, dtype=torch.int64, device=self._device)

    def _note_support(self) -> None:
        """Keep what the tokens just sampled could have been. On the host: on the device it would
        take `support_limit` numbers for every column held."""
        for rows, ids_KW in self._sampler.supports:
            for row, ids_W in zip(rows, ids_KW.cpu().numpy().astype(np.int32), strict=True):
                self.running[row].support.append(ids_W[ids_W >= 0])

    def _seen(self) -> Tensor | None:
        """Which tokens each sequence has sampled so far, [S, V] bool; None if none is penalised for
        them."""
        if not any(sequence.sampling.presence_penalty for sequence in self.running):
            return None
        vocabulary = self._model.get_output_embeddings().weight.shape[0]
        seen_SV = torch.zeros(
            (len(self.running), vocabulary), dtype=torch.bool, device=self._device
        )
        for row, sequence in enumerate(self.running):
            first = len(sequence.prompt_ids)
            seen_SV[row, self._ids_RC[row, first : first + self._count(row)]] = True
        return seen_SV

    def _logits(self) -> Tensor:
        """Next-token logits [B, V]."""
        rows, visible = len(self._tokens_B), self._cache.cursor.visible
        self._bias_RC.view(-1).index_fill_(0, self._places_B, 0.0)
        output = self._model(
            input_ids=self._tokens_B[:, None],
            position_ids=self._positions_B[:, None],
            attention_mask=self._bias_RC[:rows, None, None, :visible],
            past_key_values=self._cache,
            use_cache=True,
        )
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV

    def _end(self, tokens_S: np.ndarray) -> list[Ended]:
        rows = len(self.running)
        self._position_R[:rows] += 1
        self._left_R[:rows] -= 1
        stopped_S = (
            np.isin(tokens_S, self._end_ids)
            if len(self._end_ids) > 1
            else tokens_S == self._end_ids[0]
        )
        ended_S = stopped_S | (self._left_R[:rows] == 0)
        self._branch_off(tokens_S, np.flatnonzero(~ended_S))
        if not ended_S.any():
            return []
        ended = [int(row) for row in np.flatnonzero(ended_S)]
        results = [
            (self.running[row], self._completion(row, "stop" if stopped_S[row] else "length"))
            for row in ended
        ]
        self._remove(ended)
        return results

    def _completion(self, row: int, reason: Literal["stop", "length"]) -> Completion:
        sequence, count = self.running[row], self._count(row)
        first = len(sequence.prompt_ids)
        return Completion(
            token_ids=self._ids_RC[row, first : first + count].cpu().numpy().astype(np.int32),
            log_probs=self._log_probs_RC[row, first : first + count].cpu().numpy().copy(),
            version_spans=sequence.spans(count),
            finish_reason=reason,
            support=sequence.support if sequence.support_limit else None,
        )

    def _count(self, row: int) -> int:
        """Tokens sampled so far by the sequence in `row`."""
        return int(self._position_R[row]) + 1 - len(self.running[row].prompt_ids)

    # ---- branches part ---------------------------------------------------------------------------

    def _branch_off(self, tokens_S: np.ndarray, going_on: np.ndarray) -> None:
        """Of the sequences that go on, give those of a branch that sampled different tokens
        branches of their own; note the next token of each branch."""
        branches = len(self._tokens_B)
        pairs, members = np.unique(
            self._branch_R[going_on] << TOKEN_BITS | tokens_S[going_on], return_inverse=True
        )
        old, tokens = pairs >> TOKEN_BITS, pairs & ((1 << TOKEN_BITS) - 1)
        apart = np.flatnonzero(old[1:] == old[:-1]) + 1
        new = old.copy()
        new[apart] = branches + np.arange(len(apart))
        self._branch_R[going_on] = new[members]
        tokens_B = np.zeros(branches + len(apart), dtype=np.int64)
        tokens_B[new] = tokens
        self._tokens_B = self._on_device(tokens_B)
        if len(apart):
            self._copy_branches(old[apart], new[apart])

    def _copy_branches(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Copy what the model has read for some branches onto others (disjoint)."""
        rows = len(self.running)
        from_, to = self._on_device(sources), self._on_device(targets)
        self._cache.move(from_, to, int(self._position_R[:rows].max()))
        self._bias_RC.index_copy_(0, to, self._bias_RC.index_select(0, from_))
        self._changed = True

    def _drop_branches(self) -> None:
        """Free the branches that no sequence has; the last ones move into the holes."""
        rows, branches = len(self.running), len(self._tokens_B)
        used_B = np.zeros(branches, dtype=np.bool_)
        used_B[self._branch_R[:rows]] = True
        kept = int(used_B.sum())
        holes, movers = np.flatnonzero(~used_B[:kept]), kept + np.flatnonzero(used_B[kept:])
        if len(holes):
            self._copy_branches(movers, holes)
            self._tokens_B[self._on_device(holes)] = self._tokens_B[self._on_device(movers)]
            moved_B = np.arange(branches)
            moved_B[movers] = holes
            self._branch_R[:rows] = moved_B[self._branch_R[:rows]]
        self._tokens_B = self._tokens_B[:kept]

    # ---- rows come and go ------------------------------------------------------------------------

    def _prefill(self, groups: list[list[Running]]) -> None:
        """Read each prompt once, but for its last token, as a branch that every member of its group
        has."""
        first = self._branches
        lengths = [len(group[0].prompt_ids) - 1 for group in groups]
        prompt_of_row = torch.arange(len(groups), device=self._device)
        self._cache.at_prompts(first, prompt_of_row)
        if max(lengths) > 0:
            self._model(
                input_ids=_padded([group[0].prompt_ids[:-1] for group in groups]).to(self._device),
                **self._placed(groups, max(lengths)),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        else:
            self._cache.clear_states()
        seen_R1 = torch.tensor(lengths, device=self._device)[prompt_of_row, None]
        columns_C = torch.arange(self._cache.cursor.columns, device=self._device)
        new_rows = slice(first, first + len(prompt_of_row))
        self._bias_RC[new_rows] = torch.where(columns_C < seen_R1, 0.0, self._hidden).to(
            self._bias_RC.dtype
        )
        for branch, group in enumerate(groups, start=first):
            for sequence in group:
                self._start(sequence, branch)

    def _placed(self, groups: list[list[Running]], length: int) -> dict[str, Any]:
        """Positions of the prompts' tokens, and what is to be seen there."""
        places_MQ = torch.arange(length, device=self._device).expand(len(groups), -1)
        inputs: dict[str, Any] = {"position_ids": places_MQ}
        if self._tower is not None:
            inputs |= self._tower.inputs([group[0].pictures for group in groups], places_MQ)
        return inputs

    @torch.no_grad()
    def _learn_shapes(self) -> None:
        """Read one token for no row: a first prompt of one token would find no states to zero."""
        self._cache.at_prompts(0, torch.zeros(0, dtype=torch.int64, device=self._device))
        first_11 = torch.zeros((1, 1), dtype=torch.int64, device=self._device)
        self._model(
            input_ids=first_11, position_ids=first_11, past_key_values=self._cache, use_cache=True
        )

    @property
    def _branches(self) -> int:
        """How many there are, those included whose next token is not noted yet."""
        return int(self._branch_R[: len(self.running)].max(initial=-1)) + 1

    def _start(self, sequence: Running, branch: int) -> None:
        row = len(self.running)
        self.running.append(sequence)
        self._position_R[row] = len(sequence.prompt_ids) - 1
        self._shift_R[row] = 0 if sequence.pictures is None else sequence.pictures.shift
        self._left_R[row] = sequence.budget
        self._branch_R[row] = branch
        sequence.sampled_by(self.version, 0)
        self._lay_out_uniforms(row)
        self._changed = True

    def _lay_out_uniforms(self, row: int) -> None:
        """Fill the row's random numbers as far as its columns reach; column c decides the token of
        position c + 1."""
        sequence = self.running[row]
        first = len(sequence.prompt_ids) - 1
        wanted = min(sequence.budget, self._cache.cursor.columns - first)
        start, count = first + sequence.uniforms_laid_out, wanted - sequence.uniforms_laid_out
        if count > 0:
            self._uniforms_RC[row, start : start + count] = sequence.uniforms.take(count)
            sequence.uniforms_laid_out = wanted

    def _remove(self, ended: list[int]) -> None:
        """Free rows; the last running ones move into the holes, so that they stay a prefix."""
        if not ended:
            return
        rows, gone = len(self.running), set(ended)
        kept = rows - len(gone)
        holes = [row for row in ended if row < kept]
        movers = [row for row in range(kept, rows) if row not in gone]
        if holes:
            self._move(movers, holes)
        del self.running[kept:]
        self._drop_branches()
        self._changed = True

    def _move(self, movers: list[int], holes: list[int]) -> None:
        sources, targets = (torch.tensor(rows, device=self._device) for rows in (movers, holes))
        for buffer in (self._ids_RC, self._log_probs_RC, self._uniforms_RC):
            buffer.index_copy_(0, targets, buffer.index_select(0, sources))
        for host in (self._position_R, self._shift_R, self._left_R, self._branch_R):
            host[holes] = host[movers]
        for source, target in zip(movers, holes, strict=True):
            self.running[target] = self.running[source]

    # ---- room ------------------------------------------------------------------------------------

    def _reserve(self, rows: int, columns: int) -> None:
        """Make sure that `rows` x `columns` fit, growing by half or more so that growth is rare."""
        held = self._cache.cursor
        if rows <= held.rows and columns <= held.columns:
            return
        rows = held.rows if rows <= held.rows else min(self._max_rows, max(rows, 2 * held.rows))
        if columns > held.columns:
            columns = min(
                self._max_columns, _round_up(max(columns, held.columns + held.columns // 2, 128))
            )
        else:
            columns = held.columns
        self._cache.resize(rows, columns)
        self._bias_RC, self._ids_RC, self._log_probs_RC, self._uniforms_RC = (
            grown(buffer, rows, columns) for buffer in self._buffers()
        )
        self._hide_new_columns()

    def _hide_new_columns(self) -> None:
        """After growth: new columns of running rows are hidden, and their random numbers go on."""
        for row in range(len(self.running)):
            self._bias_RC[self._branch_R[row], int(self._position_R[row]) :] = self._hidden
            self._lay_out_uniforms(row)
        self._changed = True

    def _buffers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._bias_RC, self._ids_RC, self._log_probs_RC, self._uniforms_RC

    def _empty_buffers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sampled ids, their log-probs, and the random numbers, all [R, C]; tokens stand at their
        positions."""
        ids_RC = torch.zeros((0, 0), dtype=torch.int64, device=self._device)
        log_probs_RC = torch.zeros((0, 0), dtype=torch.float32, device=self._device)
        return ids_RC, log_probs_RC, log_probs_RC.clone()


def _batches(groups: list[list[Running]], *, equal: bool) -> Iterator[list[list[Running]]]:
    """Cut groups, longest prompt first, into passes of at most PREFILL_TOKENS padded tokens (or one
    prompt); with `equal`, of one length."""
    batch: list[list[Running]] = []
    for group in groups:
        longest = len(batch[0][0].prompt_ids) if batch else 0
        full = (len(batch) + 1) * longest > PREFILL_TOKENS
        if batch and (full or (equal and len(group[0].prompt_ids) < longest)):
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def _padded(prompts: list[np.ndarray]) -> Tensor:
    """Prompts [M, Q] int64, zeros behind the shorter ones; causal attention never looks there."""
    padded_MQ = torch.zeros((len(prompts), max(map(len, prompts))), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        padded_MQ[row, : len(prompt)] = torch.from_numpy(prompt.astype(np.int64))
    return padded_MQ


def _round_up(columns: int) -> int:
    return -(-columns // COLUMN_STEP) * COLUMN_STEP
