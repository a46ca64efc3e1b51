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
from .policy_reference import PolicyRows, correction_of
from .policy_terms import PolicyTerms, policy_terms
from .settings import PolicyLossSettings


class TorchRows:
    """The backend that runs everywhere."""

    name = "torch"

    def weighted(self, rows: PolicyRows, settings: PolicyLossSettings) -> tuple[PolicyRows, Tensor]:
        """Rows with their importance weights, and the values of SAMPLE_METRICS float64 [M]."""
        weights_T, metrics_M = correction_of(rows, settings)
        return replace(rows, weights_T=weights_T), metrics_M

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
    ) -> tuple[Tensor, Tensor]:
        """Loss (0-dim) and LOGIT_METRICS [M] of token-level rows; the gradient, if wanted, goes to
        `gradient_CV`.

        Rows with mask 0 are skipped: they add nothing and their gradient is 0.
        """
        log_probs_C, entropy_C, lse_C = self.statistics(
            logits_CV, rows.target_ids_T, settings.temperature
        )
        terms: PolicyTerms = policy_terms(log_probs_C, entropy_C, rows, settings)
        if gradient_CV is not None:
            coefficients_C = terms.coefficients_L / settings.temperature
            self.gradient(
                logits_CV,
                lse_C,
                -coefficients_C,
                rows.target_ids_T,
                coefficients_C,
                settings.temperature,
                gradient_CV,
            )
        return terms.loss, terms.metrics_M

    def gradient(
        self,
        logits_CV: Tensor,
        lse_C: Tensor,
        probability_C: Tensor,
        target_ids_C: Tensor,
        label_C: Tensor,
        temperature: float,
        gradient_CV: Tensor,
    ) -> None:
        """gradient = probability_C * softmax + label_C * onehot(target): every loss here has this
        form."""
        probabilities_CV = torch.exp(logits_CV / temperature - lse_C.unsqueeze(1))
        result_CV = torch.where(
            (probability_C == 0).unsqueeze(1), 0.0, probabilities_CV * probability_C.unsqueeze(1)
        )
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
