"""The distillation losses against float64 autograd, at both ends of beta and between, dense and
from a top-k support.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    BACKENDS,
    NUMERIC,
    SLOW_BACKENDS,
    head_logits,
    relative_error,
    top_k_log_probs,
)

from zppo_kernels import (
    jsd_loss_from_hidden,
    jsd_loss_from_logits,
    jsd_loss_top_k_from_hidden,
    jsd_loss_top_k_from_logits,
)
from zppo_kernels.backends import using_backend
from zppo_kernels.jsd_reference import jsd_of_log_probs, teacher_over
from zppo_kernels.tuning import Tuning, using_tuning

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # numpy's, where the GPU is silent
TOKENS = 40


class Problem:
    """Student and teacher heads, the exact losses and their gradients."""

    def __init__(
        self,
        seed: int,
        vocabulary: int,
        teacher: int,
        beta: float,
        temperature: float,
        rows: int = 11,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.student = (normal(rows, 6), normal(vocabulary, 6), normal(vocabulary))
        self.teacher = (normal(rows, 4), 2 * normal(teacher, 4))
        self.mask_T = torch.rand(rows, generator=generator) > 0.2
        self.options = {
            "token_count": TOKENS,
            "mask_T": self.mask_T,
            "beta": beta,
            "temperature": temperature,
        }
        self.beta, self.temperature = beta, temperature
        self.teacher_logits_TW = self.teacher[0] @ self.teacher[1].T
        shared = min(vocabulary, teacher)
        self.values, self.ids = torch.log_softmax(
            self.teacher_logits_TW[:, :shared] / temperature, -1
        ).topk(min(5, shared))
        if self.ids.shape[1] > 2:
            self.ids[::2, -1] = -1  # some rows of the support are shorter

    def leaves(self, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        return [tensor.to(dtype).clone().requires_grad_() for tensor in self.student]

    def exact(self, top_k: bool) -> tuple[float, tuple[torch.Tensor, ...]]:
        leaves = self.leaves(torch.float64)
        logits_TV = leaves[0] @ leaves[1].T + leaves[2]
        if top_k:
            pair = top_k_log_probs(logits_TV, self.ids, self.values, self.temperature)
        else:
            log_q_TV = torch.log_softmax(logits_TV / self.temperature, -1)
            pair = (
                log_q_TV,
                teacher_over(len(leaves[1]), self.teacher_logits_TW.double(), self.temperature),
            )
        loss = torch.where(self.mask_T, jsd_of_log_probs(*pair, self.beta), 0.0).sum() / TOKENS
        return loss.item(), torch.autograd.grad(loss, [*leaves, logits_TV])


def check(problem: Problem, backend: str) -> None:
    for top_k in (False, True):
        loss, gradients = problem.exact(top_k)
        leaves = problem.leaves()
        logits_TV = (
            problem.student[0] @ problem.student[1].T + problem.student[2]
        ).requires_grad_()
        support = (problem.ids, problem.values)
        with using_backend(backend):
            if top_k:
                first = jsd_loss_top_k_from_hidden(
                    leaves[0], leaves[1], *support, student_bias_V=leaves[2], **problem.options
                )
                second = jsd_loss_top_k_from_logits(logits_TV, *support, **problem.options)
            else:
                first = jsd_loss_from_hidden(
                    leaves[0],
                    leaves[1],
                    *problem.teacher,
                    student_bias_V=leaves[2],
                    **problem.options,
                )
                second = jsd_loss_from_logits(
                    logits_TV, problem.teacher_logits_TW, **problem.options
                )
            (first.loss + second.loss).backward()
        for output in (first, second):
            assert output.loss.item() == pytest.approx(loss, rel=2e-5, abs=1e-6)
            assert float(output.metrics["token_count"]) == float(problem.mask_T.sum())
            assert float(output.metrics["jsd_sum"]) == pytest.approx(
                loss * TOKENS, rel=2e-5, abs=1e-5
            )
        for leaf, exact in zip((*leaves, logits_TV), gradients, strict=True):
            assert leaf.grad is not None
            scale = max(1e-3 / TOKENS, float(exact.abs().max()))
            assert float((leaf.grad.double() - exact).abs().max()) <= 5e-5 * scale


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "numba"])
@settings(max_examples=15, **NUMERIC)
@given(
    seed=st.integers(0, 10**6),
    vocabulary=st.sampled_from([7, 64, 333]),
    difference=st.sampled_from([-3, 0, 40]),
    beta=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    temperature=st.sampled_from([1.0, 2.0]),
)
def test_equal_to_the_oracle(
    backend: str, seed: int, vocabulary: int, difference: int, beta: float, temperature: float
) -> None:
    if beta == 1.0 and difference < 0:
        difference = 0  # the reverse KL to a teacher that rules tokens out is infinite
    check(Problem(seed, vocabulary, vocabulary + difference, beta, temperature), backend)


@pytest.mark.slow
@pytest.mark.skipif("triton" not in BACKENDS, reason="needs TRITON_INTERPRET=1 and Triton")
@pytest.mark.parametrize(
    ("vocabulary", "teacher", "beta", "temperature"),
    [(7, 4, 0.0, 1.0), (333, 373, 0.0, 2.0), (333, 330, 0.1, 2.0), (64, 104, 0.5, 1.0),
     (64, 64, 1.0, 1.0), (333, 373, 1.0, 2.0)],
)  # fmt: skip
def test_triton_is_equal_to_the_oracle_under_the_interpreter(
    vocabulary: int, teacher: int, beta: float, temperature: float
) -> None:
    """Both ends of beta and between, each with a teacher that has fewer or more tokens; the tile is
    so small that a row of 333 has several whole ones and a rest."""
    with using_tuning(Tuning(threads=32, vectors=1)):
        check(Problem(2, vocabulary, teacher, beta, temperature, rows=4), "triton")


@pytest.mark.parametrize("backend", SLOW_BACKENDS)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_smaller_chunk_gives_the_same(
    backend: str, beta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zppo_kernels.linear_chunks.chunk_rows", lambda *_: 3)
    check(Problem(1, 50, 50, beta, 1.0), backend)


@pytest.mark.parametrize("backend", SLOW_BACKENDS)
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_tokens_both_sides_rule_out_are_not_nan(backend: str, beta: float) -> None:
    """Where both probabilities underflow or are 0, log(0 / 0) was NaN."""
    student_TV, teacher_TV = torch.zeros(2, 40), torch.zeros(2, 40)
    student_TV[:, :10] = teacher_TV[:, :10] = -torch.inf
    student_TV[:, 10:20] = teacher_TV[:, 10:20] = -300.0
    teacher_TV[:, 20:25] = 1.0
    leaf_TV = student_TV.clone().requires_grad_()
    with using_backend(backend):
        output = jsd_loss_from_logits(leaf_TV, teacher_TV, token_count=2, beta=beta)
        output.loss.backward()
    assert leaf_TV.grad is not None and bool(leaf_TV.grad.isfinite().all())
    smaller = jsd_loss_from_logits(student_TV[:, 20:], teacher_TV[:, 20:], token_count=2, beta=beta)
    assert output.loss.item() == pytest.approx(smaller.loss.item(), rel=1e-5)


@pytest.mark.parametrize("backend", SLOW_BACKENDS)
def test_a_larger_teacher_vocabulary_gives_no_mass_to_tokens_that_do_not_exist(
    backend: str,
) -> None:
    """Padding the student's logits with 0 did."""
    logits_TV = torch.randn(3, 30, generator=torch.Generator().manual_seed(3))
    teacher_TW = torch.cat([logits_TV, torch.full((3, 9), 5.0)], 1)
    with using_backend(backend):
        assert jsd_loss_from_logits(
            logits_TV, teacher_TW, token_count=3
        ).loss.item() == pytest.approx(0.0, abs=1e-6)


def test_the_ends_of_beta_are_the_two_divergences() -> None:
    student_TV, teacher_TV = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[1.0, 0.0, 0.5]])
    log_q, log_t = torch.log_softmax(student_TV, -1), torch.log_softmax(teacher_TV, -1)
    forward, reverse = (log_t.exp() * (log_t - log_q)).sum(), (log_q.exp() * (log_q - log_t)).sum()
    for beta, expected in ((0.0, forward), (1.0, reverse)):
        found = jsd_loss_from_logits(student_TV, teacher_TV, token_count=1, beta=beta).loss
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    half = jsd_loss_from_logits(student_TV, teacher_TV, token_count=1).loss.item()
    assert 0.0 < half <= math.log(2)


def test_a_full_support_is_the_dense_divergence() -> None:
    generator = torch.Generator().manual_seed(4)
    student_TV, teacher_TV = (
        torch.randn(4, 12, generator=generator),
        torch.randn(4, 12, generator=generator),
    )
    values, ids = torch.log_softmax(teacher_TV, -1).sort(-1, descending=True)
    for beta in (0.0, 0.5, 1.0):
        leaves = [student_TV.clone().requires_grad_() for _ in range(2)]
        dense = jsd_loss_from_logits(leaves[0], teacher_TV, token_count=4, beta=beta)
        sparse = jsd_loss_top_k_from_logits(leaves[1], ids, values, token_count=4, beta=beta)
        (dense.loss + sparse.loss).backward()
        assert dense.loss.item() == pytest.approx(sparse.loss.item(), rel=1e-4, abs=1e-6)
        assert leaves[0].grad is not None and leaves[1].grad is not None
        assert relative_error(leaves[1].grad, leaves[0].grad) < 1e-3


def test_errors_say_what_and_where() -> None:
    logits_TV, ids_TK = torch.zeros(2, 5), torch.zeros(2, 3, dtype=torch.int64)
    for call, sentence in (
        (lambda: jsd_loss_from_logits(logits_TV, logits_TV, token_count=2, beta=1.5),
         "beta is 1.5; expected a number in [0, 1]"),
        (lambda: jsd_loss_from_logits(logits_TV, logits_TV, token_count=2, temperature=0.0),
         "temperature is 0.0; expected a finite number above 0"),
        (lambda: jsd_loss_from_logits(logits_TV, logits_TV, token_count=2, mask_T=torch.ones(3)),
         "mask_T has shape (3,); expected (2,)"),
        (lambda: jsd_loss_top_k_from_logits(logits_TV, ids_TK + 5, torch.zeros(2, 3),
        token_count=2),
         "teacher_ids_TK holds 5; expected ids below 5, or -1 for padding"),
        (lambda: jsd_loss_top_k_from_logits(logits_TV, ids_TK[:1], torch.zeros(1, 3),
        token_count=2),
         "teacher_ids_TK has shape (1, 3) and teacher_log_probs_TK (1, 3); expected (2, K) both"),
        (lambda: jsd_loss_top_k_from_logits(logits_TV, ids_TK, torch.zeros(2, 3), token_count=2),
         "teacher_ids_TK holds an id twice in row 0; expected distinct ids"),
        (lambda: jsd_loss_top_k_from_logits(logits_TV, ids_TK != 0, torch.zeros(2, 3), token_count=2),
         "teacher_ids_TK has shape (2, 3) and dtype torch.bool; expected int64 or int32, K >= 1"),
        (lambda: jsd_loss_top_k_from_logits(logits_TV, ids_TK, ids_TK, token_count=2),
         "teacher_log_probs_TK is torch.int64; expected floating point"),
        (lambda: jsd_loss_from_logits(logits_TV, torch.zeros(3, 5), token_count=2),
         "teacher_logits_TW has 3 rows; expected 2, one per row of student_logits_TV"),
        (lambda: jsd_loss_from_logits(logits_TV, logits_TV.to("meta"), token_count=2),
         "teacher_logits_TW is on meta; expected cpu, where student_logits_TV is"),
        (lambda: jsd_loss_from_hidden(logits_TV, torch.zeros(9, 5), logits_TV, torch.zeros(9, 4), token_count=2),
         "teacher_weight_WG has shape (9, 4); expected 5 columns"),
    ):  # fmt: skip
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == sentence


@pytest.mark.parametrize("backend", SLOW_BACKENDS)
@pytest.mark.parametrize("top_k", [False, True])
def test_heads_that_scale_and_cap(backend: str, top_k: bool) -> None:
    """Student and teacher each with their own; gradients by the product behind the cap."""
    problem = Problem(3, 64, 64, 0.3, 1.5)
    exact = problem.leaves(torch.float64)
    logits_TV = head_logits(exact[0] @ exact[1].T + exact[2], 0.8, 4.0)
    teacher_TV = head_logits(problem.teacher_logits_TW.double(), 1.3, 9.0)
    teacher_TV = torch.log_softmax(teacher_TV / 1.5, -1)
    pair = (torch.log_softmax(logits_TV / 1.5, -1), teacher_TV)
    if top_k:
        pair = top_k_log_probs(logits_TV, problem.ids, problem.values, 1.5)
    expected = torch.where(problem.mask_T, jsd_of_log_probs(*pair, 0.3), 0.0).sum() / TOKENS
    expected.backward()
    leaves = problem.leaves()
    student = {"student_bias_V": leaves[2], "student_logit_scale": 0.8, "student_soft_cap": 4.0}
    with using_backend(backend):
        if top_k:
            found = jsd_loss_top_k_from_hidden(
                leaves[0], leaves[1], problem.ids, problem.values, **student, **problem.options
            )
        else:
            found = jsd_loss_from_hidden(
                leaves[0], leaves[1], *problem.teacher, teacher_logit_scale=1.3,
                teacher_soft_cap=9.0, **student, **problem.options,
            )  # fmt: skip
    found.loss.backward()
    assert found.loss.item() == pytest.approx(expected.item(), rel=2e-5)
    for leaf, other in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and other.grad is not None
        assert relative_error(leaf.grad, other.grad) < 5e-5
