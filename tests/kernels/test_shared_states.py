"""Rows that share hidden states, against autograd in float64 over rows that have copies of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import Case, head_logits, make_case, reference_answer, relative_error

from zppo_kernels import PolicyLossSettings, policy_loss_from_hidden, token_log_probs
from zppo_kernels.backends import using_backend

ROWS, STATES = 29, 11
FLOOR = 8e-6
SETTINGS = {
    "plain": PolicyLossSettings(),
    "corrected": PolicyLossSettings(
        dual_clip=1.5, correction="truncate", kl_coefficient=0.1, temperature=0.7
    ),
    "entropy": PolicyLossSettings(entropy_coefficient=0.05, temperature=1.3),
    "by sequence": PolicyLossSettings(ratio_level="sequence", normalisation="sequence"),
}


def shared_case(seed: int) -> tuple[Case, torch.Tensor]:
    """Rows of eleven hidden states, in no order: one has none, some rows of one state have the
    same target."""
    generator = torch.Generator().manual_seed(seed)
    case = make_case(seed, rows=ROWS)
    hidden_rows_T = torch.randint(STATES - 1, (ROWS,), generator=generator)
    target_ids_T = case.target_ids_T.clone()
    target_ids_T[hidden_rows_T == 3] = 17
    case = replace(case, hidden_TH=case.hidden_TH[:STATES], target_ids_T=target_ids_T)
    return case, hidden_rows_T


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of logits for these few states."""
    monkeypatch.setattr("zppo_kernels.linear_chunks.chunk_rows", lambda *_: 4)


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("head", [(1.0, None), (0.5, 3.0)], ids=["linear", "capped"])
def test_loss_and_gradients_are_those_of_rows_apart(
    backend: str, name: str, head: tuple[float, float | None]
) -> None:
    chosen = SETTINGS[name]
    for seed in range(3):
        case, hidden_rows_T = shared_case(seed)
        oracle, yardstick = (
            reference_answer(case, chosen, dtype, head, hidden_rows_T)
            for dtype in (torch.float64, torch.float32)
        )
        with using_backend(backend):
            leaves = case.leaves(torch.float32)
            output = policy_loss_from_hidden(
                leaves[0], leaves[1], case.target_ids_T, bias_V=leaves[2], settings=chosen,
                full_metrics=True, logit_scale=head[0], soft_cap=head[1],
                hidden_rows_T=hidden_rows_T, **case.inputs,
            )  # fmt: skip
            output.loss.backward()
        for leaf, exact, plain in zip(leaves, oracle.gradients, yardstick.gradients, strict=False):
            assert leaf.grad is not None
            assert relative_error(leaf.grad, exact) <= FLOOR + 3 * relative_error(plain, exact)
        assert output.loss.item() == pytest.approx(oracle.output.loss.item(), rel=1e-5, abs=1e-6)
        for key, value in oracle.output.metrics.items():
            assert float(output.metrics[key]) == pytest.approx(float(value), rel=2e-5, abs=2e-5)
        assert relative_error(output.log_probs_T, oracle.output.log_probs_T) < 1e-5
        assert relative_error(output.entropy_T, oracle.output.entropy_T) < 1e-5


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_rows_that_are_named_but_masked_say_nothing(backend: str) -> None:
    case, hidden_rows_T = shared_case(1)
    assert not case.inputs["mask_T"].all() and (case.target_ids_T == -100).any()
    leaves, apart = case.leaves(torch.float32), case.leaves(torch.float32)
    chosen = {"bias_V": case.bias_V, "live_rows_L": torch.arange(ROWS).flip(0), **case.inputs}
    with using_backend(backend):
        found = policy_loss_from_hidden(
            leaves[0], leaves[1], case.target_ids_T, hidden_rows_T=hidden_rows_T, **chosen
        )
        expected = policy_loss_from_hidden(
            apart[0][hidden_rows_T], apart[1], case.target_ids_T, **chosen
        )
        found.loss.backward()
        expected.loss.backward()
    torch.testing.assert_close(found.log_probs_T, expected.log_probs_T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropy_T, expected.entropy_T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.metrics, expected.metrics, rtol=1e-5, atol=1e-5)
    for one, other in zip(leaves[:2], apart[:2], strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("head", [(1.0, None), (0.5, 3.0)], ids=["linear", "capped"])
def test_log_probs_are_those_of_rows_apart(backend: str, head: tuple[float, float | None]) -> None:
    case, hidden_rows_T = shared_case(5)
    with using_backend(backend):
        found_T, entropy_T = token_log_probs(
            case.hidden_TH, case.weight_VH, case.target_ids_T, bias_V=case.bias_V, temperature=0.7,
            logit_scale=head[0], soft_cap=head[1], hidden_rows_T=hidden_rows_T,
        )  # fmt: skip
    raw_TV = case.hidden_TH.double()[hidden_rows_T] @ case.weight_VH.double().T
    logits_TV = head_logits(raw_TV + case.bias_V.double(), *head)
    log_probs_TV = (logits_TV / 0.7).log_softmax(-1)
    for row, target in enumerate(case.target_ids_T.tolist()):
        expected = 0.0 if target == -100 else float(log_probs_TV[row, target])
        assert float(found_T[row]) == pytest.approx(expected, rel=1e-5, abs=1e-6)
        entropy = float(-(log_probs_TV[row].exp() * log_probs_TV[row]).sum())
        assert float(entropy_T[row]) == pytest.approx(
            0.0 if target == -100 else entropy, rel=1e-5, abs=1e-6
        )


def test_a_first_row_without_probability_says_nothing_of_the_others() -> None:
    hidden_UH, weight_VH = torch.randn(1, 4), torch.randn(6, 4)
    bias_V = torch.zeros(6)
    bias_V[2] = -torch.inf
    targets_T, rows_T = torch.tensor([2, 1, 2, 4]), torch.zeros(4, dtype=torch.int64)
    found_T, _ = token_log_probs(
        hidden_UH, weight_VH, targets_T, bias_V=bias_V, hidden_rows_T=rows_T
    )
    expected_V = (hidden_UH @ weight_VH.T + bias_V).log_softmax(-1)[0]
    torch.testing.assert_close(found_T, expected_V[targets_T])


def test_states_that_do_not_exist_are_refused() -> None:
    case, hidden_rows_T = shared_case(0)
    hidden_rows_T[4] = STATES
    with pytest.raises(ValueError) as error:
        policy_loss_from_hidden(
            case.hidden_TH, case.weight_VH, case.target_ids_T, hidden_rows_T=hidden_rows_T,
            **case.inputs,
        )  # fmt: skip
    assert str(error.value) == (
        f"hidden_rows_T run from {int(hidden_rows_T.min())} to 11; expected rows of hidden_TH, "
        "from 0 to 10"
    )
    with pytest.raises(ValueError) as error:
        policy_loss_from_hidden(
            case.hidden_TH, case.weight_VH, case.target_ids_T, hidden_rows_T=hidden_rows_T[1:],
            **case.inputs,
        )  # fmt: skip
    assert str(error.value) == (
        "target_ids_T has shape (29,); expected (28,), one per row of hidden_rows_T"
    )
