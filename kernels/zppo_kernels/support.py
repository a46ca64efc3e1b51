"""Rows whose tokens came from a truncated distribution (top-k, top-p, min-p): their softmax is over
the tokens that could have been sampled, and all others have neither probability nor gradient.

The supports are given as ids, [T, K] with -1 behind the last one of each row. Their logits are
gathered into [C, K], where the reference row operations of `rows_torch` do what they do for a
vocabulary of K; the gradient is scattered back into a chunk of zeros. K is a few dozen, so this
costs next to nothing beside the products with the LM head, on any device.

Invariant: a row of -1 alone is one over the whole vocabulary, and is left to the backend as if
there were no supports. On a GPU no value is looked at, so nothing waits for it.

Shapes: T rows, C rows of a chunk, V vocabulary, K ids of a support, M metrics.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .layout import accumulator_of
from .logit_map import LogitMap
from .metrics import LOGIT_METRICS, reduce_partials
from .policy_inputs import check_device, reads_values
from .policy_rows import PolicyRows, RowInputs
from .rows_torch import TorchRows
from .settings import PolicyLossSettings

PAD = -1
# Far below every logit, yet finite: an infinity would make NaN of a row that has no id at all.
NEVER = -1e30
_REFERENCE = TorchRows()


def with_support(rows: RowInputs, support_ids_TK: Tensor | None) -> RowInputs:
    """The rows with their supports, checked and prepared."""
    support_ids_TK = prepared_support(support_ids_TK, rows.target_ids_T, rows.mask_T)
    return replace(rows, support_ids_TK=support_ids_TK)


def prepared_support(
    support_ids_TK: Tensor | None, target_ids_T: Tensor, mask_T: Tensor
) -> Tensor | None:
    """int64 and contiguous; a masked row becomes one over the whole vocabulary, whatever it held.
    Raises ValueError for shape, dtype and device."""
    if support_ids_TK is None:
        return None
    shape, dtype = tuple(support_ids_TK.shape), support_ids_TK.dtype
    rows = len(target_ids_T)
    if len(shape) != 2 or shape[0] != rows or not shape[1]:
        raise ValueError(f"support_ids_TK has shape {shape}; expected ({rows}, K), K at least 1")
    if dtype not in (torch.int64, torch.int32):
        raise ValueError(f"support_ids_TK has dtype {dtype}; expected int64 or int32")
    check_device("support_ids_TK", support_ids_TK, "target_ids_T", target_ids_T)
    ids_TK = support_ids_TK.detach().to(torch.int64)
    return torch.where(mask_T.unsqueeze(1), ids_TK, PAD).contiguous()


def check_support(support_ids_TK: Tensor | None, target_ids_T: Tensor, vocabulary: int) -> None:
    """Where values may be read: ValueError for ids outside [-1, V), for one that stands twice in a
    row, and for a support without its target. Elsewhere the loss of such a row is NaN, but for an
    id that stands twice, which is counted twice."""
    if support_ids_TK is None or not reads_values(support_ids_TK):
        return
    ids_TK, none = support_ids_TK, torch.zeros(len(support_ids_TK), dtype=torch.bool)
    ranked_TK = ids_TK.sort(dim=1).values
    twice_TK = (ranked_TK[:, 1:] == ranked_TK[:, :-1]) & (ranked_TK[:, 1:] != PAD)
    missing_T = cut_rows(ids_TK) & ~(ids_TK == target_ids_T.unsqueeze(1)).any(1)
    problems = (
        (((ids_TK < PAD) | (ids_TK >= vocabulary)).any(1), f"ids in [0, {vocabulary}), or {PAD}"),
        (twice_TK.any(1) if twice_TK.shape[1] else none, "each id once"),
        (missing_T, "the id of its target among them"),
    )
    for wrong_T, expected in problems:
        if bool(wrong_T.any()):
            row = int(wrong_T.nonzero()[0])
            raise ValueError(
                f"support_ids_TK[{row}] is {ids_TK[row].tolist()}, with the target "
                f"{int(target_ids_T[row])}; expected {expected}"
            )


def cut_rows(support_ids_TK: Tensor) -> Tensor:
    """Which rows [T] are over a support, and not over the whole vocabulary."""
    return (support_ids_TK != PAD).any(1)


def over_support(backend: TorchRows, chunk: PolicyRows | Tensor | None) -> TorchRows:
    """The row operations of a chunk, given as its rows or their supports."""
    support_ids_CK = chunk.support_ids_TK if isinstance(chunk, PolicyRows) else chunk
    return backend if support_ids_CK is None else SupportRows(backend, support_ids_CK)


def with_map(
    backend: TorchRows, head: LogitMap, support_ids_TK: Tensor | None
) -> tuple[TorchRows, LogitMap]:
    """`TorchRows.with_map`, unless there are supports: they are gathered from mapped logits, so no
    backend may take a part of the map."""
    return backend.with_map(head) if support_ids_TK is None else (backend, head)


class SupportRows(TorchRows):
    """The row operations of one chunk: its own over the supports, those of `backend` over the
    vocabulary."""

    def __init__(self, backend: TorchRows, support_ids_CK: Tensor) -> None:
        self._backend = backend
        self._support_CK = support_ids_CK
        self._cut_C = cut_rows(support_ids_CK)

    def statistics(
        self, logits_CV: Tensor, target_ids_C: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `TorchRows.statistics`."""
        narrow = _REFERENCE.statistics(
            self._gathered(logits_CV), self._places(target_ids_C), temperature
        )
        if reads_values(self._cut_C) and bool(self._cut_C.all()):
            return narrow
        whole = self._backend.statistics(logits_CV, target_ids_C, temperature)
        log_probs_C, entropy_C, lse_C = (
            torch.where(self._cut_C, ours_C, theirs_C)
            for ours_C, theirs_C in zip(narrow, whole, strict=True)
        )
        return log_probs_C, entropy_C, lse_C

    def policy(
        self,
        logits_CV: Tensor,
        rows: PolicyRows,
        settings: PolicyLossSettings,
        gradient_CV: Tensor | None,
        statistics_2C: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """See `TorchRows.policy`. The backend writes 0 as the gradient of rows over a support,
        which are masked for it."""
        logits_CK = self._gathered(logits_CV)  # before anything is written over the logits
        gradient_CK = None if gradient_CV is None else torch.empty_like(logits_CK)
        whole_loss, whole_M = self._backend.policy(
            logits_CV, rows.masked(~self._cut_C), settings, gradient_CV, statistics_2C
        )
        narrow = replace(rows.masked(self._cut_C), target_ids_T=self._places(rows.target_ids_T))
        loss, values_M = _REFERENCE.policy(logits_CK, narrow, settings, gradient_CK, statistics_2C)
        if gradient_CV is not None and gradient_CK is not None:
            self._scatter(gradient_CK, gradient_CV)
        metrics_M = reduce_partials(LOGIT_METRICS, torch.stack([whole_M, values_M]))
        return whole_loss + loss, metrics_M

    def gradient(
        self,
        logits_CV: Tensor,
        lse_C: Tensor,
        probability_C: Tensor,
        target_ids_C: Tensor,
        label_C: Tensor,
        temperature: float,
        gradient_CV: Tensor,
        log_probability_C: Tensor | None = None,
    ) -> None:
        """See `TorchRows.gradient`; a row of the other kind has coefficients of 0 and a sum beyond
        all logits, so that its probabilities are 0."""
        logits_CK = self._gathered(logits_CV)
        gradient_CK = torch.empty_like(logits_CK)
        columns = (lse_C, probability_C, label_C, log_probability_C)
        for operations, values_C, targets_C, other_C, result in (
            (self._backend, logits_CV, target_ids_C, self._cut_C, gradient_CV),
            (_REFERENCE, logits_CK, self._places(target_ids_C), ~self._cut_C, gradient_CK),
        ):
            lse, probability, label, log_probability = (
                None if column_C is None else column_C.masked_fill(other_C, filling)
                for column_C, filling in zip(columns, (-NEVER, 0.0, 0.0, 0.0), strict=True)
            )
            assert lse is not None and probability is not None and label is not None
            operations.gradient(
                values_C, lse, probability, targets_C, label, temperature, result, log_probability
            )
        self._scatter(gradient_CK, gradient_CV)

    def _gathered(self, logits_CV: Tensor) -> Tensor:
        """The logits of the supports [C, K], in the dtype of row statistics."""
        ids_CK, vocabulary = self._support_CK, logits_CV.shape[1]
        logits_CK = logits_CV.gather(1, _inside(ids_CK, vocabulary)).to(accumulator_of(logits_CV))
        logits_CK.masked_fill_(ids_CK == PAD, NEVER)
        return logits_CK.masked_fill_((ids_CK < PAD) | (ids_CK >= vocabulary), torch.nan)

    def _places(self, target_ids_C: Tensor) -> Tensor:
        """Where each target stands in its support; K, an id that does not exist, where it does not
        stand in it."""
        found_CK = self._support_CK == target_ids_C.unsqueeze(1)
        missing_C = self._cut_C & ~found_CK.any(1)
        return torch.where(missing_C, found_CK.shape[1], found_CK.to(torch.int8).argmax(1))

    def _scatter(self, gradient_CK: Tensor, gradient_CV: Tensor) -> None:
        """Add each id's gradient to the zeros of its row; the padding adds 0 to token 0."""
        ids_CK = _inside(self._support_CK, gradient_CV.shape[1])
        gradient_CV.scatter_add_(1, ids_CK, gradient_CK.to(gradient_CV.dtype))


def _inside(ids_CK: Tensor, vocabulary: int) -> Tensor:
    """Ids that may be looked up."""
    return ids_CK.clamp(0, vocabulary - 1)
