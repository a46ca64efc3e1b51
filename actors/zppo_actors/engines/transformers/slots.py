"""The key-value cache: rows (slots) of unequal length behind transformers' cache interface.

Row r holds the keys and values of one running sequence in columns 0 … its length - 1; what lies
beyond is hidden by the attention bias and overwritten later. The active rows are always 0 … B-1: a
row that ends is filled by moving the last active row into it, so a step reads a plain slice and
never gathers. Buffers grow in both directions as they are needed. Each head's columns lie side by
side, [R, K, C, D], so that attention multiplies plain matrices.

Legend: R rows held, C columns held, B active rows, M prompts of one prefill, Q their padded length,
K key-value heads, D head width, L visible columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class Cursor:
    """Where the next forward pass writes, shared by all layers."""

    def __init__(self) -> None:
        self.rows = 0
        self.columns = 0
        self.active = 0
        self.visible = 0
        self.places_B: Tensor | None = None
        """Row-major index of each active row's next column; None while a prompt is read."""
        self.first_row = 0
        self.prompt_of_row: Tensor | None = None
        self._places_by_heads: dict[int, Tensor] = {}

    def at_tokens(self, places_B: Tensor, visible: int) -> None:
        """See `SlotCache.at_tokens`."""
        self.places_B, self.active, self.visible = places_B, len(places_B), visible
        self._places_by_heads.clear()

    def places(self, heads: int) -> Tensor:
        """Where each active row's next column lies in buffers [R, K, C, D] of K `heads`, as flat
        indices [B * K]."""
        if heads not in self._places_by_heads:
            assert self.places_B is not None
            rows_B = torch.arange(self.active, device=self.places_B.device)
            first_B = self.places_B + rows_B * ((heads - 1) * self.columns)
            heads_K = torch.arange(heads, device=self.places_B.device) * self.columns
            self._places_by_heads[heads] = (first_B[:, None] + heads_K).flatten()
        return self._places_by_heads[heads]


class SlotLayer(CacheLayerMixin):
    """Keys and values [R, K, C, D] of one decoder layer."""

    is_sliding = False

    def __init__(self, cursor: Cursor) -> None:
        super().__init__()
        self._cursor = cursor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = self._empty(key_states), self._empty(value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [B, K, 1, D] behind the active rows, or prompts [M, K, Q, D] into new rows; return
        what to read."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        write = self._write_prompts if self._cursor.places_B is None else self._write_tokens
        return write(key_states, value_states)

    def move(self, sources: Tensor, targets: Tensor, columns: int) -> None:
        """Copy the first `columns` of rows `sources` onto rows `targets` (disjoint)."""
        for buffer in self._buffers():
            seen = buffer[:, :, :columns]
            seen.index_copy_(0, targets, seen.index_select(0, sources))

    def grow(self) -> None:
        """Reallocate to the cursor's size, keeping what is there."""
        if self.is_initialized:
            self.keys, self.values = (self._grown(buffer) for buffer in self._buffers())

    def release(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cursor.visible, 0

    def get_seq_length(self) -> int:
        return self._cursor.visible

    def get_max_length(self) -> int:
        return -1

    def _buffers(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def _empty(self, states: Tensor) -> Tensor:
        _, heads, _, width = states.shape
        return states.new_zeros((self._cursor.rows, heads, self._cursor.columns, width))

    def _grown(self, buffer: Tensor) -> Tensor:
        bigger = self._empty(buffer)
        bigger[: buffer.shape[0], :, : buffer.shape[2]] = buffer
        return bigger

    def _write_tokens(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        cursor, (keys, values) = self._cursor, self._buffers()
        for buffer, states in ((keys, key_states), (values, value_states)):
            width = states.shape[-1]
            buffer.view(-1, width).index_copy_(
                0, cursor.places(states.shape[1]), states.reshape(-1, width)
            )
        return keys[: cursor.active, :, : cursor.visible], values[
            : cursor.active, :, : cursor.visible
        ]

    def _write_prompts(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        cursor = self._cursor
        assert cursor.prompt_of_row is not None
        rows = slice(cursor.first_row, cursor.first_row + len(cursor.prompt_of_row))
        for buffer, states in zip(self._buffers(), (key_states, value_states), strict=True):
            buffer[rows, :, : states.shape[2]] = states.index_select(0, cursor.prompt_of_row)
        return key_states, value_states


class SlotCache(Cache):
    """All layers and their common cursor; handed to the model as `past_key_values`."""

    def __init__(self, layers: int) -> None:
        self.cursor = Cursor()
        self.slot_layers = [SlotLayer(self.cursor) for _ in range(layers)]
        super().__init__(layers=list(self.slot_layers))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        return self.slot_layers[layer_idx].update(key_states, value_states)

    def resize(self, rows: int, columns: int) -> None:
        """Make room for `rows` x `columns`, layer by layer so that only one layer is held twice at
        a time."""
        self.cursor.rows, self.cursor.columns = rows, columns
        for layer in self.slot_layers:
            layer.grow()

    def at_tokens(self, places_B: Tensor, visible: int) -> None:
        """Point at the next column of each of the first B rows; attention reads `visible`
        columns."""
        self.cursor.at_tokens(places_B, visible)

    def at_prompts(self, first_row: int, prompt_of_row: Tensor) -> None:
        """Point at the rows from `first_row` on; row i of them takes the prompt `prompt_of_row[i]`
        of the pass."""
        self.cursor.places_B, self.cursor.first_row, self.cursor.prompt_of_row = (
            None,
            first_row,
            prompt_of_row,
        )

    def move(self, sources: Tensor, targets: Tensor, columns: int) -> None:
        """See `SlotLayer.move`."""
        for layer in self.slot_layers:
            if layer.is_initialized:
                layer.move(sources, targets, columns)

    def release(self) -> None:
        """Give all memory back; the next use allocates afresh."""
        self.cursor.rows = self.cursor.columns = 0
        for layer in self.slot_layers:
            layer.release()


def grown(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """A zeroed [rows, columns, …] tensor that starts with `buffer`."""
    bigger = buffer.new_zeros((rows, columns, *buffer.shape[2:]))
    bigger[: buffer.shape[0], : buffer.shape[1]] = buffer
    return bigger
