"""Any layout of any argument: a loss depends on the values of its tensors alone, never on strides,
offsets, neighbours.

Each argument is laid out at random among memory that must not be read (NaN, ids out of range); the
oracle is float64 autograd over fresh contiguous copies. Rows that are masked hold values that must
not be read either.

Shapes: T rows, H hidden, V vocabulary, W teacher vocabulary, K teacher support, R rollouts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    BACKENDS,
    NUMERIC,
    Case,
    make_case,
    reference_answer,
    relative_error,
    top_k_log_probs,
)
from torch import Tensor

from zppo_kernels import (
    PolicyLossSettings,
    group_advantages,
    jsd_loss_from_hidden,
    jsd_loss_from_logits,
    jsd_loss_top_k_from_hidden,
    jsd_loss_top_k_from_logits,
    policy_loss_from_hidden,
    policy_loss_from_logits,
    token_log_probs,
    token_log_probs_from_logits,
)
from zppo_kernels.backends import using_backend
from zppo_kernels.jsd_reference import jsd_of_log_probs, teacher_over
from zppo_kernels.policy_reference import log_probs_reference

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, where the GPU is silent
    pytest.mark.parametrize("backend", BACKENDS),
]


def junk(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory that nobody may read: NaN, True, or an id far out of range."""
    if like.dtype == torch.bool:
        return torch.ones(shape, dtype=torch.bool)
    return torch.full(shape, math.nan if like.is_floating_point() else 2**30, dtype=like.dtype)


def strided(values: Tensor) -> Tensor:
    """Every second entry along the last dimension."""
    wide = junk((*values.shape[:-1], 2 * values.shape[-1]), values)
    view = wide[..., ::2]
    return view.copy_(values)


def padded(values: Tensor) -> Tensor:
    """The middle of wider rows: unit columns, an offset, and row starts that no vector load is
    aligned to."""
    view = junk((*values.shape[:-1], values.shape[-1] + 5), values)[..., 3 : 3 + values.shape[-1]]
    return view.copy_(values)


def sparse_rows(values: Tensor) -> Tensor:
    """Every third entry along the first dimension."""
    view = junk((3 * len(values), *values.shape[1:]), values)[1::3]
    return view.copy_(values)


def transposed(values: Tensor) -> Tensor:
    """Unit stride along the first dimension; a vector becomes a column of a matrix."""
    if values.dim() == 2:
        return values.T.contiguous().T
    view = junk((len(values), 3), values)[:, 1]
    return view.copy_(values)


LAYOUTS: list[Callable[[Tensor], Tensor]] = [torch.clone, strided, padded, sparse_rows, transposed]


@dataclasses.dataclass(frozen=True)
class Draw:
    """One layout for each argument in turn, and a dtype for those that may have several."""

    choices: tuple[int, ...]

    def layout(self, index: int) -> Callable[[Tensor], Tensor]:
        """The layout of the argument with this number."""
        return LAYOUTS[self.choices[index] % len(LAYOUTS)]

    def all(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The same arguments, each tensor laid out in its own way."""
        return {
            name: self.layout(index)(value) if isinstance(value, Tensor) and value.dim() else value
            for index, (name, value) in enumerate(sorted(arguments.items()))
        }

    def pick(self, index: int, dtypes: tuple[torch.dtype, ...]) -> torch.dtype:
        """One of these dtypes."""
        return dtypes[self.choices[-1 - index] % len(dtypes)]


DRAWS = st.lists(st.integers(0, 59), min_size=16, max_size=16).map(
    lambda choices: Draw(tuple(choices))
)
SIZES = {
    "seed": st.integers(0, 10**6),
    "rows": st.integers(1, 9),
    "vocabulary": st.sampled_from([1, 2, 17, 64, 130]),
}
LOSS = PolicyLossSettings(dual_clip=1.5, kl_coefficient=0.1, temperature=0.7)
CHOSEN = [
    LOSS,
    dataclasses.replace(LOSS, ratio_level="sequence", normalisation="sequence", correction="mask"),
]


def policy_case(draw: Draw, seed: int, rows: int, vocabulary: int) -> tuple[Case, Case]:
    """A problem, and the same one with values that must not be read in all rows that are masked."""
    clean = make_case(seed, rows=rows, vocabulary=vocabulary, hidden=5)
    mask_T = clean.inputs["mask_T"] & (clean.target_ids_T != -100)
    kinds = {
        "proximal_log_probs_T": draw.pick(0, (torch.float32, torch.float64, torch.float16)),
        "behaviour_log_probs_T": draw.pick(1, (torch.float32, torch.float16, torch.float64)),
        "reference_log_probs_T": draw.pick(2, (torch.float64, torch.float32, torch.bfloat16)),
        "advantages_S": draw.pick(3, (torch.float32, torch.float64, torch.float16)),
        "sequence_ids_T": draw.pick(4, (torch.int64, torch.int32)),
    }
    inputs = clean.inputs | {name: clean.inputs[name].to(dtype) for name, dtype in kinds.items()}
    dirty = dict(inputs)
    for name in (
        "proximal_log_probs_T",
        "behaviour_log_probs_T",
        "reference_log_probs_T",
        "sequence_ids_T",
    ):
        dirty[name] = spoilt(inputs[name], mask_T)
    dirty["mask_T"] = inputs["mask_T"].to(draw.pick(5, (torch.bool, torch.int64, torch.float32)))
    hidden_TH = spoilt(clean.hidden_TH, mask_T)
    return dataclasses.replace(clean, inputs=inputs), dataclasses.replace(
        clean, inputs=dirty, hidden_TH=hidden_TH
    )


def spoilt(values_T: Tensor, mask_T: Tensor) -> Tensor:
    """Junk in the rows that are masked."""
    mask = mask_T.unsqueeze(1).expand(values_T.shape) if values_T.dim() == 2 else mask_T
    return torch.where(mask, values_T, junk(tuple(values_T.shape), values_T))


def check(found: Tensor | None, exact: Tensor, dtype: torch.dtype, what: str) -> None:
    """Values within the rounding of `dtype`, and a plain contiguous gradient."""
    assert found is not None and found.dtype == dtype and found.shape == exact.shape, what
    assert found.is_contiguous(), f"{what} is not contiguous"
    allowed = {torch.float64: 1e-9, torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[
        dtype
    ]
    scale = max(float(exact.abs().max()), 1e-3)
    assert float((found.double() - exact).abs().max()) <= allowed * scale, what


def logits_dtype(draw: Draw, backend: str) -> torch.dtype:
    """float64 where torch runs; bf16 where the interpreter, which gets it wrong, does not."""
    known = {
        "torch": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
        "numba": (torch.float32, torch.bfloat16, torch.float16),
        "triton": (torch.float32, torch.float16),
    }
    return draw.pick(6, known[backend])


def exact_of_logits(
    values_TV: Tensor, clean: Case, chosen: PolicyLossSettings
) -> tuple[float, Any, Tensor]:
    """Loss, metrics and gradient by the logits in float64; the logits stand in as hidden states of
    an identity head."""
    vocabulary = values_TV.shape[1]
    head = torch.eye(vocabulary).double(), torch.zeros(vocabulary).double()
    answer = reference_answer(
        Case(values_TV.double(), *head, clean.target_ids_T, clean.inputs), chosen
    )
    return answer.output.loss.item(), answer.output.metrics, answer.gradients[3]


@pytest.mark.slow
@settings(max_examples=20, **NUMERIC)
@given(draw=DRAWS, chosen=st.sampled_from(CHOSEN), **SIZES)
def test_policy_loss_from_logits(
    backend: str, draw: Draw, chosen: PolicyLossSettings, seed: int, rows: int, vocabulary: int
) -> None:
    clean, dirty = policy_case(draw, seed, rows, vocabulary)
    dtype = logits_dtype(draw, backend)
    values_TV = clean.logits_TV.to(dtype)
    loss, metrics, exact_TV = exact_of_logits(values_TV, clean, chosen)
    mask_T = clean.inputs["mask_T"] & (clean.target_ids_T != -100)
    leaf_TV = draw.layout(0)(spoilt(values_TV, mask_T)).requires_grad_()
    target_ids_T = draw.layout(1)(clean.target_ids_T)
    with using_backend(backend):
        output = policy_loss_from_logits(
            leaf_TV, target_ids_T, settings=chosen, full_metrics=True, **draw.all(dirty.inputs)
        )
        (gradient_TV,) = torch.autograd.grad(output.loss, leaf_TV)
    check(gradient_TV, exact_TV, dtype, "gradient")
    assert output.loss.item() == pytest.approx(loss, rel=2e-5, abs=1e-6)
    for name, value in metrics.items():
        assert float(output.metrics[name]) == pytest.approx(float(value), rel=2e-5, abs=3e-5), name


@pytest.mark.slow
@settings(max_examples=10, **NUMERIC)
@given(draw=DRAWS, chosen=st.sampled_from(CHOSEN), **SIZES)
def test_in_place_inside_wider_rows(
    backend: str, draw: Draw, chosen: PolicyLossSettings, seed: int, rows: int, vocabulary: int
) -> None:
    """The one layout beside the contiguous one that may be overwritten; its neighbours stay as they
    were."""
    clean, dirty = policy_case(draw, seed, rows, vocabulary)
    _, _, exact_TV = exact_of_logits(clean.logits_TV, clean, chosen)
    leaf_TV = clean.logits_TV.requires_grad_()
    wider = torch.nn.functional.pad(leaf_TV, (3, 2), value=7.0)
    with using_backend(backend):
        output = policy_loss_from_logits(
            wider[:, 3:-2],
            clean.target_ids_T,
            settings=chosen,
            in_place=True,
            **draw.all(dirty.inputs),
        )
        assert bool((wider[:, :3] == 7.0).all()) and bool((wider[:, -2:] == 7.0).all())
        (gradient_TV,) = torch.autograd.grad(output.loss.mul(3.0), leaf_TV)
    assert relative_error(gradient_TV / 3.0, exact_TV) < 3e-5 or float(exact_TV.abs().max()) < 1e-6


@pytest.mark.slow
@settings(max_examples=9, **NUMERIC)
@given(draw=DRAWS, chosen=st.sampled_from(CHOSEN), **SIZES)
def test_policy_loss_from_hidden(
    backend: str, draw: Draw, chosen: PolicyLossSettings, seed: int, rows: int, vocabulary: int
) -> None:
    clean, dirty = policy_case(draw, seed, rows, vocabulary)
    exact = reference_answer(clean, chosen)
    leaves = [
        draw.layout(index)(leaf.detach()).requires_grad_()
        for index, leaf in enumerate(dirty.leaves(torch.float32))
    ]
    target_ids_T = draw.layout(3)(clean.target_ids_T)
    with using_backend(backend):
        output = policy_loss_from_hidden(
            leaves[0],
            leaves[1],
            target_ids_T,
            bias_V=leaves[2],
            settings=chosen,
            **draw.all(dirty.inputs),
        )
        gradients = torch.autograd.grad(output.loss, leaves)
    for name, found, expected in zip(
        ("hidden", "weight", "bias"), gradients, exact.gradients, strict=False
    ):
        check(found, expected, torch.float32, name)
    assert output.loss.item() == pytest.approx(exact.output.loss.item(), rel=2e-5, abs=1e-6)


@pytest.mark.slow
@settings(max_examples=9, **NUMERIC)
@given(draw=DRAWS, beta=st.sampled_from([0.0, 0.3, 1.0]), **SIZES)
def test_distillation(
    backend: str, draw: Draw, beta: float, seed: int, rows: int, vocabulary: int
) -> None:
    """Dense and top-k, from logits and from hidden states."""
    vocabulary = max(vocabulary, 2)
    generator = torch.Generator().manual_seed(seed)
    weight_VH, hidden_TH = (
        torch.randn(vocabulary, 4, generator=generator),
        torch.randn(rows, 4, generator=generator),
    )
    teacher_WG, teacher_TG = (
        torch.randn(vocabulary, 3, generator=generator),
        torch.randn(rows, 3, generator=generator),
    )
    mask_T = torch.rand(rows, generator=generator) > 0.2
    dtype = logits_dtype(draw, backend)
    student_TV, teacher_TW = (hidden_TH @ weight_VH.T).to(dtype), teacher_TG @ teacher_WG.T
    values_TK, ids_TK = torch.log_softmax(teacher_TW, -1).topk(min(3, vocabulary - 1))
    lay, options = (
        draw.layout,
        {"mask_T": draw.layout(0)(mask_T), "beta": beta, "token_count": 5, "temperature": 1.0},
    )

    def row_argument(index: int, values_T: Tensor) -> Tensor:
        return lay(index)(spoilt(values_T, mask_T))

    leaf_TV, other_TV = (
        row_argument(1, student_TV).requires_grad_(),
        row_argument(2, student_TV).requires_grad_(),
    )
    hidden_leaf, weight_leaf = (
        row_argument(3, hidden_TH).requires_grad_(),
        lay(4)(weight_VH).requires_grad_(),
    )
    support = (
        row_argument(5, ids_TK.to(draw.pick(0, (torch.int64, torch.int32)))),
        row_argument(6, values_TK),
    )
    with using_backend(backend):
        losses = [
            jsd_loss_from_logits(leaf_TV, row_argument(7, teacher_TW), **options).loss,
            jsd_loss_top_k_from_logits(other_TV, *support, **options).loss,
            jsd_loss_from_hidden(
                hidden_leaf, weight_leaf, row_argument(8, teacher_TG), lay(9)(teacher_WG), **options
            ).loss,
            jsd_loss_top_k_from_hidden(hidden_leaf, weight_leaf, *support, **options).loss,
        ]
        found = [
            *torch.autograd.grad(losses[0], leaf_TV),
            *torch.autograd.grad(losses[1], other_TV),
            *torch.autograd.grad(losses[2], (hidden_leaf, weight_leaf)),
            *torch.autograd.grad(losses[3], (hidden_leaf, weight_leaf)),
        ]
    exact_TV = student_TV.double().requires_grad_()
    leaves = hidden_TH.double().requires_grad_(), weight_VH.double().requires_grad_()
    teacher = teacher_over(vocabulary, teacher_TW.double(), 1.0)
    pairs = [
        (torch.log_softmax(exact_TV, -1), teacher),
        top_k_log_probs(exact_TV, ids_TK, values_TK, 1.0),
        (torch.log_softmax(leaves[0] @ leaves[1].T, -1), teacher),
        top_k_log_probs(leaves[0] @ leaves[1].T, ids_TK, values_TK, 1.0),
    ]
    exact = [torch.where(mask_T, jsd_of_log_probs(*pair, beta), 0.0).sum() / 5 for pair in pairs]
    expected = [
        *torch.autograd.grad(exact[0], exact_TV),
        *torch.autograd.grad(exact[1], exact_TV),
        *torch.autograd.grad(exact[2], leaves),
        *torch.autograd.grad(exact[3], leaves),
    ]
    for gradient, gold, kind in zip(
        found, expected, (dtype, dtype, *[torch.float32] * 4), strict=True
    ):
        check(gradient, gold, kind, "gradient")
    for loss, gold in zip(losses, exact, strict=True):
        assert loss.item() == pytest.approx(gold.item(), rel=3e-5, abs=3e-6)


@pytest.mark.slow
@settings(max_examples=10, **NUMERIC)
@given(draw=DRAWS, **SIZES)
def test_log_probs(backend: str, draw: Draw, seed: int, rows: int, vocabulary: int) -> None:
    clean = make_case(seed, rows=rows, vocabulary=vocabulary, hidden=5)
    exact = log_probs_reference(clean.logits_TV.double(), clean.target_ids_T, 0.7)
    target_ids_T = draw.layout(0)(clean.target_ids_T.to(draw.pick(0, (torch.int64, torch.int32))))
    head = draw.layout(1)(clean.hidden_TH), draw.layout(2)(clean.weight_VH)
    with using_backend(backend):
        first = token_log_probs(
            *head, target_ids_T, bias_V=draw.layout(3)(clean.bias_V), temperature=0.7
        )
        second = token_log_probs_from_logits(
            draw.layout(4)(clean.logits_TV), target_ids_T, temperature=0.7
        )
    for found_T, other_T, exact_T in zip(first, second, exact, strict=True):
        check(found_T, exact_T, torch.float32, "from hidden states")
        check(other_T, exact_T, torch.float32, "from logits")


@pytest.mark.slow
@settings(max_examples=10, **NUMERIC)
@given(
    draw=DRAWS,
    seed=st.integers(0, 10**6),
    groups=st.integers(1, 6),
    mode=st.sampled_from(["grpo", "center_only"]),
)
def test_group_advantages(backend: str, draw: Draw, seed: int, groups: int, mode: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards_R = torch.randn(12, generator=generator)
    ids_R = torch.randint(groups, (12,), generator=generator)
    exact_R = torch.zeros(12, dtype=torch.float64)
    for group in range(groups):
        of_group = rewards_R[ids_R == group].double()
        if len(of_group) > 1:
            scale = of_group.std(correction=0) + 1e-6 if mode == "grpo" else 1.0
            exact_R[ids_R == group] = (of_group - of_group.mean()) / scale
    with using_backend(backend):
        found_R = group_advantages(
            draw.layout(0)(rewards_R),
            draw.layout(1)(ids_R.to(draw.pick(0, (torch.int64, torch.int32)))),
            mode=mode,
        )
    check(found_R, exact_R, torch.float32, "advantages")


def test_one_row_stands_for_all(backend: str) -> None:
    """Expanded tensors: every row is the same memory, which may be read but not overwritten."""
    case = make_case(3, rows=6, vocabulary=40)
    row_TV = case.logits_TV[:1].expand(6, 40)
    inputs = case.inputs | {
        "sequence_ids_T": torch.tensor([2]).expand(6),
        "advantages_S": torch.tensor([0.7]).expand(5),
        "mask_T": torch.tensor([True]).expand(6),
        "behaviour_log_probs_T": torch.tensor([-3.0]).expand(6),
        "proximal_log_probs_T": torch.tensor([-3.1]).expand(6),
    }
    target_ids_T = torch.tensor([11]).expand(6)
    plain = Case(case.hidden_TH, case.weight_VH, case.bias_V, target_ids_T.contiguous(), {
        name: value.contiguous() if isinstance(value, Tensor) else value for name, value in inputs.items()
    })  # fmt: skip
    loss, _, exact_TV = exact_of_logits(row_TV.contiguous(), plain, LOSS)
    leaf_TV = row_TV.detach().requires_grad_()
    with using_backend(backend):
        output = policy_loss_from_logits(leaf_TV, target_ids_T, settings=LOSS, **inputs)
        (gradient_TV,) = torch.autograd.grad(output.loss, leaf_TV)
    check(gradient_TV, exact_TV, torch.float32, "gradient")
    assert output.loss.item() == pytest.approx(loss, rel=2e-5)


UNFIT: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "transposed": (lambda leaf: (leaf * 1.0).T, "strides (1, 6)"),
    "every second column": (lambda leaf: (leaf * 1.0)[:, ::2], "strides (6, 2)"),
    "expanded": (lambda leaf: (leaf * 1.0)[:1].expand(4, 6), "strides (0, 1)"),
    "overlapping": (lambda leaf: (leaf * 1.0).as_strided((4, 6), (2, 1)), "strides (2, 1)"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_only_rows_of_their_own_are_overwritten(backend: str, kind: str) -> None:
    leaf = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    shape, strides = UNFIT[kind]
    logits_TV = shape(leaf)
    rows = len(logits_TV)
    before = logits_TV.detach().clone()
    with using_backend(backend), pytest.raises(ValueError) as caught:
        policy_loss_from_logits(
            logits_TV, torch.zeros(rows, dtype=torch.int64), sequence_ids_T=torch.zeros(rows, dtype=torch.int64),
            advantages_S=torch.ones(1), proximal_log_probs_T=torch.zeros(rows), token_count=rows, in_place=True,
        )  # fmt: skip
    assert str(caught.value) == (
        f"in_place=True, but logits_TV has {strides}; expected rows of its own with unit columns: "
        "call .contiguous() first, or use in_place=False"
    )
    assert torch.equal(logits_TV, before)


def test_a_leaf_is_not_overwritten(backend: str) -> None:
    """Its gradient would be its own memory, and an optimizer would subtract one from the other."""
    with using_backend(backend), pytest.raises(ValueError) as caught:
        policy_loss_from_logits(
            torch.zeros(2, 3, requires_grad=True), torch.zeros(2, dtype=torch.int64),
            sequence_ids_T=torch.zeros(2, dtype=torch.int64), advantages_S=torch.ones(1),
            proximal_log_probs_T=torch.zeros(2), token_count=2, in_place=True,
        )  # fmt: skip
    assert (
        str(caught.value)
        == "in_place=True, but logits_TV is a leaf that requires grad; use in_place=False"
    )
