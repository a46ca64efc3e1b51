"""Log-probs and entropies against float64: 2e-6 absolute from logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import BACKENDS, NUMERIC, SLOW_BACKENDS, head_logits, make_case

from zppo_kernels import token_log_probs, token_log_probs_from_logits
from zppo_kernels.backends import using_backend
from zppo_kernels.policy_reference import log_probs_reference


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, **NUMERIC)
@given(
    seed=st.integers(0, 10**6),
    vocabulary=st.sampled_from([1, 2, 64, 65, 1000, 4096, 5000, 9001]),
    spread=st.sampled_from([0.1, 3.0, 8.0]),
    offset=st.sampled_from([0.0, 1000.0, -1000.0]),
    temperature=st.sampled_from([1.0, 0.5]),
)
def test_log_probs_from_logits(
    backend: str, seed: int, vocabulary: int, spread: float, offset: float, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_TV = torch.randn(3, vocabulary, generator=generator) * spread + offset
    target_T = torch.randint(vocabulary, (3,), generator=generator)
    with using_backend(backend):
        log_probs_T, entropy_T = token_log_probs_from_logits(
            logits_TV, target_T, temperature=temperature
        )
    exact_TV = torch.log_softmax(logits_TV.double() / temperature, -1)
    exact_T = exact_TV[torch.arange(3), target_T]
    # Absolute near 0, and relative for tokens so unlikely that 2e-6 is below their float32
    # resolution.
    assert bool(((log_probs_T.double() - exact_T).abs() <= 2e-6 + 1.2e-7 * exact_T.abs()).all())
    assert torch.allclose(entropy_T.double(), -(exact_TV.exp() * exact_TV).sum(-1), atol=1e-5)


@pytest.mark.parametrize("backend", SLOW_BACKENDS)
def test_from_hidden_equals_from_logits(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zppo_kernels.linear_chunks.chunk_rows", lambda *_: 5)
    case = make_case(1)
    with using_backend(backend):
        hidden = token_log_probs(
            case.hidden_TH, case.weight_VH, case.target_ids_T, bias_V=case.bias_V, temperature=0.7
        )
        logits = token_log_probs_from_logits(case.logits_TV, case.target_ids_T, temperature=0.7)
    for first, second in zip(hidden, logits, strict=True):
        assert torch.allclose(first, second, atol=5e-6)
        assert float(first[1]) == 0.0, "the row of id -100"


@pytest.mark.parametrize("backend", SLOW_BACKENDS)
@pytest.mark.parametrize("head", [(0.4, None), (1.0, 3.0), (1.5, 8.0)])
def test_a_head_that_scales_or_caps(backend: str, head: tuple[float, float | None]) -> None:
    case = make_case(2)
    with using_backend(backend):
        found = token_log_probs(
            case.hidden_TH, case.weight_VH, case.target_ids_T, bias_V=case.bias_V, temperature=0.7,
            logit_scale=head[0], soft_cap=head[1],
        )  # fmt: skip
    logits_TV = case.hidden_TH.double() @ case.weight_VH.double().T + case.bias_V.double()
    exact = log_probs_reference(head_logits(logits_TV, *head), case.target_ids_T, 0.7)
    for column_T, exact_T in zip(found, exact, strict=True):
        assert torch.allclose(column_T.double(), exact_T, atol=1e-5)


def test_several_threads_give_the_same_rows() -> None:
    """Rows are shared out to threads where there are enough logits."""
    logits_TV = torch.randn(9, 150_000, generator=torch.Generator().manual_seed(2))
    target_T = torch.arange(9)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = token_log_probs_from_logits(logits_TV, target_T)
        torch.set_num_threads(3)
        together = token_log_probs_from_logits(logits_TV, target_T)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(first, second) for first, second in zip(alone, together, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_logits_are_not_hidden() -> None:
    logits_TV = torch.zeros(2, 70)
    logits_TV[0, 3] = torch.nan
    for backend in BACKENDS:
        with using_backend(backend):
            log_probs_T, _ = token_log_probs_from_logits(logits_TV, torch.tensor([5, 5]))
        assert log_probs_T.isnan().tolist() == [True, False], backend
