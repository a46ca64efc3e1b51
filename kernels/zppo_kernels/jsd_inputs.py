"""Checks and completes the distillation losses' inputs.

Shapes: T rows, K teacher support.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import accumulator_of
from .policy_inputs import Count, check_device, check_row_tensor, count_tensor, reads_values


def row_mask(mask_T: Tensor | None, name: str, rows: Tensor) -> Tensor:
    """bool [T] on the rows' device, contiguous; all True without a mask."""
    if mask_T is None:
        return torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device)
    check_row_tensor("mask_T", mask_T, rows.shape[0], rows.device, name)
    return (mask_T.detach() != 0).contiguous()


def jsd_scale(token_count: Count, like: Tensor) -> Tensor:
    """1 / token_count as a 0-dim tensor in the dtype of the loss; 1 where nothing is counted."""
    return 1.0 / count_tensor(token_count, "token_count", like.device, accumulator_of(like))


def check_beta(beta: float) -> None:
    """beta interpolates from the forward to the reverse KL."""
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta is {beta!r}; expected a number in [0, 1]")


def check_teacher_rows(name: str, teacher: Tensor, student_name: str, student: Tensor) -> None:
    """The teacher reads the same rows on the same device."""
    if len(teacher) != len(student):
        raise ValueError(
            f"{name} has {len(teacher)} rows; expected {len(student)}, one per row of "
            f"{student_name}"
        )
    check_device(name, teacher, student_name, student)


def support_of(
    teacher_ids_TK: Tensor, teacher_log_probs_TK: Tensor, mask_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Ids int64 and log-probs of the teacher's support, contiguous; masked rows hold padding
    alone."""
    if (
        teacher_ids_TK.dim() != 2
        or teacher_ids_TK.shape != teacher_log_probs_TK.shape
        or len(teacher_ids_TK) != len(mask_T)
    ):
        raise ValueError(
            f"teacher_ids_TK has shape {tuple(teacher_ids_TK.shape)} and teacher_log_probs_TK "
            f"{tuple(teacher_log_probs_TK.shape)}; expected ({len(mask_T)}, K) both"
        )
    if teacher_ids_TK.shape[1] == 0 or teacher_ids_TK.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"teacher_ids_TK has shape {tuple(teacher_ids_TK.shape)} and dtype "
            f"{teacher_ids_TK.dtype}; "
            "expected int64 or int32, K >= 1"
        )
    if not teacher_log_probs_TK.is_floating_point():
        raise ValueError(
            f"teacher_log_probs_TK is {teacher_log_probs_TK.dtype}; expected floating point"
        )
    check_device("teacher_ids_TK", teacher_ids_TK, "the student", mask_T)
    check_device("teacher_log_probs_TK", teacher_log_probs_TK, "the student", mask_T)
    ids_TK = torch.where(mask_T.unsqueeze(1), teacher_ids_TK.long(), -1).contiguous()
    return ids_TK, teacher_log_probs_TK.detach().contiguous()


def check_support_ids(teacher_ids_TK: Tensor, vocabulary: int) -> None:
    """Where values may be read: ValueError for ids beyond the vocabulary and for ids that a row
    holds twice."""
    if not reads_values(teacher_ids_TK) or not teacher_ids_TK.numel():
        return
    highest = int(teacher_ids_TK.max())
    if highest >= vocabulary:
        raise ValueError(
            f"teacher_ids_TK holds {highest}; expected ids below {vocabulary}, or -1 for padding"
        )
    sorted_TK = teacher_ids_TK.sort(dim=1).values
    twice_T = ((sorted_TK[:, 1:] == sorted_TK[:, :-1]) & (sorted_TK[:, 1:] >= 0)).any(1)
    if bool(twice_T.any()):
        raise ValueError(
            f"teacher_ids_TK holds an id twice in row {int(twice_T.nonzero()[0])}; expected "
            "distinct ids"
        )
