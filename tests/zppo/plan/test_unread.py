"""Settings that a run does not read are noted, with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from zppo.algorithm.methods import get_method
from zppo.config.load import load
from zppo.plan.unread import RULES, unread_notes


def notes_of(small: Path, *overrides: str) -> list[str]:
    topology = load(small / "topology.yaml", overrides)
    return unread_notes(topology, get_method(topology.method.name))


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        (
            ("method.jsd_beta=0.1",),
            "method.jsd_beta changes nothing: the method 'zppo' learns no teacher's distribution",
        ),
        (
            ("method.name=on_distill", "method.clip_low=0.1", "method.clip_high=0.1"),
            "method.clip_low and method.clip_high change nothing: the method 'on_distill' has no "
            "policy loss",
        ),
        (
            ("method.correction=none", "method.correction_cap=5"),
            "method.correction_cap changes nothing: no token is weighted by what it was sampled with",
        ),
        (
            ("method.name=on_distill", "method.updates_per_step=2"),
            "method.updates_per_step changes nothing: the method 'on_distill' has a number of its "
            "own",
        ),
        (
            ("method.name=on_distill", "teacher.score_top_k=5"),
            "teacher.score_top_k changes nothing: no teacher actor scores tokens",
        ),
        (
            ("method.prefix_share=0.9",),
            "method.prefix_share changes nothing: the method 'zppo' begins no response with a "
            "teacher's",
        ),
        (
            ("method.name=grpo", "method.merge_candidates=true"),
            "method.merge_candidates changes nothing: the method 'grpo' has no NCQ prompts",
        ),
        (
            ("method.name=grpo", "method.teacher_group_size=2"),
            "method.teacher_group_size changes nothing: the method 'grpo' draws no responses of a "
            "teacher",
        ),
        (
            ("method.teacher_order=pool",),
            "method.teacher_order changes nothing: more_teachers is empty",
        ),
        (
            ("method.name=grpo", "scheduler.rho_replay=0.9", "scheduler.buffer_capacity=9"),
            "scheduler.rho_replay and scheduler.buffer_capacity change nothing: the method 'grpo' "
            "brings no question back",
        ),
        (
            ("method.name=grpo", "scheduler.rho_aug=0"),
            "scheduler.rho_aug changes nothing: the method 'grpo' rewrites no prompt",
        ),
        (
            ("method.name=grpo", "teacher.compression=rule"),
            "teacher.compression changes nothing: the method 'grpo' shows no candidates",
        ),
        (
            ("student.sampling.support_limit=5",),
            "student.sampling.support_limit changes nothing: without top_k, top_p or min_p all "
            "tokens are sampled from",
        ),
        (
            ("data.heldout=null", "evaluation.limit=5"),
            "evaluation.limit changes nothing: data.heldout is null",
        ),
        (("cluster.port=8000",), "cluster.port changes nothing: cluster.hosts is empty"),
    ],
)
def test_a_setting_that_nothing_reads_is_noted(
    small: Path, overrides: tuple[str, ...], note: str
) -> None:
    assert note in notes_of(small, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ("method.name=on_distill", "method.jsd_beta=0.1"),
        ("method.name=on_distill", "teacher.scoring=remote", "teacher.score_top_k=5"),
        ("method.name=prefix", "method.prefix_share=0.9"),
        ("method.correction_cap=5", "method.clip_low=0.1", "method.updates_per_step=2"),
        ("method.merge_candidates=true", "scheduler.rho_replay=0.9", "teacher.compression=rule"),
        ("student.sampling.top_k=20", "student.sampling.support_limit=5"),
    ],
)
def test_what_is_read_is_not_noted(small: Path, overrides: tuple[str, ...]) -> None:
    said = {one.partition("=")[0] for one in overrides}
    assert not [note for note in notes_of(small, *overrides) if said & set(note.split())]


def test_a_section_that_is_not_there_says_nothing(small: Path) -> None:
    overrides = ("method.name=grpo", "teacher=null")
    assert not [note for note in notes_of(small, *overrides) if "teacher." in note]


def test_every_rule_names_settings_that_exist(small: Path) -> None:
    topology = load(small / "topology.yaml", ["method.name=zppo"])
    for path in (path for rule in RULES for path in rule.settings):
        section, *inner = path.split(".")
        value = getattr(topology, section)
        for name in inner:
            value = getattr(value, name)
