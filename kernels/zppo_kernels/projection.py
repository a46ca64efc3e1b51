"""The LM head's three matrix products over a chunk of rows, with float32 logits and a float32
weight gradient.

Invariant: logits are never rounded below float32 (half a unit in the last place of a bf16 logit of
16 to 32 is 0.06 nat), both gradients leave here in float32 whatever the head's dtype, and the
weight's is summed over chunks in it.

A CPU has no bf16 product with a float32 result. What it has is oneDNN's leave to round float32
operands to bf16, which changes nothing where they were bf16 before: all of a bf16 model's but the
gradient of the logits, which a GPU rounds as well. It was 2.3 times as fast as float32 on one
processor with bf16 instructions, and has no effect on others (Zen 4, which has them, among these).

Shapes: C rows of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .layout import HALF, accumulator_of
from .tuning import tuning_for

# On a CPU a chunk's logits should stay near the caches: 6.3 M float32 are 25 MB, 128 rows of a
# vocabulary of 49,152.
_CPU_LOGITS = 128 * 49_152
# On a GPU small chunks pay in weight-gradient traffic, and a chunk of float32 logits may take this
# share of its memory: 4,096 rows of V = 151,936 are 2.5 GB. Not of what is free, which differs from
# run to run: the order of sums would too.
_GPU_SHARE = 16
# Rows start 64 bytes apart or a multiple of it, so that kernels may load 16 bytes at a time for any
# vocabulary.
_ALIGNMENT = 32


def chunk_rows(rows: int, vocabulary: int, device: torch.device) -> int:
    """How many rows' logits exist at one time."""
    if device.type == "cpu":
        most = _CPU_LOGITS // vocabulary
    else:
        most = tuning_for(device).chunk_rows
        memory = torch.cuda.get_device_properties(device).total_memory
        while most > 1 and 4 * most * vocabulary * _GPU_SHARE > memory:
            most //= 2
    return max(1, min(rows, max(most, 16)))


@contextmanager
def bf16_operands(wanted: bool) -> Iterator[None]:
    """Let oneDNN round the operands of float32 products to bf16 for as long as this lasts."""
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set up at run time
    before = matmul.fp32_precision
    if wanted:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        if wanted:
            matmul.fp32_precision = before


@dataclass(frozen=True)
class Projection:
    """LM head with the dtypes its device computes in: half precision stays on a GPU, a CPU computes
    in float32.

    `was_bf16`: a CPU's float32 weight that holds bf16 numbers.
    """

    weight_VH: Tensor
    bias_V: Tensor | None
    was_bf16: bool = False

    @staticmethod
    def of(weight_VH: Tensor, bias_V: Tensor | None) -> Projection:
        """float64 stays float64 (the oracle of the tests)."""
        weight_VH, was_bf16 = weight_VH.detach(), False
        if not weight_VH.is_cuda and weight_VH.dtype in HALF:
            weight_VH, was_bf16 = weight_VH.float(), weight_VH.dtype == torch.bfloat16
        return Projection(weight_VH, None if bias_V is None else bias_V.detach(), was_bf16)

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of logits and weight gradient."""
        return accumulator_of(self.weight_VH)

    def operand(self, hidden_CH: Tensor) -> Tensor:
        """Hidden states in the dtype of the products."""
        return hidden_CH.detach().to(self.weight_VH.dtype)

    def buffer(self, rows: int) -> Tensor:
        """Uninitialised logits [rows, V] with aligned rows."""
        vocabulary = self.weight_VH.shape[0]
        padded = -(-vocabulary // _ALIGNMENT) * _ALIGNMENT
        storage = torch.empty(rows, padded, dtype=self.accumulator, device=self.weight_VH.device)
        return storage[:, :vocabulary]

    def logits(self, hidden_CH: Tensor, buffer_CV: Tensor) -> Tensor:
        """hidden @ weight.T + bias into the first rows of the buffer, which are returned."""
        logits_CV = buffer_CV[: len(hidden_CH)]
        weight_HV = self.weight_VH.T
        if self.weight_VH.dtype in HALF:
            torch.ops.aten.mm.dtype_out(hidden_CH, weight_HV, torch.float32, out=logits_CV)
        else:
            with bf16_operands(self.was_bf16):
                torch.mm(hidden_CH, weight_HV, out=logits_CV)
        return logits_CV if self.bias_V is None else logits_CV.add_(self.bias_V)

    def gradient_view(self, logits_CV: Tensor) -> Tensor:
        """Where the row kernel writes the gradient: over the logits, in the dtype the next two
        products take.

        bf16 gradients go to the front of each float32 row's own storage. float16 would lose small
        ones, so it stays float32.
        """
        if self.weight_VH.dtype != torch.bfloat16:
            return logits_CV
        rows, vocabulary = logits_CV.shape
        return logits_CV.view(torch.bfloat16).as_strided(
            (rows, vocabulary), (2 * logits_CV.stride(0), 1)
        )

    def hidden_gradient(self, gradient_CV: Tensor, result_CH: Tensor) -> None:
        """result = gradient @ weight, in the accumulator's dtype; into a given tensor, because
        autocast would round a free product to bf16."""
        if gradient_CV.dtype in HALF:
            torch.ops.aten.mm.dtype_out(gradient_CV, self.weight_VH, torch.float32, out=result_CH)
        else:
            with bf16_operands(self.was_bf16):
                torch.mm(gradient_CV, self.weight_VH.to(gradient_CV.dtype), out=result_CH)

    def add_weight_gradient(
        self, total_VH: Tensor, gradient_CV: Tensor, hidden_CH: Tensor, is_first: bool
    ) -> None:
        """total (+)= gradient.T @ hidden, in float32; the first chunk overwrites, so the total
        needs no zeroing."""
        beta = 0.0 if is_first else 1.0
        gradient_VC = gradient_CV.T
        if gradient_CV.dtype in HALF:
            torch.ops.aten.addmm.dtype_out(
                total_VH, gradient_VC, hidden_CH, torch.float32, beta=beta, alpha=1.0, out=total_VH
            )
        else:
            with bf16_operands(self.was_bf16):
                total_VH.addmm_(gradient_VC, hidden_CH.to(gradient_CV.dtype), beta=beta)
