"""Row operations over the vocabulary in plain torch: the reference beside the numba and Triton
versions, any float dtype.

Invariant: `logits_CV` may be overwritten by every operation that takes a `gradient_CV`;
`gradient_CV` may be
    `logits_CV`.

Shapes: C rows of a chunk, V vocabulary, M metrics.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .jsd_rows import jsd_rows
from .logit_map import LogitMap
from .metrics import COUNTED_EARLY
from .policy_reference import correction_of
from .policy_rows import PolicyRows
from .policy_terms import PolicyTerms, policy_terms
from .settings import PolicyLossSettings


class TorchRows:
    """The backend that runs everywhere."""

    name = "torch"

    def with_map(self, shape: LogitMap) -> tuple[TorchRows, LogitMap]:
        """This backend with what it takes of the head's map inside its row operations (but for
        `jsd`, whose two heads may differ), and what is left of it."""
        return self, shape

    def weighted(self, rows: PolicyRows, settings: PolicyLossSettings) -> tuple[PolicyRows, Tensor]:
        """Rows with their importance weights, and the values of SAMPLE_METRICS float64 [M].

        Without proximal log-probs the weights are not known yet, nor what is counted of them.
        """
        weights_T, metrics_M = correction_of(rows, settings)
        known = rows.proximal_log_probs_T is not None
        return replace(rows, weights_T=weights_T) if known else rows, metrics_M

    def late_metrics(
        self, early_M: Tensor, rows: PolicyRows, log_probs_T: Tensor, settings: PolicyLossSettings
    ) -> Tensor:
        """SAMPLE_METRICS [M] of rows without proximal log-probs: what was counted before the
        logits, and the importance weights of the rows whose log-probs are known now."""
        rows = replace(rows, proximal_log_probs_T=log_probs_T)
        return torch.cat(
            [early_M[:COUNTED_EARLY], self.weighted(rows, settings)[1][COUNTED_EARLY:]]
        )

    def statistics(
        self, logits_CV: Tensor, target_ids_C: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-prob of the target, entropy, and log-sum-exp of the scaled logits, [C] each; one read
        of the logits.

        The log-prob of an id out of the vocabulary is NaN.
        """
        scaled_CV = logits_CV / temperature
        lse_C = torch.logsumexp(scaled_CV, dim=-1)
        log_probs_CV = torch.log_softmax(scaled_CV, dim=-1)
        terms_CV = torch.where(torch.isneginf(log_probs_CV), 0.0, log_probs_CV.exp() * log_probs_CV)
        outside_C, ids_C = _bounded(target_ids_C, logits_CV.shape[1])
        picked_C = log_probs_CV.gather(1, ids_C.unsqueeze(1)).squeeze(1)
        return torch.where(outside_C, math.nan, picked_C), -terms_CV.sum(-1), lse_C

    def policy(
        self,
        logits_CV: Tensor,
        rows: PolicyRows,
        settings: PolicyLossSettings,
        gradient_CV: Tensor | None,
        statistics_2C: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Loss (0-dim) and LOGIT_METRICS [M] of rows that need no other row of their sequence; the
        gradient, if wanted, goes to `gradient_CV`, log-prob and entropy to `statistics_2C`.

        Rows with mask 0 are skipped: they add nothing, their gradient is 0, and their statistics
        are left as they are.
        """
        log_probs_C, entropy_C, lse_C = self.statistics(
            logits_CV, rows.target_ids_T, settings.temperature
        )
        statistics_2C.copy_(
            torch.where(rows.mask_T, torch.stack([log_probs_C, entropy_C]), statistics_2C)
        )
        terms: PolicyTerms = policy_terms(log_probs_C, entropy_C, rows, settings)
        if gradient_CV is not None:
            self.policy_gradient(
                logits_CV, lse_C, entropy_C, terms, rows.target_ids_T, settings, gradient_CV
            )
        return terms.loss, terms.metrics_M

    def policy_gradient(
        self,
        logits_CV: Tensor,
        lse_C: Tensor,
        entropy_C: Tensor,
        terms: PolicyTerms,
        target_ids_C: Tensor,
        settings: PolicyLossSettings,
        gradient_CV: Tensor,
    ) -> None:
        """The gradient of known terms (see `policy_terms`)."""
        label_C = terms.coefficients_L / settings.temperature
        probability_C, log_probability_C = -label_C, None
        if terms.entropy_coefficients_L is not None:
            log_probability_C = -terms.entropy_coefficients_L / settings.temperature
            probability_C = probability_C + log_probability_C * torch.where(
                log_probability_C == 0, 0.0, entropy_C
            )
        self.gradient(
            logits_CV,
            lse_C,
            probability_C,
            target_ids_C,
            label_C,
            settings.temperature,
            gradient_CV,
            log_probability_C,
        )

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
        """gradient = softmax * (probability_C + log_probability_C * log softmax) + label_C *
        onehot(target): every loss here has this form."""
        log_softmax_CV = logits_CV / temperature - lse_C.unsqueeze(1)
        probabilities_CV = torch.exp(log_softmax_CV)
        factors_CV, is_zero_C = probability_C.unsqueeze(1), probability_C == 0
        if log_probability_C is not None:
            finite_CV = torch.where(probabilities_CV == 0, 0.0, log_softmax_CV)
            factors_CV = factors_CV + log_probability_C.unsqueeze(1) * finite_CV
            is_zero_C = is_zero_C & (log_probability_C == 0)
        result_CV = torch.where(is_zero_C.unsqueeze(1), 0.0, probabilities_CV * factors_CV)
        outside_C, ids_C = _bounded(target_ids_C, logits_CV.shape[1])
        label_C = torch.where(outside_C & (label_C != 0), math.nan, label_C)
        result_CV.scatter_add_(1, ids_C.unsqueeze(1), label_C.unsqueeze(1).to(result_CV.dtype))
        gradient_CV.copy_(result_CV)

    def scale(self, gradient_TV: Tensor, factor: Tensor) -> None:
        """gradient *= factor (0-dim), in place; nothing is touched where the factor is 1."""
        if float(factor) != 1.0:
            gradient_TV.mul_(factor)

    def jsd(
        self,
        student_CV: Tensor,
        teacher_CW: Tensor,
        mask_C: Tensor,
        beta: float,
        temperature: float,
        gradient_CV: Tensor | None,
        scale: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Divergence [C] and student entropy [C], 0 where masked; scale * gradient by the student's
        logits to `gradient_CV`.
        """
        divergence_C, entropy_C = jsd_rows(
            student_CV, teacher_CW, beta, temperature, gradient_CV, scale
        )
        if gradient_CV is not None:
            gradient_CV.masked_fill_(~mask_C.unsqueeze(1), 0.0)
        return torch.where(mask_C, divergence_C, 0.0), torch.where(mask_C, entropy_C, 0.0)


def _bounded(target_ids_C: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Which ids do not exist, and ids that may be looked up: 0 in their place."""
    outside_C = (target_ids_C < 0) | (target_ids_C >= vocabulary)
    return outside_C, torch.where(outside_C, 0, target_ids_C)
