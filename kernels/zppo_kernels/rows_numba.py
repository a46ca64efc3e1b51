"""Row operations over the vocabulary for CPUs: one fused pass per row while the row sits in the
cache, compiled by numba.

Invariant: equal to `rows_torch.TorchRows` up to rounding; float32 logits only, which is what
`row_chunks` and `Projection` give a CPU (float64 never comes here). Rows are shared out to as many
threads as torch uses; the compiled code holds no interpreter lock and no state.

Shapes: C rows of a chunk, V vocabulary, M metrics.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _numba_policy as compiled
from . import _numba_terms as terms
from .metrics import LOGIT_METRICS, SAMPLE_METRICS, reduce_partials
from .policy_rows import PolicyRows
from .rows_torch import TorchRows
from .settings import PolicyLossSettings, settings_values

# Below this many logits a second thread costs more than it saves.
_LOGITS_PER_THREAD = 1 << 18


class NumbaRows(TorchRows):
    """The CPU backend where numba is installed."""

    name = "numba"

    def weighted(self, rows: PolicyRows, settings: PolicyLossSettings) -> tuple[PolicyRows, Tensor]:
        """Rows with their importance weights, and the values of SAMPLE_METRICS float64 [M]."""
        if settings.correction_level == "sequence":
            return super().weighted(rows, settings)
        proximal_T, behaviour_T = rows.proximal_log_probs_T, rows.behaviour_log_probs_T
        weights_T = torch.empty_like(rows.advantages_T)
        metrics_M = np.zeros(len(SAMPLE_METRICS))
        known = proximal_T is not None and behaviour_T is not None
        numbers, choices = settings_values(settings)
        terms.sample_rows(
            rows.mask_T.numpy(),
            rows.live_T.numpy(),
            rows.advantages_T.numpy(),
            (rows.advantages_T if proximal_T is None else proximal_T).numpy(),
            (rows.advantages_T if behaviour_T is None else behaviour_T).numpy(),
            known,
            np.array(numbers),
            np.array(choices),
            weights_T.numpy(),
            metrics_M,
        )
        if proximal_T is not None:
            rows = replace(rows, weights_T=weights_T)
        return rows, torch.from_numpy(metrics_M)

    def statistics(
        self, logits_CV: Tensor, target_ids_C: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-prob of the target, entropy, and log-sum-exp of the scaled logits, [C] each; one read
        of the logits."""
        logits, targets = _array(logits_CV), target_ids_C.numpy()
        results = torch.empty(3, len(targets))
        _shared_out(
            logits_CV,
            lambda part: compiled.statistics_rows(
                logits[part], targets[part], temperature, results.numpy()[:, part]
            ),
        )
        log_probs_C, entropy_C, lse_C = results.unbind(0)
        return log_probs_C, entropy_C, lse_C

    def policy(
        self,
        logits_CV: Tensor,
        rows: PolicyRows,
        settings: PolicyLossSettings,
        gradient_CV: Tensor | None,
        statistics_2C: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Loss (0-dim) and LOGIT_METRICS [M]; the gradient, if wanted, goes to `gradient_CV`,
        log-prob and entropy to `statistics_2C`."""
        logits = _array(logits_CV)
        gradient = logits if gradient_CV is None else _array(gradient_CV)
        columns, flags = _row_columns(rows)
        numbers, choices = (np.array(values) for values in settings_values(settings))

        def run(part: slice) -> np.ndarray:
            result_M = np.zeros(1 + len(LOGIT_METRICS))
            arguments: list[Any] = [
                logits[part],
                gradient[part],
                gradient_CV is not None,
                *(column[part] for column in columns),
            ]
            arguments += [flags, numbers, choices, statistics_2C.numpy()[:, part], result_M]
            compiled.policy_rows(*arguments)
            return result_M

        partials_PM = torch.from_numpy(np.stack(_shared_out(logits_CV, run)))
        total_M = reduce_partials(("loss", *LOGIT_METRICS), partials_PM)
        return total_M[0].float(), total_M[1:]

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
        onehot(target)."""
        logits, gradient = _array(logits_CV), _array(gradient_CV)
        if log_probability_C is None:
            log_probability_C = label_C.new_empty(0)
        columns = [
            column.numpy()
            for column in (lse_C, probability_C, target_ids_C, label_C, log_probability_C)
        ]

        def run(part: slice) -> None:
            arguments: list[Any] = [
                logits[part],
                gradient[part],
                *(column[part] for column in columns),
                temperature,
            ]
            compiled.gradient_rows(*arguments)

        _shared_out(logits_CV, run)


def _array(matrix_CV: Tensor) -> np.ndarray:
    array: np.ndarray = matrix_CV.detach().numpy()
    return array


def _row_columns(rows: PolicyRows) -> tuple[list[np.ndarray], np.ndarray]:
    """The columns of `_numba_policy.policy_rows` in its order, and which of them hold something."""
    anything_C = rows.advantages_T  # stands where a column is missing, and is not read
    weights_T = torch.ones_like(anything_C) if rows.weights_T is None else rows.weights_T
    optional = (
        rows.proximal_log_probs_T,
        rows.behaviour_log_probs_T,
        rows.reference_log_probs_T,
    )
    columns = (
        rows.mask_T,
        rows.target_ids_T,
        rows.advantages_T,
        rows.scales_T,
        weights_T,
        *(anything_C if column is None else column for column in optional),
    )
    flags = (optional[0] is not None, rows.weights_come_late, optional[2] is not None)
    return [column.numpy() for column in columns], np.array(flags)


def _shared_out(logits_CV: Tensor, run: Callable[[slice], np.ndarray | None]) -> list[np.ndarray]:
    """Run over all rows, in several threads where it pays; results in row order."""
    rows = logits_CV.shape[0]
    threads = max(1, min(torch.get_num_threads(), rows, logits_CV.numel() // _LOGITS_PER_THREAD))
    bounds = [rows * index // threads for index in range(threads + 1)]
    parts = [slice(first, last) for first, last in pairwise(bounds)]
    results = [run(parts[0])] if threads == 1 else list(_threads(threads).map(run, parts))
    return [result for result in results if result is not None]


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="zppo-kernels")
