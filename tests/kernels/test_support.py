"""Rows over a support, on every backend: against autograd in float64 of a log-softmax over logits
that have no probability outside the support, by finite differences, and over the whole vocabulary.

Shapes: T rows, V vocabulary, K ids of a support.
"""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    NUMERIC,
    SLOW_BACKENDS,
    Answer,
    Case,
    make_case,
    reference_answer,
    relative_error,
)
from torch import Tensor

from zppo_kernels import (
    PolicyLossSettings,
    policy_loss_from_hidden,
    policy_loss_from_logits,
    token_log_probs,
    token_log_probs_from_logits,
)
from zppo_kernels.backends import using_backend
from zppo_kernels.policy_inputs import prepare_rows
from zppo_kernels.policy_reference import log_probs_reference, policy_loss_reference

FLOOR = 8e-6
"""As in `test_policy_oracle`."""


def with_supports(case: Case, seed: int, widest: int, whole: float) -> tuple[Case, Tensor]:
    """Supports [T, K] with the target in each, some rows (the share `whole`) over the vocabulary,
    padding anywhere; the case's old log-probs are near those over the supports."""
    generator = torch.Generator().manual_seed(seed)
    rows, vocabulary = case.logits_TV.shape
    support_TK = torch.full((rows, widest), -1)
    for row, target in enumerate(case.target_ids_T.tolist()):
        if target < 0 or float(torch.rand(1, generator=generator)) < whole:
            continue
        size = int(torch.randint(1, widest + 1, (1,), generator=generator))
        others = torch.randperm(vocabulary, generator=generator)[:size]
        ids = torch.cat([torch.tensor([target]), others[others != target]])[:size]
        places = torch.randperm(widest, generator=generator)[: len(ids)]
        support_TK[row, places] = ids
    exact_T, _ = log_probs_reference(masked(case.logits_TV, support_TK), case.target_ids_T)
    noise_T = 0.3 * torch.randn(rows, generator=generator)
    changes: dict[str, Any] = {
        "proximal_log_probs_T": exact_T + noise_T,
        "behaviour_log_probs_T": exact_T + noise_T.flip(0),
        "reference_log_probs_T": exact_T - noise_T,
    }
    return case.with_inputs(**changes), support_TK


def masked(logits_TV: Tensor, support_TK: Tensor) -> Tensor:
    """So low that nothing is left of it, outside the support of each row that has one. (Plain
    autograd makes NaN of the entropy's gradient at minus infinity.)"""
    inside_TV = torch.zeros(logits_TV.shape, dtype=torch.bool)
    for row, ids in enumerate(support_TK.tolist()):
        inside_TV[row, [i for i in ids if i >= 0] or slice(None)] = True
    return torch.where(inside_TV, logits_TV, -1e9)


def oracle(
    case: Case,
    support_TK: Tensor,
    chosen: PolicyLossSettings,
    dtype: torch.dtype,
    soft_cap: float | None = None,
) -> Answer:
    """The plain loss over masked logits, by autograd."""
    inputs = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.inputs.items()
    }
    leaves = case.leaves(dtype)
    logits_TV = leaves[0] @ leaves[1].T + leaves[2]
    if soft_cap is not None:
        logits_TV = soft_cap * torch.tanh(logits_TV / soft_cap)
    rows = prepare_rows(case.target_ids_T, like=logits_TV, settings=chosen, **inputs)
    output = policy_loss_reference(masked(logits_TV, support_TK), rows, chosen)
    return Answer(output, torch.autograd.grad(output.loss, (*leaves, logits_TV)))


def found(case: Case, support_TK: Tensor, chosen: PolicyLossSettings, **more: Any) -> list[Answer]:
    """The fused loss from hidden states, and from logits."""
    leaves = case.leaves(torch.float32)
    more = {"settings": chosen, "support_ids_TK": support_TK, "full_metrics": True, **more}
    first = policy_loss_from_hidden(
        leaves[0], leaves[1], case.target_ids_T, bias_V=leaves[2], **case.inputs, **more
    )
    gradients = torch.autograd.grad(first.loss, leaves)
    logits_TV = case.logits_TV.requires_grad_()
    second = policy_loss_from_logits(logits_TV, case.target_ids_T, **case.inputs, **more)
    return [Answer(first, gradients), Answer(second, torch.autograd.grad(second.loss, logits_TV))]


@pytest.mark.slow
@pytest.mark.parametrize("backend", SLOW_BACKENDS)
@settings(max_examples=8, **NUMERIC)
@given(
    seed=st.integers(0, 999),
    rows=st.integers(1, 16),
    widest=st.sampled_from([1, 2, 7, 33]),
    whole=st.sampled_from([0.0, 0.3, 1.0]),
    level=st.sampled_from(["token", "sequence"]),
    kl=st.sampled_from([0.0, 0.1]),
    entropy=st.sampled_from([0.0, 0.05]),
    temperature=st.sampled_from([0.6, 1.0]),
    first=st.booleans(),
)
def test_loss_metrics_and_gradients_are_those_of_masked_logits(
    backend: str, seed: int, rows: int, widest: int, whole: float, level: str, kl: float,
    entropy: float, temperature: float, first: bool,
) -> None:  # fmt: skip
    """`first`: policy and proximal are the same weights, so that no proximal log-probs are given."""
    case, support_TK = with_supports(make_case(seed, rows=rows), seed, widest, whole)
    chosen = PolicyLossSettings(
        ratio_level=level,  # type: ignore[arg-type]
        kl_coefficient=kl,
        entropy_coefficient=entropy,
        temperature=temperature,
    )
    case = case.with_inputs(proximal_log_probs_T=None) if first else case
    exact = oracle(case, support_TK, chosen, torch.float64)
    plain = oracle(case, support_TK, chosen, torch.float32)
    with using_backend(backend):  # type: ignore[arg-type]
        answers = found(case, support_TK, chosen)
    for answer, gradients in zip(answers, (exact.gradients[:3], exact.gradients[3:]), strict=True):
        limits = [
            FLOOR + 3 * relative_error(yardstick, wanted)
            for yardstick, wanted in zip(plain.gradients, exact.gradients, strict=True)
        ]
        assert float(answer.output.loss.detach()) == pytest.approx(
            float(exact.output.loss.detach()), rel=2e-5, abs=2e-6
        )
        for name, value in exact.output.metrics.items():
            assert float(answer.output.metrics[name]) == pytest.approx(
                float(value), rel=1e-4, abs=1e-4
            ), name
        for gradient, wanted in zip(answer.gradients, gradients, strict=True):
            assert relative_error(gradient, wanted) <= max(limits)
    if whole < 1.0:
        outside_TV = masked(case.logits_TV, support_TK) < -1e8
        assert not answers[1].gradients[0][outside_TV].any()


@pytest.mark.parametrize("backend", SLOW_BACKENDS)
def test_a_soft_cap_is_that_of_the_head(backend: str) -> None:
    case, support_TK = with_supports(make_case(4), 4, 8, 0.2)
    chosen = PolicyLossSettings(entropy_coefficient=0.02)
    exact = oracle(case, support_TK, chosen, torch.float64, soft_cap=3.0)
    leaves = case.leaves(torch.float32)
    with using_backend(backend):  # type: ignore[arg-type]
        output = policy_loss_from_hidden(
            leaves[0], leaves[1], case.target_ids_T, bias_V=leaves[2], support_ids_TK=support_TK,
            settings=chosen, soft_cap=3.0, full_metrics=True, **case.inputs,
        )  # fmt: skip
    for found_one, wanted in zip(
        torch.autograd.grad(output.loss, leaves), exact.gradients, strict=False
    ):
        assert relative_error(found_one, wanted) < 5e-5
    assert relative_error(output.entropy_T, exact.output.entropy_T) < 1e-5


@pytest.mark.parametrize("backend", SLOW_BACKENDS)
def test_log_probs_and_entropy_are_those_of_masked_logits(backend: str) -> None:
    case, support_TK = with_supports(make_case(3), 3, 9, 0.2)
    wanted = log_probs_reference(
        masked(case.logits_TV.double(), support_TK), case.target_ids_T, 0.7
    )
    arguments: dict[str, Any] = {"temperature": 0.7, "support_ids_TK": support_TK}
    with using_backend(backend):  # type: ignore[arg-type]
        pairs = [
            token_log_probs(
                case.hidden_TH, case.weight_VH, case.target_ids_T, bias_V=case.bias_V, **arguments
            ),
            token_log_probs_from_logits(case.logits_TV, case.target_ids_T, **arguments),
        ]
    for pair in pairs:
        for values_T, exact_T in zip(pair, wanted, strict=True):
            assert (values_T.double() - exact_T).abs().max() < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradients_are_those_of_finite_differences(level: str) -> None:
    case, support_TK = with_supports(make_case(1, rows=7, vocabulary=11), 1, 4, 0.2)
    chosen = PolicyLossSettings(ratio_level=level, temperature=0.8)  # type: ignore[arg-type]

    def loss(logits_TV: Tensor) -> Tensor:
        return policy_loss_from_logits(
            logits_TV,
            case.target_ids_T,
            settings=chosen,
            support_ids_TK=support_TK,
            **case.inputs,
        ).loss

    assert torch.autograd.gradcheck(loss, case.logits_TV.double().requires_grad_())


@pytest.mark.parametrize("backend", SLOW_BACKENDS)
def test_a_support_of_the_whole_vocabulary_changes_nothing(backend: str) -> None:
    """Written out id by id it is the plain softmax; a row of -1 stands for it, bit for bit."""
    case, chosen = make_case(5, vocabulary=40), PolicyLossSettings()
    everything_TK = torch.arange(40).repeat(len(case.target_ids_T), 1)
    with using_backend(backend):  # type: ignore[arg-type]
        written = found(case, everything_TK, chosen)
        nothing = found(case, torch.full_like(everything_TK, -1), chosen)
        leaf = case.logits_TV.requires_grad_()
        plain = policy_loss_from_logits(
            leaf, case.target_ids_T, settings=chosen, full_metrics=True, **case.inputs
        )
        (gradient,) = torch.autograd.grad(plain.loss, leaf)
    exact = reference_answer(case, chosen)
    assert relative_error(written[0].gradients[1], exact.gradients[1]) < 1e-4
    assert torch.equal(nothing[1].gradients[0], gradient)
    assert torch.equal(nothing[1].output.loss, plain.loss)


@pytest.mark.parametrize("backend", SLOW_BACKENDS)
def test_half_precision_and_in_place_write_the_same_gradient(backend: str) -> None:
    """bfloat16 gradients lie over the front of their own float32 logits, so the supports must have
    been read before."""
    case, support_TK = with_supports(make_case(7), 7, 5, 0.3)
    chosen = PolicyLossSettings()
    hidden, weight, _ = (leaf.detach().bfloat16() for leaf in case.leaves(torch.float32))
    rounded = Case(hidden.float(), weight.float(), torch.zeros(301), case.target_ids_T, case.inputs)
    exact = oracle(rounded, support_TK, chosen, torch.float64)
    more: dict[str, Any] = {"settings": chosen, "support_ids_TK": support_TK, **case.inputs}
    with using_backend(backend):  # type: ignore[arg-type]
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        policy_loss_from_hidden(*leaves, case.target_ids_T, **more).loss.backward()
        start = rounded.logits_TV.requires_grad_()
        policy_loss_from_logits(start * 1, case.target_ids_T, in_place=True, **more).loss.backward()
    for leaf, wanted in zip(
        (*leaves, start), exact.gradients[:2] + exact.gradients[3:], strict=True
    ):
        assert relative_error(leaf.grad, wanted) < (2e-2 if leaf.dtype == torch.bfloat16 else 1e-4)


@pytest.mark.slow
def test_compiled_it_is_the_same() -> None:
    case, support_TK = with_supports(make_case(2), 2, 6, 0.2)

    def loss(logits_TV: Tensor) -> Tensor:
        return policy_loss_from_logits(
            logits_TV, case.target_ids_T, support_ids_TK=support_TK, **case.inputs
        ).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(case.logits_TV), loss(case.logits_TV))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([3, 301, -1], "ids in [0, 301), or -1"),
        ([3, -2, -1], "ids in [0, 301), or -1"),
        ([3, 4, 3], "each id once"),
        ([4, 5, -1], "the id of its target among them"),
    ],
)
def test_a_support_that_cannot_be_is_refused(row: list[int], expected: str) -> None:
    case = make_case(0, rows=2)
    targets = torch.tensor([3, 3])
    support_TK = torch.tensor([[3, 5, -1], row])
    sentence = f"support_ids_TK[1] is {row}, with the target 3; expected {expected}"
    inputs = case.with_inputs(mask_T=torch.ones(2)).inputs
    for call in (
        lambda: policy_loss_from_logits(
            case.logits_TV, targets, support_ids_TK=support_TK, **inputs
        ),
        lambda: policy_loss_from_hidden(
            case.hidden_TH, case.weight_VH, targets, support_ids_TK=support_TK, **inputs
        ),
        lambda: token_log_probs_from_logits(case.logits_TV, targets, support_ids_TK=support_TK),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            call()


@pytest.mark.parametrize("row", [[3, 301, -1], [3, -2, -1], [4, 5, -1]])
def test_where_values_are_not_read_such_a_row_is_nan_and_nothing_is_out_of_bounds(
    row: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, which would have to be waited for."""
    monkeypatch.setattr("zppo_kernels.support.reads_values", lambda tensor: False)
    case = make_case(0, rows=2)
    support_TK = torch.tensor([[3, 5, -1], row])
    inputs = case.with_inputs(
        mask_T=torch.ones(2), advantages_S=torch.ones(5), behaviour_log_probs_T=None
    ).inputs
    with using_backend("torch"):
        output = policy_loss_from_logits(
            case.logits_TV.requires_grad_(),
            torch.tensor([3, 3]),
            support_ids_TK=support_TK,
            **inputs,
        )
    assert output.log_probs_T.isnan().tolist() == [False, True] and output.loss.isnan()


def test_the_wrong_kind_of_tensor_is_refused() -> None:
    case = make_case(0, rows=2)
    for support_TK, sentence in (
        (torch.zeros(3, 1), "support_ids_TK has shape (3, 1); expected (2, K), K at least 1"),
        (torch.zeros(2, 0), "support_ids_TK has shape (2, 0); expected (2, K), K at least 1"),
        (torch.zeros(2, 1), "support_ids_TK has dtype torch.float32; expected int64 or int32"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            token_log_probs_from_logits(
                case.logits_TV, case.target_ids_T, support_ids_TK=support_TK
            )


def test_a_masked_row_may_hold_anything() -> None:
    case = make_case(0, rows=3)
    mask_T = torch.tensor([True, False, True])
    targets = torch.tensor([3, 4, 5])
    support_TK = torch.tensor([[3, 7], [999, 999], [5, -1]])
    logits_TV = case.logits_TV
    logits_TV[1] = math.nan
    logits_TV.requires_grad_()
    inputs = case.with_inputs(
        mask_T=mask_T,
        advantages_S=torch.ones(5),
        proximal_log_probs_T=torch.zeros(3),
        behaviour_log_probs_T=None,
    ).inputs
    output = policy_loss_from_logits(logits_TV, targets, support_ids_TK=support_TK, **inputs)
    output.loss.backward()
    assert logits_TV.grad is not None and bool(logits_TV.grad.isfinite().all())
    assert torch.count_nonzero(logits_TV.grad[0]) == 2 and not logits_TV.grad[1].any()
