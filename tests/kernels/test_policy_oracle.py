"""The fused policy loss against autograd in float64: loss, metrics and every gradient, on every
backend.

Tolerance in quack's style: no more than three times the error that plain torch makes in float32,
plus a floor.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    BACKENDS,
    NUMERIC,
    SLOW_BACKENDS,
    Case,
    head_logits,
    make_case,
    reference_answer,
    relative_error,
)

from zppo_kernels import (
    PolicyLossSettings,
    policy_loss_from_hidden,
    policy_loss_from_logits,
    token_log_probs,
)
from zppo_kernels.backends import using_backend

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
FLOOR = 8e-6  # one certain token alone: 1 - p has float32 resolution, and chance decides who rounds better


def loss_settings(**changes: object) -> PolicyLossSettings:
    normalisation = changes.get("normalisation", "token")
    length = 9 if normalisation == "fixed_length" else None
    return PolicyLossSettings(dual_clip=1.5, fixed_length=length, **changes)


ALL = [
    loss_settings(
        ratio_level=level,
        correction=correction,
        normalisation=normalisation,
        kl_coefficient=kl,
        temperature=t,
    )
    for level, correction, normalisation, (kl, t) in itertools.product(
        ("token", "sequence"),
        ("none", "truncate", "mask"),
        ("token", "sequence", "fixed_length"),
        ((0.0, 1.0), (0.1, 0.7)),
    )
]


def check_gradients(
    case: Case,
    chosen: PolicyLossSettings,
    backend: str,
    full_metrics: bool = True,
    head: tuple[float, float | None] = (1.0, None),
) -> None:
    oracle, yardstick = (
        reference_answer(case, chosen, head=head),
        reference_answer(case, chosen, torch.float32, head),
    )
    allowed = [
        FLOOR + 3 * relative_error(plain, exact)
        for plain, exact in zip(yardstick.gradients, oracle.gradients, strict=True)
    ]
    with using_backend(backend):
        leaves = case.leaves(torch.float32)
        output = policy_loss_from_hidden(
            leaves[0], leaves[1], case.target_ids_T, bias_V=leaves[2], settings=chosen,
            full_metrics=full_metrics, logit_scale=head[0], soft_cap=head[1], **case.inputs,
        )  # fmt: skip
        output.loss.backward()
        logits_TV = head_logits(case.logits_TV, *head).requires_grad_()
        other = policy_loss_from_logits(
            logits_TV, case.target_ids_T, settings=chosen, full_metrics=full_metrics, **case.inputs
        )
        other.loss.backward()
    gradients = [leaf.grad for leaf in (*leaves, logits_TV)]
    for gradient, exact, limit in zip(gradients, oracle.gradients, allowed, strict=True):
        assert gradient is not None
        assert relative_error(gradient, exact) <= limit
    for found in (output, other):
        assert found.loss.item() == pytest.approx(oracle.output.loss.item(), rel=1e-5, abs=1e-6)
        assert set(found.metrics) == set(oracle.output.metrics)
        for name, value in oracle.output.metrics.items() if full_metrics else ():
            assert float(found.metrics[name]) == pytest.approx(float(value), rel=2e-5, abs=2e-5), (
                name
            )
        for column in ("log_probs_T", "entropy_T"):
            exact_T, found_T = getattr(oracle.output, column), getattr(found, column)
            assert not found_T.requires_grad
            if not full_metrics:  # 0 where not computed
                exact_T = torch.where(found_T == 0, 0.0, exact_T)
            assert relative_error(found_T, exact_T) < 1e-5, column


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_every_setting_equals_the_oracle(backend: str) -> None:
    for chosen in ALL:
        check_gradients(make_case(1), chosen, backend)


@pytest.mark.slow
@pytest.mark.skipif("triton" not in BACKENDS, reason="needs TRITON_INTERPRET=1 and Triton")
@pytest.mark.parametrize(
    "chosen", ALL[::3], ids=lambda s: f"{s.ratio_level}-{s.correction}-{s.kl_coefficient}"
)
def test_triton_kernels_equal_the_oracle_under_the_interpreter(chosen: PolicyLossSettings) -> None:
    check_gradients(make_case(2, rows=17), chosen, "triton")


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12, **NUMERIC)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 21),
    vocabulary=st.sampled_from([2, 3, 63, 64, 65, 257, 1024, 1500]),
    sequences=st.integers(1, 6),
    drift=st.sampled_from([0.0, 0.3, 3.0]),
    full_metrics=st.booleans(),
    chosen=st.sampled_from(ALL),
)
def test_random_sizes_equal_the_oracle(
    backend: str, seed: int, rows: int, vocabulary: int, sequences: int, drift: float,
    full_metrics: bool, chosen: PolicyLossSettings,
) -> None:  # fmt: skip
    # With two or three tokens most are all but certain, and 1 - p has float32 resolution; a KL to a
    # reference that is far away weighs that error by thousands, in every backend as chance has it.
    assume(vocabulary > 3 or not chosen.kl_coefficient or drift < 1.0)
    case = make_case(seed, rows=rows, vocabulary=vocabulary, sequences=sequences, drift=drift)
    check_gradients(case, chosen, backend, full_metrics)


@st.composite
def any_settings(draw: st.DrawFn) -> PolicyLossSettings:
    """Every switch of the loss, in any combination that makes sense."""
    surrogate = draw(st.sampled_from(["clip", "cispo", "sapo", "dppo_tv", "dppo_kl"]))
    levels = ["token"] if surrogate.startswith("dppo") else ["token", "sequence"]
    return loss_settings(
        surrogate=surrogate,
        clip_low=draw(st.sampled_from([0.02, 0.2, 1.0])),
        clip_high=draw(st.sampled_from([0.03, 0.28])),
        sapo_temperature_negative=draw(st.sampled_from([1.05, 5.0])),
        ratio_level=draw(st.sampled_from(levels)),
        correction=draw(st.sampled_from(["none", "truncate", "mask"])),
        correction_floor=draw(st.sampled_from([None, 0.7])),
        correction_level=draw(st.sampled_from(["token", "sequence"])),
        normalisation=draw(st.sampled_from(["token", "sequence", "fixed_length"])),
        kl_coefficient=draw(st.sampled_from([0.0, 0.1])),
        kl_estimator=draw(st.sampled_from(["k1", "k2", "k3"])),
        kl_correction=draw(st.sampled_from(["none", "importance", "straight_through"])),
        entropy_coefficient=draw(st.sampled_from([0.0, 0.02])),
        temperature=draw(st.sampled_from([1.0, 0.7])),
    )


def any_rows(case: Case, seed: int, exactly_one: bool, per_token: bool) -> Case:
    """Without proximal log-probs, the behaviour's near the policy's; with an advantage per row."""
    if exactly_one:
        case = case.with_inputs(proximal_log_probs_T=None)
    if per_token:
        generator = torch.Generator().manual_seed(seed)
        advantages_T = torch.randn(len(case.target_ids_T), generator=generator).round(decimals=0)
        case = case.with_inputs(advantages_S=None, advantages_T=advantages_T)
        ids_T = case.inputs["sequence_ids_T"].clamp(max=len(case.target_ids_T) - 1)
        case = case.with_inputs(sequence_ids_T=ids_T)
    return case


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "examples"), [(name, 10 if name == "triton" else 60) for name in BACKENDS]
)
def test_any_settings_equal_the_oracle(backend: str, examples: int) -> None:
    @settings(max_examples=examples, **NUMERIC)
    @given(
        seed=st.integers(0, 10**6),
        rows=st.integers(1, 15),
        vocabulary=st.sampled_from([5, 64, 257, 1100]),
        drift=st.sampled_from([0.05, 0.4]),
        exactly_one=st.booleans(),
        per_token=st.booleans(),
        full_metrics=st.booleans(),
        head=st.sampled_from([(1.0, None), (0.3, None), (1.0, 5.0), (1.7, 20.0)]),
        chosen=any_settings(),
    )
    def check(
        seed: int, rows: int, vocabulary: int, drift: float, exactly_one: bool, per_token: bool,
        full_metrics: bool, head: tuple[float, float | None], chosen: PolicyLossSettings,
    ) -> None:  # fmt: skip
        case = make_case(seed, rows=rows, vocabulary=vocabulary, sequences=4, drift=drift)
        case = any_rows(case, seed, exactly_one, per_token)
        check_gradients(case, chosen, backend, full_metrics, head)

    check()


@pytest.mark.parametrize("backend", SLOW_BACKENDS)
@pytest.mark.parametrize(
    "chosen", [loss_settings(), loss_settings(ratio_level="sequence")], ids=["token", "sequence"]
)
def test_in_place_gradient_is_the_same(backend: str, chosen: PolicyLossSettings) -> None:
    case = make_case(3)
    oracle = reference_answer(case, chosen)
    leaf_TV = case.logits_TV.requires_grad_()
    with using_backend(backend):
        policy_loss_from_logits(
            leaf_TV * 1.0, case.target_ids_T, settings=chosen, in_place=True, **case.inputs
        ).loss.mul(3.0).backward()
    assert leaf_TV.grad is not None
    assert relative_error(leaf_TV.grad / 3.0, oracle.gradients[3]) < 1e-5


@pytest.mark.parametrize("backend", ["torch", "numba", *SLOW_BACKENDS[2:]])
def test_float16_logits_keep_float16_accuracy(backend: str) -> None:
    """The interpreter gets bf16 silently wrong, so half precision is tested with float16."""
    case, chosen = make_case(4), loss_settings()
    logits_TV = case.logits_TV.half()
    inputs = {"settings": chosen, "full_metrics": True, **case.inputs, "token_count": 1}
    exact_TV = logits_TV.double().requires_grad_()
    with using_backend("torch"):
        exact = policy_loss_from_logits(exact_TV, case.target_ids_T, **inputs)
        exact.loss.backward()
    leaf_TV = logits_TV.clone().requires_grad_()
    with using_backend(backend):
        found = policy_loss_from_logits(leaf_TV, case.target_ids_T, **inputs)
        found.loss.backward()
    assert leaf_TV.grad is not None and exact_TV.grad is not None
    assert leaf_TV.grad.dtype == torch.float16
    assert relative_error(leaf_TV.grad, exact_TV.grad) < 1e-3
    assert found.loss.item() == pytest.approx(exact.loss.item(), rel=1e-5)


def test_bfloat16_hidden_states_get_float32_logits() -> None:
    """bf16 inputs: the only roundings are those of the inputs and of the returned gradients."""
    case, chosen = make_case(5), loss_settings()
    hidden, weight, bias = (
        tensor.bfloat16() for tensor in (case.hidden_TH, case.weight_VH, case.bias_V)
    )
    exact = reference_answer(
        Case(hidden.double(), weight.double(), bias.double(), case.target_ids_T, case.inputs),
        chosen,
    )
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    found = policy_loss_from_hidden(
        leaves[0], leaves[1], case.target_ids_T, bias_V=leaves[2], settings=chosen, **case.inputs
    )
    found.loss.backward()
    assert found.loss.item() == pytest.approx(exact.output.loss.item(), rel=1e-5)
    for leaf, gradient in zip(leaves, exact.gradients, strict=False):
        assert leaf.grad is not None and leaf.grad.dtype == torch.bfloat16
        assert relative_error(leaf.grad, gradient) < 2**-8


@pytest.mark.slow
def test_float64_passes_gradcheck() -> None:
    """The hand-written derivative is the derivative, to numerical differentiation."""
    case = make_case(6, rows=7, vocabulary=11)
    inputs = {
        name: value.double()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in case.inputs.items()
    }
    several = [
        loss_settings(ratio_level="sequence", kl_coefficient=0.1, kl_correction="importance"),
        *(
            loss_settings(
                surrogate=surrogate, entropy_coefficient=0.3, kl_coefficient=0.1, kl_estimator=name
            )
            for surrogate, name in (("clip", "k1"), ("sapo", "k2"))
        ),
    ]
    for chosen in several:

        def loss(*leaves: torch.Tensor, chosen: PolicyLossSettings = chosen) -> torch.Tensor:
            return policy_loss_from_hidden(
                leaves[0], leaves[1], case.target_ids_T, bias_V=leaves[2], settings=chosen,
                soft_cap=4.0, logit_scale=0.9, **inputs,
            ).loss  # fmt: skip

        assert torch.autograd.gradcheck(loss, case.leaves(torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize("surrogate", ["cispo", "dppo_tv", "dppo_kl"])
def test_a_weight_that_is_a_constant_has_the_gradient_of_its_log_prob(surrogate: Any) -> None:
    """By finite differences in float64: the loss itself is not what is differentiated, since its
    weight moves; the log-probs with the weights held are."""
    case = make_case(6, rows=9, vocabulary=11, drift=0.2)
    inputs = {
        name: value.double()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in case.inputs.items()
    } | {"behaviour_log_probs_T": None}
    chosen = loss_settings(surrogate=surrogate, clip_low=0.05, clip_high=0.06)
    hidden_TH, weight_VH, bias_V = (leaf.detach() for leaf in case.leaves(torch.float64))
    mask_T = case.inputs["mask_T"] & (case.target_ids_T != -100)

    def log_probs(hidden_TH: torch.Tensor) -> torch.Tensor:
        return token_log_probs(hidden_TH, weight_VH, case.target_ids_T, bias_V=bias_V)[0]

    leaf_TH = hidden_TH.clone().requires_grad_()
    policy_loss_from_hidden(
        leaf_TH, weight_VH, case.target_ids_T, bias_V=bias_V, settings=chosen, **inputs
    ).loss.backward()
    now_T, before_T = log_probs(hidden_TH), inputs["proximal_log_probs_T"]
    advantages_T = inputs["advantages_S"][inputs["sequence_ids_T"]]
    weights_T = naive_weights(surrogate, now_T, before_T, advantages_T)
    factors_T = torch.where(mask_T, -advantages_T * weights_T / inputs["token_count"], 0.0)
    step = 1e-6
    for row in range(len(hidden_TH)):
        for column in (0, 5):
            moved_TH = torch.zeros_like(hidden_TH)
            moved_TH[row, column] = step
            ahead, behind = log_probs(hidden_TH + moved_TH), log_probs(hidden_TH - moved_TH)
            expected = float((factors_T * (ahead - behind)).sum()) / (2 * step)
            assert leaf_TH.grad is not None
            assert float(leaf_TH.grad[row, column]) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def naive_weights(
    surrogate: str, now_T: torch.Tensor, before_T: torch.Tensor, advantages_T: torch.Tensor
) -> torch.Tensor:
    """MiniMax-M1, Eq. 5, and DPPO's binary divergences (arXiv 2602.04879), one row at a time."""
    weights = []
    for now, before, advantage in zip(now_T, before_T, advantages_T, strict=True):
        ratio, p, q = math.exp(now - before), math.exp(now), math.exp(before)
        if surrogate == "cispo":
            weights.append(min(max(ratio, 0.95), 1.06))
            continue
        moved = abs(p - q)
        if surrogate == "dppo_kl":
            moved = q * math.log(q / p) + (1 - q) * math.log((1 - q + 1e-8) / (1 - p + 1e-8))
        is_far = (moved > 0.06 and p > q) if advantage > 0 else (moved > 0.05 and p < q)
        weights.append(0.0 if is_far else min(ratio, 1.5))
    return torch.tensor(weights, dtype=torch.float64)
