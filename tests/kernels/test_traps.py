"""Known bugs of other libraries, one test each: what went wrong there must not go wrong here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_cases import (
    INTERPRETED,
    SLOW_BACKENDS,
    Case,
    make_case,
    reference_answer,
    relative_error,
)

from zppo_kernels import (
    PolicyLossOutput,
    PolicyLossSettings,
    combine_metrics,
    jsd_loss_top_k_from_logits,
    policy_loss_from_hidden,
    policy_loss_from_logits,
    token_log_probs,
    token_log_probs_from_logits,
)
from zppo_kernels.backends import using_backend
from zppo_kernels.linear_chunks import logit_chunks
from zppo_kernels.projection import Projection, chunk_rows

pytestmark = [
    pytest.mark.parametrize("backend", SLOW_BACKENDS),
    pytest.mark.filterwarnings(
        "ignore:invalid value encountered:RuntimeWarning"
    ),  # numpy, where the GPU is silent
]
DEFAULT = PolicyLossSettings()


def loss_of(
    case: Case, backend: str, settings: PolicyLossSettings = DEFAULT, **changes: object
) -> tuple[PolicyLossOutput, tuple[torch.Tensor, ...]]:
    leaves = case.leaves(torch.float32)
    with using_backend(backend):
        output = policy_loss_from_hidden(
            leaves[0],
            leaves[1],
            case.target_ids_T,
            bias_V=leaves[2],
            settings=settings,
            **case.inputs,
            **changes,
        )
    return output, leaves


@pytest.mark.parametrize("vocabulary", [1, 31, 33, 1025])
def test_vocabulary_tail_is_not_counted(backend: str, vocabulary: int) -> None:
    """Padded columns in the log-sum-exp raised log-probs by up to 124 (a vocabulary that no tile
    divides)."""
    logits_TV = torch.full((3, vocabulary), -30.0)
    with using_backend(backend):
        log_probs_T, entropy_T = token_log_probs_from_logits(
            logits_TV, torch.zeros(3, dtype=torch.int64)
        )
    expected = -torch.log(torch.tensor(float(vocabulary)))
    assert torch.allclose(log_probs_T, expected.expand(3), atol=2e-6)
    assert torch.allclose(entropy_T, -expected.expand(3), atol=2e-6)


def test_rows_beyond_two_to_the_31_elements(backend: str) -> None:
    """An int32 row * stride wraps at 2^31 elements. The rows of this 4 GB tensor lie 2^30 apart;
    its pages are never touched.
    """
    storage = torch.empty(2**31 + 64, dtype=torch.float16)
    logits_TV = storage.as_strided((3, 64), (2**30, 1))
    logits_TV.copy_(torch.randn(3, 64, generator=torch.Generator().manual_seed(0)))
    with using_backend(backend):
        log_probs_T, _ = token_log_probs_from_logits(logits_TV, torch.tensor([1, 2, 3]))
    exact_TV = torch.log_softmax(logits_TV.double(), -1)
    assert torch.allclose(
        log_probs_T.double(), exact_TV[torch.arange(3), torch.tensor([1, 2, 3])], atol=2e-6
    )


@pytest.mark.parametrize("block", [slice(0, 2048), slice(4000, 6000), slice(0, 5999)])
def test_minus_infinity_logits_are_impossible_tokens(backend: str, block: slice) -> None:
    """exp(-inf - -inf) in a first block of -inf, and 0 * -inf in the entropy, gave NaN."""
    logits_TV = torch.randn(2, 6000, generator=torch.Generator().manual_seed(0))
    logits_TV[:, block] = -torch.inf
    target_T = torch.full((2,), 0 if block == slice(4000, 6000) else 5999)
    with using_backend(backend):
        log_probs_T, entropy_T = token_log_probs_from_logits(logits_TV, target_T)
        leaf_TV = logits_TV.clone().requires_grad_()
        policy_loss_from_logits(
            leaf_TV, target_T, sequence_ids_T=torch.tensor([0, 1]), advantages_S=torch.tensor([1.0,
            -1.0]), proximal_log_probs_T=log_probs_T, token_count=2,
        ).loss.backward()  # fmt: skip
    exact_TV = torch.log_softmax(logits_TV.double(), -1)
    assert torch.allclose(log_probs_T.double(), exact_TV[:, int(target_T[0])], atol=2e-6)
    expected_T = -torch.where(exact_TV.isneginf(), 0.0, exact_TV.exp() * exact_TV).sum(-1)
    assert torch.allclose(entropy_T.double(), expected_T, atol=5e-6)
    assert leaf_TV.grad is not None and bool(leaf_TV.grad.isfinite().all())
    assert not bool(leaf_TV.grad[:, block].abs().gt(1e-30).any()) or block == slice(0, 5999)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("gap", [200.0, -200.0])
def test_clipped_branch_is_never_zero_times_infinity(
    backend: str, advantage: float, gap: float
) -> None:
    """exp overflowed in the branch that the clip did not choose; autograd made NaN of 0 * inf."""
    case = make_case(1)
    proximal_T = case.inputs["proximal_log_probs_T"] - gap
    advantages_S = torch.full_like(case.inputs["advantages_S"], advantage)
    case = case.with_inputs(
        proximal_log_probs_T=proximal_T, behaviour_log_probs_T=None, advantages_S=advantages_S
    )
    for dual_clip in (10.0, None):
        output, leaves = loss_of(case, backend, dataclasses.replace(DEFAULT, dual_clip=dual_clip))
        output.loss.backward()
        assert bool(output.loss.isfinite())
        assert all(bool(leaf.grad.isfinite().all()) for leaf in leaves)


def test_zero_advantage_with_infinite_ratio_is_zero(backend: str) -> None:
    """0 * inf made the loss itself NaN."""
    case = make_case(2)
    case = case.with_inputs(
        advantages_S=torch.zeros(5),
        proximal_log_probs_T=torch.full_like(case.inputs["proximal_log_probs_T"], -torch.inf),
    )
    output, leaves = loss_of(case, backend, full_metrics=True)
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert all(float(leaf.grad.abs().max()) == 0.0 for leaf in leaves)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_unusable_behaviour_log_prob_drops_the_token(backend: str, bad: float) -> None:
    """A behaviour log-prob that is not finite leaves its token out of the loss, and is counted."""
    case = make_case(3)
    behaviour_T = case.inputs["proximal_log_probs_T"].clone()
    behaviour_T[4:9] = bad
    mask_T = torch.ones_like(case.inputs["mask_T"])
    with_bad, _ = loss_of(
        case.with_inputs(behaviour_log_probs_T=behaviour_T, mask_T=mask_T), backend
    )
    mask_T = mask_T.clone()
    mask_T[4:9] = False
    without, _ = loss_of(
        case.with_inputs(behaviour_log_probs_T=behaviour_T, mask_T=mask_T), backend
    )
    assert with_bad.loss.item() == pytest.approx(without.loss.item(), rel=1e-6)
    assert float(with_bad.metrics["behaviour_dropped_count"]) == 5


def test_label_entry_survives_a_nearly_certain_token(backend: str) -> None:
    """p - 1 rounded before the label was subtracted erased the gradient of tokens that are almost
    certain."""
    logits_TV = torch.zeros(1, 64)
    logits_TV[0, 7] = 14.0
    exact_TV = logits_TV.double().requires_grad_()
    (-torch.log_softmax(exact_TV, -1)[0, 7]).backward()
    leaf_TV = logits_TV.clone().requires_grad_()
    with using_backend(backend):
        policy_loss_from_logits(
            leaf_TV, torch.tensor([7]), sequence_ids_T=torch.tensor([0]),
            advantages_S=torch.ones(1), proximal_log_probs_T=torch.log_softmax(logits_TV, -1)[:, 7],
            token_count=1,
        ).loss.backward()  # fmt: skip
    assert leaf_TV.grad is not None and exact_TV.grad is not None
    assert float(leaf_TV.grad[0, 7]) == pytest.approx(float(exact_TV.grad[0, 7]), rel=5e-3)
    assert float(exact_TV.grad[0, 7]) != 0.0


def test_weight_gradient_is_summed_in_float32_over_chunks(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Summed in bf16 its error grew sevenfold over 1,024 chunks."""
    case = make_case(4, rows=64, vocabulary=40)
    hidden_TH, weight_VH = case.hidden_TH.bfloat16(), case.weight_VH.bfloat16()
    exact = reference_answer(
        dataclasses.replace(case, hidden_TH=hidden_TH, weight_VH=weight_VH), DEFAULT
    ).gradients[1]
    errors = []
    for size in (64, 1):
        monkeypatch.setattr("zppo_kernels.linear_chunks.chunk_rows", lambda *_, size=size: size)
        leaf_VH = weight_VH.clone().requires_grad_()
        with using_backend(backend):
            policy_loss_from_hidden(
                hidden_TH, leaf_VH, case.target_ids_T, bias_V=case.bias_V, **case.inputs
            ).loss.backward()
        assert leaf_VH.grad is not None
        errors.append(relative_error(leaf_VH.grad, exact))
    assert errors[1] <= 1.01 * errors[0] + 1e-6


def test_micro_batches_add_to_the_whole(backend: str) -> None:
    """Per-micro-batch means drifted from the mean over all tokens: with the global count, losses
    and gradients just add.
    """
    case = make_case(5)
    whole, leaves = loss_of(case, backend, full_metrics=True)
    whole.loss.backward()
    total, parts, pieces = 0.0, case.leaves(torch.float32), []
    for part in (slice(0, 3), slice(3, 4), slice(4, 29)):
        inputs = {
            name: value[part] if isinstance(value, torch.Tensor) and len(value) == 29 else value
            for name, value in case.inputs.items()
        }
        with using_backend(backend):
            output = policy_loss_from_hidden(
                parts[0][part],
                parts[1],
                case.target_ids_T[part],
                bias_V=parts[2],
                full_metrics=True,
                **inputs,
            )
        output.loss.backward()
        total += output.loss.item()
        pieces.append(output.metrics)
    assert total == pytest.approx(whole.loss.item(), rel=1e-5, abs=1e-7)
    for part_leaf, leaf in zip(parts, leaves, strict=True):
        assert relative_error(part_leaf.grad, leaf.grad) < 1e-5
    for name, value in combine_metrics(pieces).items():
        assert float(value) == pytest.approx(float(whole.metrics[name]), rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_enters_the_gradient_once(backend: str, temperature: float) -> None:
    """The chain rule's 1/T was forgotten or applied twice."""
    chosen = PolicyLossSettings(temperature=temperature, correction="none")
    case = make_case(6)
    output, leaves = loss_of(case, backend, chosen)
    output.loss.backward()
    for leaf, exact in zip(leaves, reference_answer(case, chosen).gradients, strict=False):
        assert relative_error(leaf.grad, exact) < 1e-5


def test_backward_twice_over_a_retained_graph(backend: str) -> None:
    """Gradients scaled in place were wrong the second time."""
    plain, unscaled = loss_of(make_case(7), backend)
    plain.loss.backward()
    output, leaves = loss_of(make_case(7), backend)
    (output.loss * 2.0).backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    assert all(
        torch.equal(first, 2 * leaf.grad) for first, leaf in zip(once, unscaled, strict=True)
    )
    (output.loss * 2.0).backward()
    assert all(torch.equal(leaf.grad, 2 * first) for leaf, first in zip(leaves, once, strict=True))


def test_in_place_gradient_is_given_out_once(backend: str) -> None:
    case = make_case(7)
    leaf_TV = case.logits_TV.requires_grad_()
    with using_backend(backend):
        output = policy_loss_from_logits(
            leaf_TV * 1.0, case.target_ids_T, in_place=True, **case.inputs
        )
        output.loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="use in_place=False to run backward twice"):
            output.loss.backward()


def test_in_place_logits_cannot_be_used_by_another_backward(backend: str) -> None:
    """Whoever saved the logits hears of it, instead of differentiating with the gradient in their
    place."""
    case = make_case(7)
    leaf_TV = case.logits_TV.requires_grad_()
    logits_TV = leaf_TV * 1.0
    other = logits_TV.square().sum()
    with using_backend(backend):
        loss = policy_loss_from_logits(
            logits_TV, case.target_ids_T, in_place=True, **case.inputs
        ).loss
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (loss + other).backward()


def test_second_derivative_is_refused(backend: str) -> None:
    """It would silently be 0."""
    output, leaves = loss_of(make_case(8), backend)
    with pytest.raises(RuntimeError, match="policy_loss_from_hidden has no second derivative"):
        torch.autograd.grad(output.loss, leaves[0], create_graph=True)


def test_without_gradient_nothing_is_allocated_for_one(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation path allocated weight and hidden gradients."""
    made: list[tuple[int, ...]] = []
    original = torch.empty

    def spy(*size: object, **options: object) -> torch.Tensor:
        result: torch.Tensor = original(*size, **options)
        made.append(tuple(result.shape))
        return result

    case = make_case(9, rows=40, hidden=50, vocabulary=700)
    monkeypatch.setattr(torch, "empty", spy)
    with torch.no_grad():
        output, _ = loss_of(case, backend)
    assert not output.loss.requires_grad
    assert (700, 50) not in made and (40, 50) not in made
    token_log_probs(case.hidden_TH, case.weight_VH, case.target_ids_T)
    assert (700, 50) not in made and (40, 50) not in made
    made.clear()
    output, _ = loss_of(case, backend)
    assert (700, 50) in made, "the spy sees the weight gradient where one is wanted"


def test_ignored_rows_return_zero(backend: str) -> None:
    """Rows of label -100 returned uninitialised memory."""
    case = make_case(10)
    target_ids_T = torch.full_like(case.target_ids_T, -100)
    with using_backend(backend):
        for log_probs_T, entropy_T in (
            token_log_probs(case.hidden_TH, case.weight_VH, target_ids_T),
            token_log_probs_from_logits(case.logits_TV, target_ids_T),
        ):
            assert float(log_probs_T.abs().max()) == float(entropy_T.abs().max()) == 0.0


@pytest.mark.parametrize("normalisation", ["token", "sequence"])
def test_all_masked_batch_has_loss_and_gradient_zero(backend: str, normalisation: str) -> None:
    """The denominator was 0."""
    case = make_case(11)
    case = case.with_inputs(mask_T=torch.zeros(29), token_count=0, sequence_count=0)
    output, leaves = loss_of(
        case, backend, PolicyLossSettings(normalisation=normalisation), full_metrics=True
    )
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert all(float(leaf.grad.abs().max()) == 0.0 for leaf in leaves)
    assert all(float(value) == 0.0 for value in output.metrics.values())


@pytest.mark.slow
def test_more_than_65535_rows(backend: str) -> None:
    """A launch with the rows on the grid's y axis ended at 65,535."""
    rows = 65_537 if backend != "triton" else 65_536 // 512
    case = make_case(12, rows=rows, hidden=2, vocabulary=5, sequences=3)
    output, leaves = loss_of(case, backend)
    output.loss.backward()
    assert relative_error(leaves[1].grad, reference_answer(case, DEFAULT).gradients[1]) < 1e-4


def test_no_rows_at_all(backend: str) -> None:
    case = make_case(13, rows=1)
    empty = Case(
        case.hidden_TH[:0], case.weight_VH, case.bias_V, case.target_ids_T[:0],
        {name: value[:0] if name.endswith("_T") else value for name, value in case.inputs.items()},
    )  # fmt: skip
    output, leaves = loss_of(empty, backend)
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert leaves[0].grad.shape == (0, 12) and float(leaves[1].grad.abs().max()) == 0.0


def test_importance_weight_is_logged_before_truncation(backend: str) -> None:
    case = make_case(14)
    behaviour_T = case.inputs["proximal_log_probs_T"] - 3.0
    case = case.with_inputs(behaviour_log_probs_T=behaviour_T)
    output, _ = loss_of(case, backend)
    assert float(output.metrics["importance_weight_max"]) == pytest.approx(torch.e**3, rel=1e-4)
    assert float(output.metrics["importance_capped_count"]) == float(
        output.metrics["importance_weight_count"]
    )


def test_zero_advantage_rows_never_reach_the_lm_head(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their gradient is exactly 0 and known beforehand; the denominator still counts them."""
    seen: list[int] = []

    def spy(
        head: Projection, hidden_LH: torch.Tensor
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        seen.append(len(hidden_LH))
        return logit_chunks(head, hidden_LH)

    monkeypatch.setattr("zppo_kernels.linear_chunks.logit_chunks", spy)
    case = make_case(15)
    output, leaves = loss_of(case, backend)
    output.loss.backward()
    live = float(output.metrics["live_token_count"])
    assert seen == [live] and live < 29
    assert chunk_rows(29, 301, torch.device("cpu")) == 29
    assert relative_error(leaves[1].grad, reference_answer(case, DEFAULT).gradients[1]) < 1e-5


def test_live_rows_may_come_from_the_caller(backend: str) -> None:
    case = make_case(16)
    live_T = case.inputs["mask_T"] & (case.target_ids_T != -100)
    live_T &= case.inputs["advantages_S"][case.inputs["sequence_ids_T"]] != 0
    ours, _ = loss_of(case, backend)
    theirs, _ = loss_of(case, backend, live_rows_L=live_T.nonzero().squeeze(1))
    assert ours.loss.item() == theirs.loss.item()


def test_live_rows_come_in_any_order(backend: str) -> None:
    """All rows in another order were taken as they lie, and their log-probs given to others."""
    case = make_case(17)
    case.inputs["advantages_S"] = case.inputs["advantages_S"].abs() + 0.5
    ours, leaves = loss_of(case, backend)
    order_L = torch.randperm(29, generator=torch.Generator().manual_seed(0))
    theirs, others = loss_of(case, backend, live_rows_L=order_L)
    chosen_T = case.inputs["mask_T"] & (case.target_ids_T != -100)
    assert torch.equal(ours.log_probs_T[chosen_T], theirs.log_probs_T[chosen_T])
    assert torch.equal(ours.entropy_T[chosen_T], theirs.entropy_T[chosen_T])
    (ours.loss + theirs.loss).backward()
    assert torch.allclose(leaves[0].grad, others[0].grad, rtol=1e-5, atol=1e-8)


def test_a_narrow_gradient_fits_into_its_own_logits(backend: str) -> None:
    """On a GPU the bf16 gradient overwrites the float32 logits it is made of; float16 stands in for
    bf16 here."""
    if backend != "triton":
        pytest.skip("only the Triton kernels write a narrower gradient")
    assert INTERPRETED
    from zppo_kernels.rows_triton import TritonRows

    logits_CV = torch.randn(3, 9000, generator=torch.Generator().manual_seed(1))
    expected_CV = torch.softmax(logits_CV.double(), -1) * 100.0
    lse_C = torch.logsumexp(logits_CV, -1)
    narrow_CV = logits_CV.view(torch.float16).as_strided((3, 9000), (18000, 1))
    hundred_C, zeros_C, target_C = (
        torch.full((3,), 100.0),
        torch.zeros(3),
        torch.zeros(3, dtype=torch.int64),
    )
    TritonRows().gradient(logits_CV, lse_C, hundred_C, target_C, zeros_C, 1.0, narrow_CV)
    assert relative_error(narrow_CV, expected_CV) < 1e-3


def test_autocast_rounds_the_operands_of_the_products_and_nothing_else(backend: str) -> None:
    """As in Liger, TRL and any model under autocast the head's products are taken in bf16; logits,
    loss and gradients stay float32, and hidden states may be bf16 beside a float32 head."""
    case = make_case(20)
    rounded = dataclasses.replace(
        case,
        **{name: getattr(case, name).bfloat16().float() for name in ("hidden_TH", "weight_VH")},
    )
    exact = reference_answer(rounded, DEFAULT)
    with torch.autocast("cpu", torch.bfloat16):
        cast, leaves = loss_of(case, backend)
        mixed = dataclasses.replace(case, hidden_TH=case.hidden_TH.bfloat16())
        with using_backend(backend):
            other = policy_loss_from_hidden(
                mixed.hidden_TH, case.weight_VH, case.target_ids_T, bias_V=case.bias_V,
                **case.inputs,
            )  # fmt: skip
            found_T, _ = token_log_probs(
                mixed.hidden_TH, case.weight_VH, case.target_ids_T, bias_V=case.bias_V
            )
    assert cast.loss.item() == pytest.approx(other.loss.item(), rel=1e-6)
    assert cast.loss.item() == pytest.approx(exact.output.loss.item(), rel=1e-5)
    live_T = exact.output.log_probs_T != 0
    assert relative_error(found_T[live_T], exact.output.log_probs_T[live_T]) < 1e-5
    gradients = torch.autograd.grad(cast.loss, leaves)
    for gradient, expected in zip(gradients, exact.gradients, strict=False):
        assert gradient.dtype == torch.float32
        assert relative_error(gradient, expected) < 2**-8  # dH and dW of bf16 gradients


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: no operator looks at the values of ids, which would mean waiting for the
    device."""
    for module in ("policy_inputs", "jsd_inputs"):
        monkeypatch.setattr(f"zppo_kernels.{module}.reads_values", lambda _: False)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("wrong", [-1, 5, 2**40])
@pytest.mark.usefixtures("unread")
def test_a_sequence_that_does_not_exist_is_nan_and_not_read(
    backend: str, level: Any, wrong: int
) -> None:
    """The advantage was read out of bounds; a row of the mask may name any sequence."""
    case = make_case(17, rows=9)
    ids_T, row = case.inputs["sequence_ids_T"].clone(), int(case.inputs["mask_T"].nonzero()[-1])
    masked_T = ~case.inputs["mask_T"] | (case.target_ids_T == -100)
    ids_T[masked_T] = wrong
    for normalisation in ("token", "sequence"):
        settings = PolicyLossSettings(ratio_level=level, normalisation=normalisation)
        fine, _ = loss_of(case.with_inputs(sequence_ids_T=ids_T), backend, settings)
        assert fine.loss.item() == pytest.approx(
            reference_answer(case, settings).output.loss.item(), rel=1e-5
        )
        bad_T = ids_T.clone()
        bad_T[row] = wrong
        output, _ = loss_of(case.with_inputs(sequence_ids_T=bad_T), backend, settings)
        assert output.loss.isnan()
        leaf_TV = case.logits_TV.requires_grad_()
        with using_backend(backend):
            other = policy_loss_from_logits(
                leaf_TV,
                case.target_ids_T,
                settings=settings,
                **(case.inputs | {"sequence_ids_T": bad_T}),
            )
        assert other.loss.isnan()


@pytest.mark.usefixtures("unread")
def test_a_token_that_does_not_exist_is_nan_and_not_read(backend: str) -> None:
    """An id of -1 got the log-prob of token 0; only -100 takes a row out."""
    if backend == "numba":
        pytest.skip("numba runs on CPUs alone, where ids are always looked at")
    case = make_case(18)
    for wrong in (-1, -99, 301, 2**40):
        ids_T = torch.tensor([3, wrong, -100])
        with using_backend(backend):
            for log_probs_T, _ in (
                token_log_probs(case.hidden_TH[:3], case.weight_VH, ids_T),
                token_log_probs_from_logits(case.logits_TV[:3], ids_T),
            ):
                assert (
                    log_probs_T.isnan().tolist() == [False, True, False]
                    and float(log_probs_T[2]) == 0.0
                )
            leaf_TV = case.logits_TV[:3].clone().requires_grad_()
            loss = policy_loss_from_logits(
                leaf_TV, ids_T, sequence_ids_T=torch.zeros(3, dtype=torch.int64), advantages_S=torch.ones(1),
                proximal_log_probs_T=torch.zeros(3), token_count=3,
            ).loss  # fmt: skip
        assert loss.isnan()


@pytest.mark.usefixtures("unread")
def test_a_teachers_token_that_does_not_exist_is_nan_and_not_read(backend: str) -> None:
    logits_TV = make_case(19).logits_TV[:2]
    ids_TK = torch.tensor([[3, 301], [2**40, -1]])
    with using_backend(backend):
        for mask_T in ([True, False], [False, True], [False, False]):
            output = jsd_loss_top_k_from_logits(
                logits_TV,
                ids_TK,
                torch.full((2, 2), -2.0),
                token_count=2,
                mask_T=torch.tensor(mask_T),
            )
            assert bool(output.loss.isnan()) == any(mask_T)
