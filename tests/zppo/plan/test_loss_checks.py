"""Settings of the loss: what goes together, what a preset stands for, what the plan says of it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import get_args, get_type_hints

import msgspec
import pytest
from rich.console import Console

from zppo.config.load import load
from zppo.config.method import MethodConfig
from zppo.config.presets import PRESETS, PresetName
from zppo.config.topology import Topology
from zppo.errors import UserError
from zppo.plan.loss_checks import WITHIN_GROUP
from zppo.plan.machine import GIB, Machine
from zppo.plan.make import make_plan
from zppo.plan.memory import inspect_models, need
from zppo.plan.processes import processes
from zppo.plan.view import show
from zppo_kernels import advantages

MACHINE = Machine(cores=4, memory=64 * GIB, shared=8 * GIB)

REFUSALS = [
    (
        ("sapo_temperature_positive=2",),
        "method.sapo_temperature_positive is 2; expected 1, because method.surrogate is 'clip'",
    ),
    (
        ("surrogate=cispo", "ratio_level=sequence"),
        "method.ratio_level is 'sequence'; expected 'token', because method.surrogate is 'cispo', "
        "which weighs single tokens",
    ),
    (
        ("fixed_length=100",),
        "method.fixed_length is 100; expected null, because method.loss_normalisation is 'token'",
    ),
    (
        ("correction_floor=0.5",),
        "method.correction_floor is 0.5; expected null, because method.correction is 'truncate', "
        "and only a mask has a lower bound",
    ),
    (
        ("correction=mask", "correction_floor=2"),
        "method.correction_floor is 2; expected null or a number below 2, method.correction_cap",
    ),
    (
        ("correction=none", "correction_level=sequence"),
        "method.correction_level is 'sequence'; expected 'token', because method.correction is "
        "'none'",
    ),
    (
        ("ratio=behaviour", "correction_level=sequence"),
        "method.correction_level is 'sequence'; expected 'token', because method.ratio is "
        "'behaviour', which leaves nothing to correct",
    ),
    (
        ("entropy_target=0.5",),
        "method.entropy_target is 0.5; expected null, or a method.entropy_coefficient above 0 to "
        "begin with",
    ),
    (
        ("entropy_coefficient=0.2", "entropy_target=0.5", "entropy_coefficient_max=0.1"),
        "method.entropy_coefficient is 0.2; expected at most 0.1, method.entropy_coefficient_max",
    ),
    (
        ("entropy_coefficient=0.1", "entropy_step=0.1"),
        "method.entropy_step is 0.1; expected 0.005, because method.entropy_target is null: the "
        "coefficient stays",
    ),
    (
        ("kl_estimator=k2",),
        "method.kl_estimator is 'k2'; expected 'k3', because method.kl_coefficient is 0",
    ),
    (
        ("kl_coefficient=0.1", "kl_estimator=k2", "kl_correction=straight_through"),
        "method.kl_correction is 'straight_through'; expected 'none' or 'importance', because the "
        "gradient of method.kl_estimator 'k2' is the right one already",
    ),
    (
        ("advantage_rewards=decoupled", "advantage=rloo"),
        "method.advantage_rewards is 'decoupled'; expected 'sum', because data.reward has no "
        "entries, and there is nothing to normalise apart",
    ),
    (
        ("advantage_rewards=decoupled", "data.reward=[{use: math}, {use: exact}]"),
        "method.advantage is 'norm_without_zero'; expected one of grpo_bessel, grpo, center_only, "
        "rloo, because method.advantage_rewards 'decoupled' normalises each reward within its "
        "group",
    ),
    (
        ("name=on_distill", "kl_coefficient=0.1"),
        "method.kl_coefficient is 0.1; expected 0, because 'on_distill' has no policy loss",
    ),
    (
        ("name=on_distill", "loss_normalisation=fixed_length"),
        "method.loss_normalisation is 'fixed_length'; expected 'token', because 'on_distill' takes "
        "the mean of the divergence over all tokens",
    ),
    (
        ("name=off_distill", "preset=rloo"),
        "method.preset is 'rloo'; expected null, because 'off_distill' has no policy loss",
    ),
    (
        ("preset=gspro",),
        "--set method.preset=gspro: method.preset is 'gspro'; expected one of bnpo, cispo, dapo, "
        "dppo, dr_grpo, gdpo, grpo, gspo, icepop, luspo, rloo, sapo, or null (did you mean 'gspo'?)",
    ),
]


@pytest.mark.parametrize(("words", "sentence"), REFUSALS)
def test_what_does_not_go_together(small: Path, words: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        make_plan(plan_of(small, *words), 6, MACHINE)
    assert str(caught.value) == sentence


def plan_of(small: Path, *words: str) -> Topology:
    paths = [word if word.startswith("data.") else f"method.{word}" for word in words]
    return load(small / "topology.yaml", paths)


def test_every_preset_is_a_run_of_its_own_values(small: Path) -> None:
    assert set(PRESETS) == set(get_args(PresetName))
    resolved = set()
    for name, values in PRESETS.items():
        several = ["data.reward=[{use: math}, {use: exact}]"] if name == "gdpo" else []
        topology = plan_of(small, f"preset={name}", *several)
        found = {key: getattr(topology.method, key) for key in values}
        assert found == values
        make_plan(topology, 6, MACHINE)
        resolved.add(tuple(sorted(map(str, found.items()))))
    assert len(resolved) == len(PRESETS)


def test_what_the_topology_says_wins_over_its_preset_and_is_shown(small: Path) -> None:
    plan = make_plan(plan_of(small, "preset=gspo", "clip_high=0.1"), 6, MACHINE)
    assert (plan.topology.method.clip_low, plan.topology.method.clip_high) == (3e-4, 0.1)
    assert plan.topology.method.ratio_level == "sequence"
    assert "method.preset is 'gspo', but the topology sets clip_high 0.1 (not 0.0004)" in plan.notes
    console = Console(width=400, record=True, file=io.StringIO())
    show(plan, small, console)
    assert (
        "gspo: advantage grpo_bessel, clip_low 0.0003, clip_high 0.1, dual_clip null, "
        "ratio_level sequence, loss_normalisation sequence"
    ) in console.export_text()


def test_a_default_that_the_topology_says_wins_over_its_preset_too(small: Path) -> None:
    said = ("clip_high=0.28", "dual_clip=10", "loss_normalisation=token", "clip_low=0.2")
    method = plan_of(small, "preset=luspo", "fixed_length=null", "ratio_level=token", *said).method
    plain = MethodConfig()
    assert msgspec.structs.replace(method, preset=None, advantage=plain.advantage) == plain


@pytest.mark.parametrize(
    ("reward", "most"),
    [
        ("{use: math, weight: 0.5}, {use: format, weight: 0.1, args: {pattern: a}}", "0.6"),
        ("{use: math, weight: 1}, {use: length, weight: -1, args: {free: 1, limit: 2}}", None),
        ("{use: length, weight: 1, args: {free: 1, limit: 2}}", "0"),
        ("{use: math, weight: 1}, {use: length, weight: 1, args: {free: 1, limit: 2}}", None),
    ],
)
def test_a_reward_that_nothing_can_earn_is_noted(
    small: Path, reward: str, most: str | None
) -> None:
    topology = load(small / "topology.yaml", [f"data.reward=[{reward}]"])
    notes = [n for n in make_plan(topology, 6, MACHINE).notes if "correct_reward" in n]
    assert notes == (
        []
        if most is None
        else [
            f"data.reward adds up to at most {most}, less than method.correct_reward, 1: no "
            "response can be correct, and every question stays hard"
        ]
    )


@pytest.mark.parametrize(
    ("correct", "reward", "note"),
    [
        ("1", "", None),
        (
            "2",
            "",
            "a grader gives at most 1, less than method.correct_reward, 2: no response can be "
            "correct, and every question stays hard",
        ),
        (
            "0",
            "",
            "a grader gives at least 0, not less than method.correct_reward, 0: every response is "
            "correct, and no question is hard",
        ),
        ("-0.5", "{use: length, args: {free: 1, limit: 2}}", None),
        (
            "-1",
            "{use: length, args: {free: 1, limit: 2}}",
            "data.reward adds up to at least -1, not less than method.correct_reward, -1: every "
            "response is correct, and no question is hard",
        ),
    ],
)
def test_a_bound_of_correctness_that_all_or_none_meet_is_noted(
    small: Path, correct: str, reward: str, note: str | None
) -> None:
    words = [f"method.correct_reward={correct}", f"data.reward=[{reward}]"]
    plan = make_plan(load(small / "topology.yaml", words), 6, MACHINE)
    assert [n for n in plan.notes if "correct_reward" in n] == ([] if note is None else [note])


def test_a_row_that_names_its_reward_has_other_bounds(small: Path) -> None:
    """What it names counts without its weight."""
    words = ["data.reward=[{use: math, weight: 0.5}, {use: exact, weight: 0.4}]"]
    for fields, notes in (({}, 1), ({"grader": "by"}, 0)):
        topology = load(small / "topology.yaml", [*words, f"data.fields={fields}"])
        assert len([n for n in make_plan(topology, 6, MACHINE).notes if "correct_r" in n]) == notes


def test_a_sequence_ratio_over_all_tokens_is_noted(small: Path) -> None:
    plan = make_plan(plan_of(small, "ratio_level=sequence"), 6, MACHINE)
    assert (
        "method.ratio_level is 'sequence' and method.loss_normalisation 'token': a response counts "
        "by its length; GSPO has 'sequence'"
    ) in plan.notes


def test_a_scope_that_changes_nothing_is_noted(small: Path) -> None:
    note = (
        "method.advantage_scope is 'step', which changes nothing: method.advantage 'rloo' sees one "
        "group at a time"
    )
    words = ("advantage_scope=step", "advantage=rloo")
    assert note in make_plan(plan_of(small, *words), 6, MACHINE).notes
    wide = make_plan(plan_of(small, "advantage_scope=step"), 6, MACHINE)
    assert not any("advantage_scope" in one for one in wide.notes)


def test_a_bound_that_its_surrogate_does_not_have_is_noted(small: Path) -> None:
    words = ("preset=grpo", "surrogate=sapo", "clip_high=0.4")
    notes = make_plan(plan_of(small, *words), 6, MACHINE).notes
    assert [one for one in notes if "no such bound" in one] == [
        "method.clip_high is 0.4, which changes nothing: method.surrogate 'sapo' has no such bound"
    ]
    for preset in ("sapo", "cispo"):
        notes = make_plan(plan_of(small, f"preset={preset}"), 6, MACHINE).notes
        assert not any("no such bound" in one for one in notes)


def test_the_reference_of_the_kl_is_counted(small: Path) -> None:
    """8 weights of 2 bytes, 34 activations of a layer at 2 bytes, and its logits in float32."""
    plain, held = plan_of(small), plan_of(small, "kl_coefficient=0.1")
    models = inspect_models(plain)
    (entry,) = (one for one in processes(plain, 4) if one.role == "trainer")
    facts, tokens = models.student, plain.actors.trainer.micro_batch_tokens
    frozen = 1.25 * (8 * 2 + 34 * tokens * facts.hidden + 1024 * facts.vocabulary * 4)
    assert need(entry, held, models).host - need(entry, plain, models).host == pytest.approx(
        frozen, abs=2
    )


def test_the_kernels_and_the_plan_name_the_same_advantages() -> None:
    assert set(WITHIN_GROUP) == set(advantages.WITHIN_GROUP)
    modes = get_args(get_type_hints(MethodConfig)["advantage"])
    assert set(modes) == set(get_args(advantages.AdvantageMode))
