"""The fused policy loss against autograd in float64: loss, metrics and every gradient, on every
backend.

Tolerance in quack's style: no more than three times the error that plain torch makes in float32,
plus a floor.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    BACKENDS,
    NUMERIC,
    SLOW_BACKENDS,
    Case,
    make_case,
    reference_answer,
    relative_error,
)

from zppo_kernels import PolicyLossSettings, policy_loss_from_hidden, policy_loss_from_logits
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
    case: Case, chosen: PolicyLossSettings, backend: str, full_metrics: bool = True
) -> None:
    oracle, yardstick = (
        reference_answer(case, chosen),
        reference_answer(case, chosen, torch.float32),
    )
    allowed = [
        FLOOR + 3 * relative_error(plain, exact)
        for plain, exact in zip(yardstick.gradients, oracle.gradients, strict=True)
    ]
    with using_backend(backend):
        leaves = case.leaves(torch.float32)
        output = policy_loss_from_hidden(
            leaves[0], leaves[1], case.target_ids_T, bias_V=leaves[2], settings=chosen,
            full_metrics=full_metrics, **case.inputs,
        )  # fmt: skip
        output.loss.backward()
        logits_TV = case.logits_TV.requires_grad_()
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
    for level in ("token", "sequence"):
        chosen = loss_settings(ratio_level=level, kl_coefficient=0.1)

        def loss(*leaves: torch.Tensor, chosen: PolicyLossSettings = chosen) -> torch.Tensor:
            return policy_loss_from_hidden(
                leaves[0], leaves[1], case.target_ids_T, bias_V=leaves[2], settings=chosen, **inputs
            ).loss

        assert torch.autograd.gradcheck(loss, case.leaves(torch.float64))
