"""Ranks of a trainer: how passes are dealt out, and several ranks against one, in processes of
their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from recurrent_models import make_seeing, save_seeing
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from trainer_ranks import Case, Nest, Outcome
from training_cases import CPU, SETTINGS, group, llama, mixed_window, settings_of, window

from zppo.config.method import MethodConfig
from zppo.errors import UserError
from zppo.training.batch import assemble
from zppo.training.layout import deal_passes, deal_rows
from zppo.training.policy import Policy
from zppo.training.ranks import ALONE, Ranks, cut_like, first_row, local, whole
from zppo.training.step import split
from zppo.training.surrogate import step_advantages

LOW = MethodConfig(updates_per_step=4)
"""Four updates of each window, so that three windows make twelve."""
ONE_UPDATE = MethodConfig(updates_per_step=1)
SPARE = Case(method=MethodConfig(updates_per_step=2), groups=20, last=1, micro_batch_tokens=40)
"""Its first update, which measures the proximal log-probs, has a spare pass on the second rank."""
ROUNDING = 3e-5
"""What the order of sums in float32 may make of weights up to 2, and of moments, in a dozen updates:
3e-6 was found with other instructions of the processor (`ATEN_CPU_CAPABILITY`), 1.3e-5 on a
processor without AVX-512, 1.5e-6 where one rank cuts its passes otherwise. One pass of one update
that weighs a thousandth more makes 5e-5."""
GRADIENTS = 1e-6
"""The same, of first moments after one or two updates: 1e-8 was found, 7e-8 against float64, and 5e-8
without vector instructions (`ATEN_CPU_CAPABILITY=default`)."""
SMALL = 2e-4
"""The same of weights, where the gradient of one is as small as what rounding makes of it, since AdamW
divides by its size. In `SPARE` one of 2.5e-8, of a norm of 0.65, is off by 8e-10 without vector
instructions, between two ranks and one as between one and itself with shorter passes, and the weight by
5e-5. There the gradients tell what the weights do not."""


# ---- dealing -------------------------------------------------------------------------------------


@given(widths=st.lists(st.integers(1, 5000), max_size=60), ranks=st.integers(1, 9))
def test_rows_are_dealt_once_and_evenly(widths: list[int], ranks: int) -> None:
    widths.sort(reverse=True)
    dealt = deal_rows(widths, ranks)
    assert sorted(index for own in dealt for index in own) == list(range(len(widths)))
    loads = [sum(widths[index] for index in own) for own in dealt]
    assert max(loads) - min(loads) <= max(widths, default=0)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=5), min_size=1, max_size=8),
    ranks=st.integers(1, 4),
    max_tokens=st.integers(4, 80),
    share=st.booleans(),
)
def test_every_token_is_in_one_pass_that_counts_and_all_ranks_make_as_many(
    sizes: list[list[int]], ranks: int, max_tokens: int, share: bool
) -> None:
    groups = [
        group(f"g{i}", [float(j % 2) for j in range(len(lengths))], lengths=lengths)
        for i, lengths in enumerate(sizes)
    ]
    rollouts = assemble(window(*groups), max_staleness=0, device=CPU)
    everyone = np.arange(rollouts.sequences)
    dealt = [
        deal_passes(rollouts, everyone, max_tokens, share=share, rank=rank, ranks=ranks)
        for rank in range(ranks)
    ]
    passes = [batch for own in dealt for batch in own.batches]
    counting = [batch for batch in passes if batch.weight]
    tokens = [token for batch in counting for token in batch.tokens_R.tolist()]
    assert sorted(tokens) == list(range(rollouts.tokens))
    assert len({len(own.batches) for own in dealt}) == 1
    assert {own.total for own in dealt} == {len(counting)}
    real = {tuple(batch.tokens_R.tolist()) for batch in counting}
    assert all(tuple(batch.tokens_R.tolist()) in real for batch in passes)


def test_one_rank_sums_and_cuts_nothing() -> None:
    value = torch.tensor([1.0, 2.0])
    assert ALONE.sum(value) is value and whole(value) is value and local(value) is value
    assert ALONE.joined(value, torch.tensor([True, False])) is value
    assert cut_like(value, value) is value and first_row(value) == 0 and ALONE.count == 1


# ---- several ranks against one -------------------------------------------------------------------


@pytest.fixture(scope="module")
def nest() -> Iterator[Nest]:
    with Nest() as nest:
        yield nest


def difference(one: dict[str, Tensor], many: dict[str, Tensor]) -> float:
    """Largest difference of an element, over the tensors of the first."""
    return max(float((one[name].float() - many[name].float()).abs().max()) for name in one)


def first_moments(outcome: Outcome) -> dict[str, Tensor]:
    """After one update a tenth of the gradients, whose norm was cut to 1."""
    return {name: value for name, value in outcome.tensors.items() if name.startswith("first.")}


def check_metrics(one: Outcome, many: Outcome) -> None:
    for alone, together in zip(one.metrics, many.metrics, strict=True):
        assert alone.keys() == together.keys()
        for name in alone:
            if not name.startswith("seconds"):
                assert together[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-5), name


def test_two_ranks_train_as_one_and_resume_as_another_number(nest: Nest, tmp_path: Path) -> None:
    """12 updates on one rank, on two, and on two, one and two in turn, through saved moments."""
    case = Case(method=LOW, groups=20)
    one = nest.trained(tmp_path / "one", 1, case)
    assert sum(metrics["updates"] for metrics in one.metrics) == 12
    two = nest.trained(tmp_path / "two", 2, case)
    check_metrics(one, two)
    assert one.tensors.keys() == two.tensors.keys()
    assert difference(one.tensors, two.tensors) <= ROUNDING

    for step, count in enumerate((2, 1, 2)):
        turn = msgspec.structs.replace(
            case,
            first=step,
            last=step + 1,
            begin=str(tmp_path / f"state{step}") if step else None,
            end=None if step == 2 else str(tmp_path / f"state{step + 1}"),
        )
        resumed = nest.trained(tmp_path / f"turn{step}", count, turn)
    assert difference(one.tensors, resumed.tensors) <= ROUNDING
    # It has moved by far more than it differs.
    start = nest.trained(tmp_path / "start", 1, msgspec.structs.replace(case, last=0))
    assert difference(start.tensors, one.tensors) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "case", "bound"),
    [
        (3, Case(method=LOW, groups=20), ROUNDING),
        (2, Case(method=LOW, model="llama", recompute=True), ROUNDING),
        (5, Case(model="moe"), ROUNDING),
        (2, Case(model="seeing", last=1, method=ONE_UPDATE), SMALL),
        (2, SPARE, SMALL),
        (2, Case(teacher=True), ROUNDING),
        (2, Case(method=MethodConfig(kl_coefficient=0.1, entropy_coefficient=0.01)), ROUNDING),
    ],
    ids=[
        *("three, uneven", "untied head, recomputed layers", "experts, empty shares"),
        "recurrent layers behind a frozen tower",
        *("spare pass", "teacher", "reference"),
    ],
)
def test_more_of_the_same(nest: Nest, tmp_path: Path, count: int, case: Case, bound: float) -> None:
    """Three ranks cut the 31 rows of an embedding in 11, 11 and 9; of 4 experts, five ranks have one
    each and none."""
    one, many = (
        nest.trained(tmp_path / "one", 1, case),
        nest.trained(tmp_path / "many", count, case),
    )
    check_metrics(one, many)
    assert difference(one.tensors, many.tensors) <= bound
    if bound == SMALL:
        assert difference(first_moments(one), many.tensors) <= GRADIENTS


def test_a_number_that_is_none_on_one_rank_skips_the_update_on_all(
    nest: Nest, tmp_path: Path
) -> None:
    """The second rank finds it; the first would have made the update on its own."""
    case = Case(method=LOW, last=1, groups=20, poison=1, micro_batch_tokens=200)
    spoiled = nest.trained(tmp_path / "spoiled", 2, case)
    (metrics,) = spoiled.metrics
    assert (metrics["updates"], metrics["updates_skipped"]) == (3.0, 1.0)
    assert all(bool(tensor.isfinite().all()) for tensor in spoiled.tensors.values())


def test_ranks_lay_rows_out_alike_though_one_of_them_cannot_share_prompts(
    nest: Nest, tmp_path: Path
) -> None:
    """What decides the number of passes is the same on all ranks, even if their kernels differ."""
    case = Case(last=1, micro_batch_tokens=200)
    one = nest.trained(tmp_path / "one", 1, case)
    two = nest.trained(tmp_path / "two", 2, msgspec.structs.replace(case, apart=1))
    check_metrics(one, two)
    assert difference(one.tensors, two.tensors) <= ROUNDING


def test_stochastic_rounding_is_that_of_one_rank(nest: Nest, tmp_path: Path) -> None:
    """Equal gradients give equal bits, weights and moments, however many ranks there are."""
    case = Case(dtype="bfloat16", state_dtype="bfloat16", given=5)
    one, many = nest.trained(tmp_path / "one", 1, case), nest.trained(tmp_path / "many", 3, case)
    assert one.tensors.keys() == many.tensors.keys()
    assert all(torch.equal(tensor, many.tensors[name]) for name, tensor in one.tensors.items())


def test_a_full_disk_does_not_part_the_ranks(nest: Nest, tmp_path: Path) -> None:
    """The first rank cannot write the moments, the others know nothing of it, and all go on."""
    whole_run = nest.trained(tmp_path / "one", 1, Case(last=2))
    case = Case(last=1, full=str(tmp_path / "full"))
    many = nest.trained(tmp_path / "many", 2, case)
    check_metrics(whole_run, many)
    assert difference(whole_run.tensors, many.tensors) <= ROUNDING


def test_the_spare_pass_is_there() -> None:
    task, device = mixed_window(step=0, count=SPARE.groups), CPU
    rollouts = assemble(task, max_staleness=0, device=device)
    trainer_settings = replace(SETTINGS, **settings_of(SPARE.method))
    batches = split(rollouts, trainer_settings)
    advantages_S = step_advantages(rollouts, batches, trainer_settings.method).numpy()
    live = batches[0][(advantages_S[batches[0]] != 0) & (rollouts.lengths_S[batches[0]] > 0)]
    passes = [
        deal_passes(rollouts, live, SPARE.micro_batch_tokens, share=True, rank=rank, ranks=2)
        for rank in range(2)
    ]
    assert [[batch.weight for batch in own.batches] for own in passes] == [[1, 1], [1, 0]]


def with_a_scalar() -> Any:
    model = llama()
    model.model.register_parameter("gate", nn.Parameter(torch.tensor(1.0)))
    return model


def with_a_wide_weight() -> Any:
    """As families have it whose routers stay in float32."""
    model = llama(dtype=torch.bfloat16)
    model.model.register_parameter("router", nn.Parameter(torch.ones(2)))
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            with_a_scalar,
            "fully_shard doesn't support scalar parameters. Change gate to a 1D tensor with numel "
            "equal to 1.",
        ),
        (
            with_a_wide_weight,
            "its weights are bfloat16 and float32; with student.dtype float32 they are of one "
            "dtype, as shards must be",
        ),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused(
    tmp_path: Path, make: Callable[[], Any], reason: str
) -> None:
    policy = Policy(make())
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        assert dist.group.WORLD is not None
        with pytest.raises(UserError) as caught:
            policy.shard(Ranks(0, DeviceMesh.from_group(dist.group.WORLD, "cpu")))
    finally:
        dist.destroy_process_group()
    assert str(caught.value) == (
        f"actors.trainer.ranks is 1; expected 1, because '' cannot be sharded: {reason}"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "film"), [("seeing", False), ("seeing_all", False), ("seeing_all", True)]
)
def test_ranks_with_and_without_a_picture_make_one_update(
    nest: Nest, tmp_path: Path, model: str, film: bool
) -> None:
    """One group has a picture, or a video, so one rank's pass has one; with a tower that is trained the other
    goes through it all the same, and nothing that it makes there counts."""
    folder = save_seeing(make_seeing(first_mark=100), tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (96, 64, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    case = Case(model=model, method=ONE_UPDATE, pictures=str(folder), film=film, groups=4, last=1)
    one, two = (nest.trained(tmp_path / str(count), count, case) for count in (1, 2))
    check_metrics(one, two)
    gradients = first_moments(one)
    assert max(float(value.abs().max()) for value in gradients.values()) > 1e-3
    assert difference(gradients, two.tensors) <= GRADIENTS
    in_the_tower = [value for name, value in gradients.items() if ".visual." in name]
    assert any(bool(value.any()) for value in in_the_tower) == (model == "seeing_all")
