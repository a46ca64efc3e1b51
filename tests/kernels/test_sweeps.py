"""The sweeps of the Triton kernels over rows that lie in every way, far from 0, under a soft cap
and with an entropy term, against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import BACKENDS, relative_error
from torch import Tensor

from zppo_kernels.logit_map import LogitMap
from zppo_kernels.tuning import Tuning, tile_for, using_tuning

needs_interpreter = pytest.mark.skipif(
    "triton" not in BACKENDS, reason="needs TRITON_INTERPRET=1 and Triton"
)
# (offset of the first row, entries beyond the vocabulary) of logits and of their gradient
LIES = {
    "aligned": ((0, "even"), (0, "even")),
    "rotated": ((1, "odd"), (1, "odd")),
    "narrow": ((1, "odd"), (0, "even")),
}


def lying(values_CV: Tensor, offset: int, padding: str) -> Tensor:
    """The same values, `offset` entries into their memory, rows a multiple of 16 bytes apart or
    just not."""
    rows, vocabulary = values_CV.shape
    stride = -(-vocabulary // 4) * 4 + (padding == "odd")
    storage = values_CV.new_full((offset + rows * stride,), torch.nan)
    view_CV = storage[offset:].as_strided((rows, vocabulary), (stride, 1))
    return view_CV.copy_(values_CV)


def final(raw_CV: Tensor, scale: float, cap: float | None, temperature: float) -> Tensor:
    """What the softmax is taken of."""
    logits_CV = raw_CV * scale
    if cap is not None:
        logits_CV = cap * torch.tanh(logits_CV / cap)
    return logits_CV / temperature


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize(
    ("scale", "cap", "shift"), [(1.0, None, 0.0), (0.5, None, 3e4), (1.5, 4.0, 1.0)]
)
def test_statistics_and_gradient(lie: str, scale: float, cap: float | None, shift: float) -> None:
    """Main loop, rest and what comes before the first 16 bytes; logits 30,000 from 0 lose nothing
    but what float32 lost in their sum."""
    from zppo_kernels.rows_triton import TritonRows, lie_of

    for vocabulary in (3, 517, 1031):
        made = torch.Generator().manual_seed(vocabulary)
        raw_CV = (torch.randn(3, vocabulary, generator=made) * 3 + shift).float()
        targets_C = torch.randint(0, vocabulary, (3,), generator=made)
        exact_CV = raw_CV.double().requires_grad_()
        log_probs_CV = torch.log_softmax(final(exact_CV, scale, cap, 0.7), -1)
        picked_C = log_probs_CV.gather(1, targets_C.unsqueeze(1)).squeeze(1)
        entropy_C = -(log_probs_CV.exp() * log_probs_CV).sum(-1)
        weights_C = torch.tensor([1.0, -2.0, 0.0])
        picked_C.mul(weights_C).sum().backward()
        assert exact_CV.grad is not None
        logits_CV, gradient_CV = (lying(raw_CV, *how) for how in LIES[lie])
        if vocabulary > 3:
            assert lie_of(logits_CV, gradient_CV) == lie
        with using_tuning(Tuning(threads=32, vectors=2)):
            backend = TritonRows(LogitMap(scale, cap))
            found_C, found_entropy_C, lse_C = backend.statistics(logits_CV, targets_C, 0.7)
            slopes_C = weights_C / 0.7
            exact_lse_C = final(raw_CV.double(), scale, cap, 0.7).logsumexp(-1)
            assert torch.allclose(lse_C.double(), exact_lse_C, rtol=2e-7, atol=2e-6)
            if shift < 100:
                backend.gradient(logits_CV, lse_C, -slopes_C, targets_C, slopes_C, 0.7, gradient_CV)
                assert relative_error(gradient_CV, exact_CV.grad) < 2e-6
        assert torch.allclose(found_C.double(), picked_C.detach(), atol=4e-6)
        assert torch.allclose(found_entropy_C.double(), entropy_C.detach(), atol=4e-6)


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("cap", [None, 4.0])
def test_gradient_of_log_prob_and_entropy(cap: float | None) -> None:
    """What `policy_kernel` writes where the loss depends on both, with known coefficients; a token
    of -inf has no part in either."""
    from zppo_kernels.rows_triton import TritonRows

    raw_CV = torch.randn(3, 517, generator=torch.Generator().manual_seed(0)) * 3
    if cap is None:
        raw_CV[1, 5] = -torch.inf
    exact_CV = raw_CV.double().clamp(min=-1e5).requires_grad_()  # autograd of -inf is NaN
    log_probs_CV = torch.log_softmax(final(exact_CV, 1.5, cap, 0.7), -1)
    entropy_C = -(log_probs_CV.exp() * log_probs_CV).sum(-1)
    by_log_prob_C, by_entropy_C = torch.tensor([2.0, 2.0, 0.0]), torch.tensor([-3.0, 1.0, 0.0])
    (by_log_prob_C * log_probs_CV[:, 7] + by_entropy_C * entropy_C).sum().backward()
    gradient_CV, ids_C = torch.empty_like(raw_CV), torch.full((3,), 7)
    with using_tuning(Tuning(threads=32, vectors=2)):
        backend = TritonRows(LogitMap(1.5, cap))
        _, found_C, lse_C = backend.statistics(raw_CV, ids_C, 0.7)
        backend.gradient(
            raw_CV, lse_C, (-by_log_prob_C - by_entropy_C * found_C) / 0.7, ids_C,
            by_log_prob_C / 0.7, 0.7, gradient_CV, -by_entropy_C / 0.7,
        )  # fmt: skip
    assert exact_CV.grad is not None
    assert relative_error(gradient_CV, exact_CV.grad) < 2e-6


def test_tiles_fit_the_vocabulary() -> None:
    """16 bytes an access, one entry where rows are narrow, fewer threads where there is less."""
    tuning = Tuning(threads=512, vectors=2)
    shapes = [
        tile_for(151_936, 4, tuning), tile_for(151_936, 2, tuning),
        tile_for(151_936, 4, tuning, rows_read=2), tile_for(151_936, 2, tuning, is_narrow=True),
        tile_for(300, 4, tuning), tile_for(1, 4, tuning),
    ]  # fmt: skip
    assert [(tile.vectors, tile.threads, tile.width) for tile in shapes] == [
        (2, 512, 4), (2, 512, 8), (1, 512, 4), (8, 512, 1), (2, 64, 4), (2, 32, 4),
    ]  # fmt: skip
    assert shapes[0].warps == 16


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"threads": 96}, "threads is 96; expected a power of two from 32 to 1024"),
        ({"vectors": 3}, "vectors is 3; expected 1, 2, 4 or 8"),
        ({"chunk_rows": 0}, "chunk_rows is 0; expected at least 1"),
    ],
)
def test_tuning_says_what_it_takes(wrong: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Tuning(**wrong)
