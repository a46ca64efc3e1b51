"""What a model carries from token to token: rows (slots) behind transformers' cache interface.

Row r belongs to one running sequence, or to several with the same tokens so far. Of an attention
layer it holds keys and values in columns 0 … the sequence's length - 1; what lies beyond is hidden
by the attention bias and overwritten later. Of a recurrent layer it holds the last inputs of its
convolution and its recurrent state, as they are behind the last token that was read: nothing hides
a part of these, so prompts that are read in one pass must have one length, and a new row must be
filled or zeroed. The active rows are always 0 … B-1: a row that ends is filled by moving the last
active row into it, so a step reads a plain slice and never gathers. Buffers grow in both directions
as they are needed. Each head's columns lie side by side, [R, K, C, D], so that attention multiplies
plain matrices.

Legend: R rows held, C columns held, B active rows, M prompts of one prefill, Q their padded length,
K key-value heads, D head width, L visible columns, W inputs that a convolution sees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin


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

    def at_prompts(self, first_row: int, prompt_of_row: Tensor) -> None:
        """See `SlotCache.at_prompts`."""
        self.places_B, self.visible = None, 0
        self.first_row, self.prompt_of_row = first_row, prompt_of_row

    @property
    def new_rows(self) -> slice:
        """The rows that the prompts of this pass are read for."""
        assert self.prompt_of_row is not None
        return slice(self.first_row, self.first_row + len(self.prompt_of_row))

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
        for buffer in self._buffers() if self.is_initialized else ():
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
        for buffer, states in zip(self._buffers(), (key_states, value_states), strict=True):
            buffer[cursor.new_rows, :, : states.shape[2]] = states.index_select(
                0, cursor.prompt_of_row
            )
        return key_states, value_states


class StateLayer(LinearAttentionCacheLayerMixin):
    """Inputs of convolutions [R, …, W] and recurrent states [R, …] of one decoder layer, which may
    have several of both, or none (a layer that carries nothing).

    Models read `conv_states` and `recurrent_states`, views of the active rows, and update them in
    place.
    """

    def __init__(self, cursor: Cursor, count: int) -> None:
        super().__init__(count)
        self._cursor = cursor
        self._inputs: dict[int, Tensor] = {}
        self._states: dict[int, Tensor] = {}

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Shapes are learnt from the first prompt."""

    def point(self) -> None:
        """Show the model the active rows, or that a prompt begins with nothing behind it."""
        active = self._cursor.active
        self.conv_states = {i: buffer[:active] for i, buffer in self._inputs.items()}
        self.recurrent_states = {i: buffer[:active] for i, buffer in self._states.items()}
        continues = self._cursor.places_B is not None
        self.has_previous_state = dict.fromkeys(range(self.number_of_states), continues)

    def update_conv_state(
        self,
        conv_states: Tensor,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Keep the last W inputs of [B or M, …, Q]; return all that the convolution must see."""
        if self._cursor.places_B is None:
            width = conv_kernel_size or conv_states.shape[-1]
            seen = pad(conv_states, (max(0, width - conv_states.shape[-1]), 0))
            self._keep(self._inputs, state_idx, seen[..., -width:])
            return seen
        kept = self._inputs[state_idx][: self._cursor.active]
        seen = torch.cat([kept, conv_states], dim=-1)
        kept.copy_(seen[..., -kept.shape[-1] :])
        return seen

    def update_recurrent_state(
        self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Keep the states [B or M, …] and return them."""
        if self._cursor.places_B is None:
            self._keep(self._states, state_idx, recurrent_states)
        else:
            self._states[state_idx][: self._cursor.active].copy_(recurrent_states)
        return recurrent_states

    def move(self, sources: Tensor, targets: Tensor, columns: int) -> None:
        """Copy rows `sources` onto rows `targets` (disjoint)."""
        for buffers in (self._inputs, self._states):
            for buffer in buffers.values():
                buffer.index_copy_(0, targets, buffer.index_select(0, sources))

    def clear(self) -> None:
        """Zero the new rows: nothing has been read for them."""
        for buffers in (self._inputs, self._states):
            for buffer in buffers.values():
                buffer[self._cursor.new_rows] = 0

    def grow(self) -> None:
        """Reallocate to the cursor's rows, keeping what is there."""
        for buffers in (self._inputs, self._states):
            for index, buffer in buffers.items():
                buffers[index] = buffer.new_zeros((self._cursor.rows, *buffer.shape[1:]))
                buffers[index][: len(buffer)] = buffer

    def release(self) -> None:
        """Keep the shapes alone."""
        for buffers in (self._inputs, self._states):
            for index, buffer in buffers.items():
                buffers[index] = buffer.new_zeros((0, *buffer.shape[1:]))
        self.point()

    def _keep(self, buffers: dict[int, Tensor], index: int, states: Tensor) -> None:
        cursor = self._cursor
        assert cursor.prompt_of_row is not None
        if index not in buffers:
            buffers[index] = states.new_zeros((cursor.rows, *states.shape[1:]))
        buffers[index][cursor.new_rows] = states.index_select(0, cursor.prompt_of_row).to(
            buffers[index].dtype
        )


class HybridLayer(SlotLayer, StateLayer):
    """A decoder layer with attention and recurrence side by side."""

    def __init__(self, cursor: Cursor, count: int) -> None:
        SlotLayer.__init__(self, cursor)
        StateLayer.__init__(self, cursor, count)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        SlotLayer.lazy_initialization(self, *args)

    def move(self, sources: Tensor, targets: Tensor, columns: int) -> None:
        SlotLayer.move(self, sources, targets, columns)
        StateLayer.move(self, sources, targets, columns)

    def grow(self) -> None:
        SlotLayer.grow(self)
        StateLayer.grow(self)

    def release(self) -> None:
        SlotLayer.release(self)
        StateLayer.release(self)


AnyLayer = SlotLayer | StateLayer


def _layers(config: Any, cursor: Cursor) -> list[AnyLayer]:
    """Layers for what the model of `config` keeps in transformers' own cache."""
    layers: list[AnyLayer] = []
    for own in DynamicCache(config=config).layers:
        attends = isinstance(own, CacheLayerMixin)
        count = getattr(own, "number_of_states", 0)
        if not count:
            layers.append(SlotLayer(cursor))
        elif attends:
            layers.append(HybridLayer(cursor, count))
        else:
            layers.append(StateLayer(cursor, count))
    return layers


class SlotCache(Cache):
    """All layers and their common cursor; handed to the model as `past_key_values`."""

    def __init__(self, config: Any) -> None:
        """`config` is that of the model's text part."""
        self.cursor = Cursor()
        self.slot_layers = _layers(config, self.cursor)
        self.state_layers = [one for one in self.slot_layers if isinstance(one, StateLayer)]
        super().__init__(layers=list(self.slot_layers))

    @property
    def recurrent(self) -> bool:
        """Whether a layer carries a state, in which padding would leave its trace."""
        return bool(self.state_layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.cursor.visible

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
        for layer in self.state_layers:
            layer.point()

    def at_prompts(self, first_row: int, prompt_of_row: Tensor) -> None:
        """Point at the rows from `first_row` on; row i of them takes the prompt `prompt_of_row[i]`
        of the pass."""
        self.cursor.at_prompts(first_row, prompt_of_row)
        for layer in self.state_layers:
            layer.point()

    def clear_states(self) -> None:
        """Instead of a pass, for prompts of which nothing is read before their last token."""
        for layer in self.state_layers:
            layer.clear()

    def move(self, sources: Tensor, targets: Tensor, columns: int) -> None:
        """Copy the first `columns` of rows `sources`, and their states, onto rows `targets`
        (disjoint)."""
        for layer in self.slot_layers:
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
