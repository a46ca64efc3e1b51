"""Row operations over the vocabulary for GPUs: launches of the kernels in `triton_rows` and
`triton_samples`.

Invariant: no launch waits for the device, no tensor larger than a few floats a row is allocated
here, and every tensor that a kernel reads or writes went through `layout.trusted`.

Shapes: C rows of a chunk, V vocabulary, P programs, M metrics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from .layout import trusted
from .logit_map import NO_MAP, LogitMap
from .metrics import LOGIT_METRICS, SAMPLE_METRICS, reduce_partials
from .policy_rows import PolicyRows
from .rows_torch import TorchRows
from .settings import CHOICES, NUMBERS, PolicyLossSettings, settings_values
from .triton_jsd import jsd_kernel
from .triton_rows import gradient_kernel, policy_kernel, scale_kernel, statistics_kernel
from .triton_samples import samples_kernel
from .tuning import VECTOR_BYTES, tile_for, tuning_for

_SAMPLE_BLOCK = 1024
SCALE_BLOCK = 4096
SCALE_WARPS = 8


class TritonRows(TorchRows):
    """The GPU backend; under TRITON_INTERPRET=1 it also takes CPU tensors, which is how it is
    tested without a GPU."""

    name = "triton"

    def __init__(self, shape: LogitMap = NO_MAP) -> None:
        self.shape = shape

    def with_map(self, shape: LogitMap) -> tuple[TorchRows, LogitMap]:
        """The kernels read the head's product and take scale and soft cap on the way."""
        return TritonRows(shape), NO_MAP

    def weighted(self, rows: PolicyRows, settings: PolicyLossSettings) -> tuple[PolicyRows, Tensor]:
        """Rows with their importance weights, and the values of SAMPLE_METRICS float64 [M]."""
        if settings.correction_level == "sequence":
            return super().weighted(rows, settings)
        count, nothing_T = len(rows.mask_T), rows.advantages_T
        proximal_T, behaviour_T = rows.proximal_log_probs_T, rows.behaviour_log_probs_T
        programs = triton.cdiv(count, _SAMPLE_BLOCK)
        weights_T = torch.empty_like(nothing_T)
        partials_PM = torch.zeros(
            programs, len(SAMPLE_METRICS), dtype=torch.float32, device=nothing_T.device
        )
        if count:
            with on_device(nothing_T):
                samples_kernel[(programs,)](
                    *trusted(
                        rows.mask_T, rows.live_T, rows.advantages_T,
                        nothing_T if proximal_T is None else proximal_T,
                        nothing_T if behaviour_T is None else behaviour_T, weights_T, partials_PM,
                    ), count, settings.correction_floor or 0.0, settings.correction_cap,
                    CORRECTION=CHOICES["correction"].index(settings.correction),
                    HAS_BEHAVIOUR=proximal_T is not None and behaviour_T is not None,
                    BLOCK=_SAMPLE_BLOCK,
                )  # fmt: skip
        if proximal_T is not None:
            rows = replace(rows, weights_T=weights_T)
        return rows, reduce_partials(SAMPLE_METRICS, partials_PM)

    def statistics(
        self, logits_CV: Tensor, target_ids_C: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-prob of the target, entropy, and log-sum-exp of the scaled logits, [C] each; one read
        of the logits."""
        rows, vocabulary = logits_CV.shape
        log_probs_C, entropy_C, lse_C = torch.empty(3, rows, device=logits_CV.device).unbind(0)
        if rows:
            with on_device(logits_CV):
                statistics_kernel[(rows,)](
                    *trusted(logits_CV, target_ids_C, log_probs_C, entropy_C, lse_C), vocabulary,
                    logits_CV.stride(0), self.shape.scale, 1.0 / temperature,
                    SOFT_CAP=self.shape.soft_cap or 0.0,
                    **rows_of(logits_CV, shares_rows=False),
                )  # fmt: skip
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
        count, vocabulary = logits_CV.shape
        destination_CV = logits_CV if gradient_CV is None else gradient_CV
        lines_CM = torch.zeros(count, 1 + len(LOGIT_METRICS), device=logits_CV.device)
        if count:
            with on_device(logits_CV):
                policy_kernel[(program_count(logits_CV),)](
                    *trusted(logits_CV, destination_CV, *_row_columns(rows),
                    *statistics_2C.unbind(0), lines_CM), *policy_numbers(settings), count,
                    vocabulary, logits_CV.stride(0), destination_CV.stride(0), self.shape.scale,
                    1.0 / settings.temperature,
                    **policy_constants(
                        settings, has_proximal=rows.proximal_log_probs_T is not None,
                        weights_are_late=rows.weights_come_late,
                        has_reference=rows.reference_log_probs_T is not None,
                    ), SOFT_CAP=self.shape.soft_cap or 0.0, HAS_GRADIENT=gradient_CV is not None,
                    SHARES_STORAGE=_shares_storage(logits_CV, destination_CV),
                    **rows_of(logits_CV, destination_CV),
                )  # fmt: skip
        total_M = reduce_partials(("loss", *LOGIT_METRICS), lines_CM)
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
        onehot(target), through the head's map to its product."""
        if self.shape.scale != 1.0:
            probability_C, label_C = probability_C * self.shape.scale, label_C * self.shape.scale
            if log_probability_C is not None:
                log_probability_C = log_probability_C * self.shape.scale
        rows, vocabulary = logits_CV.shape
        if rows:
            with on_device(logits_CV):
                gradient_kernel[(rows,)](
                    *trusted(
                        logits_CV, gradient_CV, lse_C, probability_C,
                        label_C if log_probability_C is None else log_probability_C, target_ids_C,
                        label_C,
                    ), vocabulary, logits_CV.stride(0), gradient_CV.stride(0), self.shape.scale,
                    1.0 / temperature, HAS_ENTROPY=log_probability_C is not None,
                    SOFT_CAP=self.shape.soft_cap or 0.0,
                    SHARES_STORAGE=_shares_storage(logits_CV, gradient_CV),
                    **rows_of(logits_CV, gradient_CV, shares_rows=False),
                )  # fmt: skip

    def scale(self, gradient_TV: Tensor, factor: Tensor) -> None:
        """gradient *= factor (0-dim), in place; decided on the device, without waiting for it."""
        rows, vocabulary = gradient_TV.shape
        if rows:
            with on_device(gradient_TV):
                scale_kernel[(rows,)](
                    *trusted(gradient_TV, factor),
                    vocabulary,
                    gradient_TV.stride(0),
                    BLOCK=min(SCALE_BLOCK, triton.next_power_of_2(vocabulary)),
                    num_warps=SCALE_WARPS,
                )

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
        rows, vocabulary = student_CV.shape
        destination_CV = student_CV if gradient_CV is None else gradient_CV
        divergence_C, entropy_C = torch.empty(2, rows, device=student_CV.device).unbind(0)
        if rows:
            with on_device(student_CV):
                jsd_kernel[(program_count(student_CV),)](
                    *trusted(student_CV, teacher_CW, destination_CV, mask_C, divergence_C,
                    entropy_C, scale.float()), rows, vocabulary, min(vocabulary,
                    teacher_CW.shape[1]), student_CV.stride(0), teacher_CW.stride(0),
                    destination_CV.stride(0), 1.0 / temperature, BETA=beta,
                    HAS_GRADIENT=gradient_CV is not None,
                    SHARES_STORAGE=_shares_storage(student_CV, destination_CV),
                    **rows_of(student_CV, destination_CV, teacher_CW, rows_read=2),
                )  # fmt: skip
        return divergence_C, entropy_C


def _row_columns(rows: PolicyRows) -> list[Tensor]:
    """The columns of `policy_kernel` in its order; one that is missing is never read."""
    anything_T = rows.advantages_T
    weights_T = torch.ones_like(anything_T) if rows.weights_T is None else rows.weights_T
    optional = (
        rows.proximal_log_probs_T, rows.behaviour_log_probs_T, rows.reference_log_probs_T
    )  # fmt: skip
    return [
        rows.mask_T, rows.target_ids_T, anything_T, rows.scales_T, weights_T,
        *(anything_T if column is None else column for column in optional),
    ]  # fmt: skip


def policy_numbers(settings: PolicyLossSettings) -> list[float]:
    """The run-time arguments of `policy_kernel`: NUMBERS without the temperature."""
    numbers, _ = settings_values(settings)
    return [value for name, value in zip(NUMBERS, numbers, strict=True) if name != "temperature"]


def policy_constants(
    settings: PolicyLossSettings,
    *,
    has_proximal: bool = True,
    weights_are_late: bool = False,
    has_reference: bool = False,
) -> dict[str, int | bool]:
    """What is compiled into `policy_kernel`: choices, and which columns and terms there are."""
    _, choices = settings_values(settings)
    chosen = dict(zip(CHOICES, choices, strict=True))
    return {
        "SURROGATE": chosen["surrogate"],
        "CORRECTION": chosen["correction"],
        "KL_ESTIMATOR": chosen["kl_estimator"],
        "KL_CORRECTION": chosen["kl_correction"],
        "HAS_PROXIMAL": has_proximal,
        "WEIGHTS_ARE_LATE": weights_are_late,
        "HAS_REFERENCE": has_reference,
        "HAS_ENTROPY": settings.entropy_coefficient > 0,
    }


def rows_of(*matrices: Tensor, rows_read: int = 1, shares_rows: bool = True) -> dict[str, Any]:
    """How a launch reads rows of these matrices [C, V], the first of which says how many columns
    there are: the constants of `triton_sweeps`, and options of the compiler.

    rows_read: how many rows a program reads side by side. shares_rows: whether `program_count`
    programs share the rows out.
    """
    size = max(matrix.element_size() for matrix in matrices)
    lie, tuning = lie_of(*matrices), tuning_for(matrices[0].device)
    tile = tile_for(matrices[0].shape[1], size, tuning, rows_read, lie == "narrow")
    chosen = {"ROWS": lie, **tile.constants, "num_warps": tile.warps}
    # Left alone, the assembler saves registers, and spills, for programs that will never come.
    return chosen | ({"maxnreg": tuning.registers} if shares_rows else {})


def lie_of(*matrices: Tensor) -> str:
    """`aligned`, `rotated` or `narrow`, as `triton_sweeps` explains; the stride of a lone row does
    not count."""
    offsets = {
        (
            matrix.data_ptr() % VECTOR_BYTES,
            matrix.stride(0) * matrix.element_size() % VECTOR_BYTES if len(matrix) > 1 else 0,
        )
        for matrix in matrices
    }
    if offsets == {(0, 0)}:
        return "aligned"
    sizes = {matrix.element_size() for matrix in matrices}
    return "rotated" if len(offsets) == len(sizes) == 1 else "narrow"


def program_count(logits_CV: Tensor) -> int:
    """How many programs share the rows."""
    rows = len(logits_CV)
    if not logits_CV.is_cuda:
        return min(rows, 4)
    processors: int = _properties(logits_CV.device).multi_processor_count
    return min(rows, processors * tuning_for(logits_CV.device).programs_per_processor)


@cache
def _properties(device: torch.device) -> torch._C._CudaDeviceProperties:
    return torch.cuda.get_device_properties(device)


def _shares_storage(source_CV: Tensor, destination_CV: Tensor) -> bool:
    return (
        source_CV.dtype != destination_CV.dtype
        and source_CV.data_ptr() == destination_CV.data_ptr()
    )


@contextmanager
def on_device(tensor: Tensor) -> Iterator[None]:
    """Launch on the tensor's own GPU, whichever is current."""
    if not tensor.is_cuda:
        yield
        return
    with torch.cuda.device(tensor.device):
        yield
