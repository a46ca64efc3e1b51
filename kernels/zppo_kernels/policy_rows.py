"""What the policy loss needs per row besides the logits: as the caller gives it (`RowInputs`), and
with everything looked up by sequence (`PolicyRows`).

Shapes: T rows, S sequences, L some of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .settings import PolicyLossSettings


@dataclass(frozen=True)
class PolicyRows:
    """One value per row. Masked rows hold 0 in ids, advantages and scales, so that no NaN of theirs
    reaches a sum; what else they hold is never used."""

    target_ids_T: Tensor  # int64
    sequence_ids_T: Tensor  # int64, below `sequences`
    mask_T: Tensor  # bool: row takes part
    live_T: Tensor  # bool: row has a gradient
    advantages_T: Tensor
    scales_T: Tensor  # what the row weighs in the loss: 1 / denominator
    sequences: int
    proximal_log_probs_T: Tensor | None  # None: the policy's own, the ratio is exactly 1
    behaviour_log_probs_T: Tensor | None
    reference_log_probs_T: Tensor | None
    support_ids_TK: Tensor | None = None  # int64, -1 behind the last id: see `support`
    weights_T: Tensor | None = None  # importance weights, once they are known

    @property
    def weights_come_late(self) -> bool:
        """Whether the weights are of the policy's own log-probs, known with the logits alone."""
        return _weights_come_late(self)

    def need_whole_sequences(self, settings: PolicyLossSettings) -> bool:
        """Whether all log-probs of a sequence come before its first gradient."""
        return _need_whole_sequences(self, settings)

    def sum_by_sequence(self, values_T: Tensor) -> Tensor:
        """Sums [S] over the rows of each sequence."""
        zeros_S = values_T.new_zeros(self.sequences)
        return zeros_S.index_add(0, self.sequence_ids_T, values_T)

    def as_dtype(self, dtype: torch.dtype) -> PolicyRows:
        """Numbers in this dtype."""
        return self._changed(lambda column_T: _as(column_T, dtype))

    def part(self, rows: slice) -> PolicyRows:
        """The same record for a slice of the rows."""
        return self._changed(lambda column_T: column_T[rows])

    def picked(self, index_L: Tensor) -> PolicyRows:
        """The same record for these rows."""
        return self._changed(lambda column_T: column_T.index_select(0, index_L))

    def masked(self, mask_T: Tensor) -> PolicyRows:
        """The same record with fewer rows that take part."""
        mask_T = self.mask_T & mask_T
        return replace(
            self,
            mask_T=mask_T,
            live_T=self.live_T & mask_T,
            advantages_T=torch.where(mask_T, self.advantages_T, 0.0),
            scales_T=torch.where(mask_T, self.scales_T, 0.0),
        )

    def _changed(self, change: Callable[[Tensor], Tensor]) -> PolicyRows:
        columns: dict[str, Any] = {
            field.name: change(value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **columns)


@dataclass(frozen=True)
class RowInputs:
    """Checked and completed by `policy_inputs.prepare_rows`: the arguments of the operators, in
    order. Either advantages_S or advantages_T is there."""

    target_ids_T: Tensor  # int64
    sequence_ids_T: Tensor  # int64 index into scales_S
    advantages_S: Tensor | None
    advantages_T: Tensor | None
    scales_S: Tensor
    mask_T: Tensor  # bool
    proximal_log_probs_T: Tensor | None
    behaviour_log_probs_T: Tensor | None
    reference_log_probs_T: Tensor | None
    support_ids_TK: Tensor | None = None

    def need_whole_sequences(self, settings: PolicyLossSettings) -> bool:
        """See `PolicyRows.need_whole_sequences`."""
        return _need_whole_sequences(self, settings)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All fields in order."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def looked_up(self, settings: PolicyLossSettings) -> PolicyRows:
        """Advantage and scale of every row, and which rows have a gradient."""
        advantages_T = self._of_row(self.advantages_S, self.advantages_T)
        return PolicyRows(
            target_ids_T=self.target_ids_T,
            sequence_ids_T=self.sequence_ids_T,
            mask_T=self.mask_T,
            live_T=self._live(advantages_T, settings),
            advantages_T=advantages_T,
            scales_T=self._of_row(self.scales_S, None),
            sequences=len(self.scales_S),
            proximal_log_probs_T=self.proximal_log_probs_T,
            behaviour_log_probs_T=self.behaviour_log_probs_T,
            reference_log_probs_T=self.reference_log_probs_T,
            support_ids_TK=self.support_ids_TK,
        )

    def _of_row(self, values_S: Tensor | None, values_T: Tensor | None) -> Tensor:
        if values_T is None:
            if values_S is None:
                raise RuntimeError("neither a value per sequence nor one per row was prepared")
            values_T = values_S[self.sequence_ids_T]
        return torch.where(self.mask_T, values_T, 0.0)

    def _live(self, advantages_T: Tensor, settings: PolicyLossSettings) -> Tensor:
        """Rows with an advantage; all rows where another term has a gradient; and where the ratio
        or the weight is the sequence's, all rows of a sequence in which one has an advantage."""
        if settings.every_row_is_live:
            return self.mask_T
        live_T = self.mask_T & (advantages_T != 0)
        if self.advantages_T is None or not _need_whole_sequences(self, settings):
            return live_T
        counts_S = torch.zeros_like(self.scales_S).index_add(
            0, self.sequence_ids_T, live_T.to(self.scales_S.dtype)
        )
        return self.mask_T & (counts_S[self.sequence_ids_T] > 0)


def _weights_come_late(rows: PolicyRows | RowInputs) -> bool:
    return rows.proximal_log_probs_T is None and rows.behaviour_log_probs_T is not None


def _need_whole_sequences(rows: PolicyRows | RowInputs, settings: PolicyLossSettings) -> bool:
    """Where the ratio is the sequence's, or a weight that is the sequence's and not known yet."""
    corrects = settings.correction != "none" and settings.correction_level == "sequence"
    return settings.ratio_level == "sequence" or (corrects and _weights_come_late(rows))


def _as(column_T: Tensor, dtype: torch.dtype) -> Tensor:
    return column_T.to(dtype) if column_T.is_floating_point() else column_T
