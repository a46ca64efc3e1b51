"""The coefficient of the entropy bonus: fixed, or moved towards a target.

With a target the coefficient rises by a step after each update whose mean entropy a token was at
most the target, falls by as much after any other, and is applied only while the last entropy was at
most the target (Skywork-OR1, He et al. 2025; TRL `use_adaptive_entropy`). Its state is part of a
checkpoint, so a resumed run goes on with the very same numbers.
"""

from __future__ import annotations

from msgspec import Struct

from zppo.config.method import MethodConfig


class EntropyState(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`coefficient`: what the next update may apply. `entropy`: mean over the tokens of the last
    applied update, None before the first."""

    coefficient: float
    entropy: float | None = None


def initial_entropy(method: MethodConfig) -> EntropyState | None:
    """Where the coefficient begins; None where it stays as it is written."""
    if method.entropy_target is None:
        return None
    return EntropyState(coefficient=method.entropy_coefficient)


def applied_coefficient(method: MethodConfig, state: EntropyState | None) -> float:
    """The weight of the entropy bonus in the next update."""
    if state is None or method.entropy_target is None:
        return method.entropy_coefficient
    low = state.entropy is not None and state.entropy <= method.entropy_target
    return state.coefficient if low else 0.0


def moved(method: MethodConfig, state: EntropyState, entropy: float) -> EntropyState:
    """The state after an update whose tokens had this mean entropy."""
    assert method.entropy_target is not None
    step = method.entropy_step if entropy <= method.entropy_target else -method.entropy_step
    bounded = min(max(state.coefficient + step, 0.0), method.entropy_coefficient_max)
    return EntropyState(coefficient=bounded, entropy=entropy)
