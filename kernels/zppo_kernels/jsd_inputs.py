"""Checks of the distillation losses' inputs.

Shapes: T rows, K teacher support.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .policy_inputs import Count, count_tensor


def row_mask(mask_T: Tensor | None, rows: Tensor) -> Tensor:
    """bool [T] on the rows' device; all True without a mask."""
    if mask_T is None:
        return torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device)
    if tuple(mask_T.shape) != (rows.shape[0],):
        raise ValueError(f"mask_T has shape {tuple(mask_T.shape)}; expected ({rows.shape[0]},)")
    return mask_T.detach() != 0


def jsd_scale(token_count: Count, like: Tensor) -> Tensor:
    """1 / token_count as a 0-dim tensor in the dtype of the loss; 1 where nothing is counted."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return 1.0 / count_tensor(token_count, "token_count", like.device, dtype)


def check_beta(beta: float) -> None:
    """beta interpolates from the forward to the reverse KL."""
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta is {beta!r}; expected a number in [0, 1]")


def check_support(
    teacher_ids_TK: Tensor, teacher_log_probs_TK: Tensor, rows: int, vocabulary: int
) -> None:
    """Ids and log-probs of the teacher's support belong together and to the rows."""
    if (
        teacher_ids_TK.dim() != 2
        or teacher_ids_TK.shape != teacher_log_probs_TK.shape
        or len(teacher_ids_TK) != rows
    ):
        raise ValueError(
            f"teacher_ids_TK has shape {tuple(teacher_ids_TK.shape)} and teacher_log_probs_TK "
            f"{tuple(teacher_log_probs_TK.shape)}; expected ({rows}, K) both"
        )
    if teacher_ids_TK.shape[1] == 0 or teacher_ids_TK.is_floating_point():
        raise ValueError(
            f"teacher_ids_TK has shape {tuple(teacher_ids_TK.shape)} and dtype "
            f"{teacher_ids_TK.dtype}; expected integers, K >= 1"
        )
    # Where the kernels would read outside the row; a GPU is not waited for.
    if (
        teacher_ids_TK.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and teacher_ids_TK.numel()
    ):
        highest = int(teacher_ids_TK.max())
        if highest >= vocabulary:
            raise ValueError(
                f"teacher_ids_TK holds {highest}; expected ids below {vocabulary}, or -1 for "
                "padding"
            )
