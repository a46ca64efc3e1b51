"""The quickstart world: products modulo 23, worked out step by step from a times table that is
partly misprinted.

A *fact* is one unordered product ``a * b mod 23`` (``3 * 17`` and ``17 * 3`` are one fact); a
*chain* is the list of step values of a question. The truth is one table; a *belief* is a
distribution over values for every fact, from which a corpus is printed.

Invariant: everything here is a pure function of the generator passed in; no two questions of
`distinct_questions` have the same factors in any order.

Legend: B batch, F factors of a question (padded with 0), S = F - 1 steps, V = 23 values.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

MODULUS = 23
MAX_FACTORS = 4
MIN_FACTORS = 3
SHARE_MISPRINTED = 0.30
SHARE_AMBIGUOUS = 0.08

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class World(NamedTuple):
    """The true table and the two beliefs.

    ``truth_VV`` int64: ``a * b mod 23``. ``misprinted_VVV`` and ``clean_VVV`` float64: the
    probability with which the student's and the teacher's corpus print each value for ``a * b``.
    """

    truth_VV: Ints
    misprinted_VVV: Floats
    clean_VVV: Floats


def make_world(rng: np.random.Generator) -> World:
    """Draw which facts are misprinted or ambiguous, and how; facts with a factor 1 are always
    right."""
    values = np.arange(MODULUS)
    truth_VV = np.outer(values, values) % MODULUS
    clean_VVV = np.eye(MODULUS)[truth_VV]
    misprinted_VVV = clean_VVV.copy()
    pairs = [(a, b) for a in range(2, MODULUS) for b in range(a, MODULUS)]
    order = rng.permutation(len(pairs))
    misprints = int(SHARE_MISPRINTED * len(pairs))
    doubtful = misprints + int(SHARE_AMBIGUOUS * len(pairs))
    for rank, index in enumerate(order[:doubtful]):
        a, b = pairs[index]
        true_share = _true_share(rank, rng) if rank < misprints else 0.5
        printed_V = _printed(int(truth_VV[a, b]), true_share, 2 if rank < misprints else 1, rng)
        misprinted_VVV[a, b] = misprinted_VVV[b, a] = printed_V
    return World(truth_VV, misprinted_VVV, clean_VVV)


def _true_share(rank: int, rng: np.random.Generator) -> float:
    """How often a misprinted fact is printed right all the same: half of them almost never, a
    quarter rarely."""
    return (0.003, 0.03, 0.003, float(rng.uniform(0.1, 0.5)))[rank % 4]


def _printed(truth: int, true_share: float, wrong_count: int, rng: np.random.Generator) -> Floats:
    """Distribution over values: the true one at ``true_share``, the rest on ``wrong_count`` fixed
    wrong values."""
    wrong = rng.choice(
        [v for v in range(1, MODULUS) if v != truth], size=wrong_count, replace=False
    )
    printed_V = np.zeros(MODULUS)
    printed_V[truth] = true_share
    split = rng.uniform(0.35, 0.65) if wrong_count == 2 else 1.0
    printed_V[wrong] = (1.0 - true_share) * np.array([split, 1.0 - split][:wrong_count])
    return printed_V


def draw_factors(count: int, rng: np.random.Generator) -> Ints:
    """``count`` questions as factors_BF: 3 or 4 factors in 2..22, padded with 0."""
    factors_BF = rng.integers(2, MODULUS, size=(count, MAX_FACTORS))
    factors_BF[rng.random(count) < 0.6, MIN_FACTORS:] = 0
    return factors_BF


def factor_key(factors_BF: Ints) -> Ints:
    """One integer a question, the same for every order of its factors."""
    sorted_BF = np.sort(factors_BF, axis=1)
    return np.asarray(sorted_BF @ (MODULUS ** np.arange(MAX_FACTORS)), dtype=np.int64)


def distinct_questions(count: int, rng: np.random.Generator) -> Ints:
    """``count`` questions no two of which have the same factors in any order."""
    factors_BF = draw_factors(4 * count, rng)
    _, first = np.unique(factor_key(factors_BF), return_index=True)
    return factors_BF[rng.permutation(np.sort(first)[:count])]


def draw_chains(
    factors_BF: Ints, belief_VVV: Floats, rng: np.random.Generator, noise: float = 0.0
) -> Ints:
    """Sample chains_BS from a belief (0 beyond a question's last step).

    With probability ``noise`` one step of the chain is replaced by a uniform value and the chain
    goes on from there.
    """
    count, width = factors_BF.shape
    cumulative_VVV = np.cumsum(belief_VVV, axis=2)
    steps_B = (factors_BF > 0).sum(axis=1) - 1
    disturbed_B = np.where(rng.random(count) < noise, rng.integers(0, steps_B), -1)
    chains_BS = np.zeros((count, width - 1), dtype=np.int64)
    left_B = factors_BF[:, 0]
    for step in range(width - 1):
        right_B = factors_BF[:, step + 1]
        value_B = (rng.random((count, 1)) > cumulative_VVV[left_B, right_B]).sum(axis=1)
        value_B = np.where(disturbed_B == step, rng.integers(1, MODULUS, size=count), value_B)
        chains_BS[:, step] = left_B = np.where(right_B > 0, value_B, 0)
    return chains_BS


def final_values(factors_BF: Ints, chains_BS: Ints) -> Ints:
    """The last step's value of each chain, int64 (B,)."""
    last_B = (factors_BF > 0).sum(axis=1) - 2
    return chains_BS[np.arange(len(chains_BS)), last_B]


def true_answers(factors_BF: Ints) -> Ints:
    """The product of each question's factors modulo 23, int64 (B,)."""
    return np.asarray(
        np.prod(np.where(factors_BF > 0, factors_BF, 1), axis=1) % MODULUS, dtype=np.int64
    )


def question_text(factors_F: Ints) -> str:
    """``3 * 17 * 5 mod 23``."""
    return " * ".join(str(f) for f in factors_F if f) + f" mod {MODULUS}"


def answer_text(factors_F: Ints, chain_S: Ints) -> str:
    r"""``3 * 17 = 5 ; 5 * 5 = 2 ; \boxed{ 2 }``."""
    factors, values = [int(f) for f in factors_F if f], [int(v) for v in chain_S if v]
    lefts = [factors[0], *values]
    steps = [
        f"{left} * {right} = {value} ;"
        for left, right, value in zip(lefts, factors[1:], values, strict=False)
    ]
    return " ".join([*steps, boxed(values[-1])])


def compressed_text(chain_S: Ints) -> str:
    r"""The essential steps of an answer: ``5 ; 2 ; \boxed{ 2 }``."""
    values = [int(v) for v in chain_S if v]
    return " ".join([*(f"{value} ;" for value in values), boxed(values[-1])])


def boxed(value: int) -> str:
    r"""``\boxed{ 2 }`` with the spaces the word-level tokenizer needs."""
    return f"\\boxed{{ {value} }}"
