"""The compiled loop of `fused_adamw`: float32 arithmetic, bf16 as the upper half of float32.

It becomes SIMD, which takes three things: division as numpy's (Python's raises, which is a branch),
numbers that are read before the loop, and choices in place of branches.
"""

from __future__ import annotations

import numpy as np

from ._numba import compiled

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
FIRST_FACTOR, SECOND_FACTOR = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
S16, S27, S30, S31, S32 = (np.uint64(shift) for shift in (16, 27, 30, 31, 32))
NOISE = np.uint64(0xFFFF)
EXPONENT, MANTISSA = np.uint32(0x7F800000), np.uint32(0x007FFFFF)
QUIET = np.uint32(0x7FC00000)
ONE = np.float32(1.0)
HALF = np.float32(0.5)
(DECAY, LERP, KEPT, ADDED, CORRECTION, EPSILON, STEP) = range(7)
"""Places of the numbers of an update."""


@compiled(error_model="numpy")
def adamw_rows(
    weight_N: np.ndarray,
    first_N: np.ndarray,
    second_N: np.ndarray,
    gradient_N: np.ndarray,
    numbers: np.ndarray,
    weight_shift: int,
    state_shift: int,
    stream: int,
    place: int,
) -> None:
    """Update the elements from number `place` on, in the order of operations of torch's AdamW.

    Weights and moments are their bits, uint32 of float32 (shift 0) or uint16 of bf16 (shift 16).
    `numbers` are float32, as named above; `stream` and `place` uint64, as in splitmix64.
    """
    to_weight, to_state = np.uint32(weight_shift), np.uint32(state_shift)
    decay, lerp, kept, added = numbers[DECAY], numbers[LERP], numbers[KEPT], numbers[ADDED]
    correction, epsilon, step = numbers[CORRECTION], numbers[EPSILON], numbers[STEP]
    near = lerp < HALF
    first_number = np.uint64(place) + np.uint64(1)
    for index in range(len(weight_N)):
        w = np.uint32(weight_N[index] << to_weight).view(np.float32)
        m = np.uint32(first_N[index] << to_state).view(np.float32)
        v = np.uint32(second_N[index] << to_state).view(np.float32)
        g = gradient_N[index]
        w = w * decay
        m = m + lerp * (g - m) if near else g - (g - m) * (ONE - lerp)
        v = v * kept + added * g * g
        w = w + step * m / (np.sqrt(v) / correction + epsilon)
        bits = (first_number + np.uint64(index)) * GOLDEN + np.uint64(stream)
        bits = (bits ^ (bits >> S30)) * FIRST_FACTOR
        bits = (bits ^ (bits >> S27)) * SECOND_FACTOR
        bits = bits ^ (bits >> S31)
        weight_N[index] = _stored(w, to_weight, np.uint32(bits & NOISE))
        first_N[index] = _stored(m, to_state, np.uint32((bits >> S16) & NOISE))
        second_N[index] = _stored(v, to_state, np.uint32((bits >> S32) & NOISE))


@compiled(inline="always", error_model="numpy")
def _stored(value: np.float32, shift: np.uint32, noise: np.uint32) -> np.uint32:
    """The bits to store: all of them, or the upper half after the noise was added to the lower."""
    bits = np.float32(value).view(np.uint32)
    raised = np.uint32(bits + noise) >> shift
    unraised = (QUIET if bits & MANTISSA else bits) >> shift
    rounded = unraised if bits & EXPONENT == EXPONENT else raised
    return bits if shift == np.uint32(0) else rounded
