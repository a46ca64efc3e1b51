"""Rows that one hidden state predicts: rollouts that begin alike differ in their next token and in
what they are worth, not in the logits.

The logits of a state are computed once, and their gradient is the sum over its rows, so the three
products with the head, which are all of the cost, shrink as the states do. What is one value per
row is computed by the reference in float64.

Shapes: L rows, C states of a chunk, V vocabulary, M metrics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .policy_rows import PolicyRows
from .policy_terms import PolicyTerms, policy_terms
from .rows_torch import TorchRows
from .settings import PolicyLossSettings


class Owned(NamedTuple):
    """Rows by the state that predicts them: `rows_L` are indices of rows, `states_U` those of their
    hidden states, and `owners_L` says which of these each row has, in rising order."""

    rows_L: Tensor
    states_U: Tensor
    owners_L: Tensor

    @classmethod
    def of(cls, hidden_rows_T: Tensor, rows_L: Tensor, states: int) -> Owned:
        """Some rows, of which `hidden_rows_T` names the hidden states, below `states`. Raises
        ValueError."""
        low, high = (int(end) for end in hidden_rows_T.aminmax()) if len(rows_L) else (0, -1)
        if low < 0 or high >= states:
            raise ValueError(
                f"hidden_rows_T run from {low} to {high}; expected rows of hidden_TH, from 0 to "
                f"{states - 1}"
            )
        wanted_L, order_L = hidden_rows_T[rows_L].sort(stable=True)
        states_U, owners_L = wanted_L.unique_consecutive(return_inverse=True)
        return cls(rows_L[order_L], states_U, owners_L)

    def of_chunk(self, states: slice) -> tuple[slice, Tensor]:
        """The rows of some states, and their owners counted from the first of these."""
        bounds = torch.tensor([states.start, states.stop], device=self.owners_L.device)
        start, stop = torch.searchsorted(self.owners_L, bounds).tolist()
        return slice(start, stop), self.owners_L[start:stop] - states.start


class SharedStatistics(NamedTuple):
    """Log-probs of the rows and entropies of their states [L]; log-sum-exp and entropies [C]."""

    log_probs_L: Tensor
    entropy_L: Tensor
    lse_C: Tensor
    entropy_C: Tensor


def shared_statistics(
    backend: TorchRows,
    logits_CV: Tensor,
    owners_L: Tensor,
    target_ids_L: Tensor,
    temperature: float,
) -> SharedStatistics:
    """One read of the logits. The backend gives the log-prob of a state's first row; that of the
    others differs from it as the logits do, in which nothing large cancels."""
    first_C = torch.searchsorted(owners_L, torch.arange(len(logits_CV), device=owners_L.device))
    leading_C = target_ids_L[first_C]
    log_probs_C, entropy_C, lse_C = backend.statistics(logits_CV, leading_C, temperature)
    logits_L = logits_CV[owners_L, target_ids_L].to(lse_C.dtype)
    apart_L = (logits_L - logits_L[first_C][owners_L]) / temperature
    log_probs_L = log_probs_C[owners_L] + apart_L
    # A first row of probability 0 is no measure of the others.
    log_probs_L = torch.where(
        log_probs_L.isfinite(), log_probs_L, logits_L / temperature - lse_C[owners_L]
    )
    return SharedStatistics(log_probs_L, entropy_C[owners_L], lse_C, entropy_C)


def shared_policy(
    backend: TorchRows,
    logits_CV: Tensor,
    owners_L: Tensor,
    rows: PolicyRows,
    settings: PolicyLossSettings,
    gradient_CV: Tensor | None,
    statistics_2L: Tensor,
) -> tuple[Tensor, Tensor]:
    """What `TorchRows.policy` is for rows with logits of their own; no row is masked."""
    found = shared_statistics(backend, logits_CV, owners_L, rows.target_ids_T, settings.temperature)
    statistics_2L.copy_(torch.stack([found.log_probs_L, found.entropy_L]))
    terms = policy_terms(
        found.log_probs_L.double(), found.entropy_L.double(), rows.as_dtype(torch.float64), settings
    )
    if gradient_CV is not None:
        _gradient(backend, logits_CV, owners_L, found, terms, rows, settings, gradient_CV)
    return terms.loss.to(statistics_2L.dtype), terms.metrics_M


def _gradient(
    backend: TorchRows,
    logits_CV: Tensor,
    owners_L: Tensor,
    found: SharedStatistics,
    terms: PolicyTerms,
    rows: PolicyRows,
    settings: PolicyLossSettings,
    gradient_CV: Tensor,
) -> None:
    """The gradient of known terms by the logits of the states, as `TorchRows.policy_gradient`."""
    zeros_C = found.lse_C.new_zeros(len(logits_CV), dtype=torch.float64)
    label_L = terms.coefficients_L / settings.temperature
    probability_C, log_probability_C = zeros_C.index_add(0, owners_L, -label_L), None
    if terms.entropy_coefficients_L is not None:
        pull_L = -terms.entropy_coefficients_L / settings.temperature
        log_probability_C = zeros_C.index_add(0, owners_L, pull_L)
        probability_C = probability_C + log_probability_C * torch.where(
            log_probability_C == 0, 0.0, found.entropy_C.double()
        )
        log_probability_C = log_probability_C.to(found.lse_C.dtype)
    backend.gradient(
        logits_CV,
        found.lse_C,
        probability_C.to(found.lse_C.dtype),
        torch.zeros(len(logits_CV), dtype=torch.int64, device=logits_CV.device),
        found.lse_C.new_zeros(len(logits_CV)),
        settings.temperature,
        gradient_CV,
        log_probability_C,
    )
    label_L = label_L.to(gradient_CV.dtype)
    gradient_CV.index_put_((owners_L, rows.target_ids_T), label_L, accumulate=True)
