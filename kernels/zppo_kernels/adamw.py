"""One update of AdamW with stochastic rounding on a CPU: every element is read and written once,
where tensor operations pass over it some thirty times. Bound by memory.

Shape legend: N elements of a tensor, or of a part of it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._numba import HAVE_NUMBA
from ._numba_adamw import adamw_rows

ELEMENTS_PER_THREAD = 1 << 16
_BITS = {torch.float32: (torch.int32, np.uint32, 0), torch.bfloat16: (torch.int16, np.uint16, 16)}


def fuses_adamw(device: torch.device) -> bool:
    """Whether `fused_adamw` runs for tensors on this device."""
    return HAVE_NUMBA and device.type == "cpu"


def fused_adamw(
    weight_N: Tensor,
    first_N: Tensor,
    second_N: Tensor,
    gradient_N: Tensor,
    *,
    learning_rate: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    updates: int,
    stream: int,
    place: int,
) -> None:
    """Update weights and moments in place, as update number `updates` of `torch.optim.AdamW` would.

    Contiguous float32 or bf16 on a CPU, both moments of one dtype; the gradient is float32.
    What is bf16 is rounded up or down with probabilities that keep the expectation: element i takes
    its noise from splitmix64 number `place + i + 1` of `stream`, the weight from the lowest 16
    bits, the moments from those above. Without fused multiply-adds, so neither chunks nor threads
    show in the result.
    """
    numbers = np.array(
        [
            1 - learning_rate * weight_decay,
            1 - beta1,
            beta2,
            1 - beta2,
            sqrt(1 - beta2**updates),
            epsilon,
            -learning_rate / (1 - beta1**updates),
        ],
        np.float32,
    )
    (weights, weight_shift), (firsts, state_shift), (seconds, _) = (
        _bits(tensor) for tensor in (weight_N, first_N, second_N)
    )
    gradients: np.ndarray = gradient_N.detach().numpy()
    seed: Any = np.uint64(stream % (1 << 64))

    def run(start: int, end: int) -> None:
        part = slice(start, end)
        first: Any = np.uint64(place + start)
        adamw_rows(
            weights[part],
            firsts[part],
            seconds[part],
            gradients[part],
            numbers,
            weight_shift,
            state_shift,
            seed,
            first,
        )

    threads = max(1, min(torch.get_num_threads(), len(weights) // ELEMENTS_PER_THREAD))
    bounds = list(pairwise(len(weights) * index // threads for index in range(threads + 1)))
    if threads == 1:
        run(*bounds[0])
    else:
        list(_pool(threads).map(run, *zip(*bounds, strict=True)))


def _bits(tensor_N: Tensor) -> tuple[np.ndarray, int]:
    """The bits of the elements, and how far they lie above the lowest of a float32."""
    signed, unsigned, shift = _BITS[tensor_N.dtype]
    return tensor_N.detach().view(signed).numpy().view(unsigned), shift


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="zppo-adamw")
