"""Notes on settings that this run does not read.

What the topology says and nothing reads is often a mistake somewhere else: another method was
meant, or a section is missing. But one topology may serve many methods (`zppo compare`), so such
settings are noted and not refused; those of the loss have stricter rules (`loss_checks`). The
places of all the rules are here: `RULES` says of each which settings it is about, whether this run
reads them, and why not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from msgspec import NODEFAULT, structs

from zppo.algorithm.methods import Method
from zppo.algorithm.reformulations import NegativeCandidateIncluded, Prefix
from zppo.config.topology import Topology
from zppo.plan.processes import trainer_scores


class Rule(NamedTuple):
    """`settings` are paths, read only where `read` says so; `because` says why not,
    with the method's name for {method}."""

    settings: tuple[str, ...]
    read: Callable[[Topology, Method], bool]
    because: str


def _shows(method: Method, reformulator: type) -> bool:
    return any(isinstance(one, reformulator) for one in method.reformulations)


def _corrects(topology: Topology, method: Method) -> bool:
    config = topology.method
    return not method.needs_scores and config.correction != "none" and config.ratio == "proximal"


def _writes(topology: Topology, method: Method) -> bool:
    """Whether a teacher shortens candidates or makes hints of them."""
    return any(one.preparation != "none" for one in method.reformulations)


def _scores_remotely(topology: Topology, method: Method) -> bool:
    return method.needs_scores and not trainer_scores(method, topology.teacher)


RULES = (
    Rule(
        ("method.clip_low", "method.clip_high", "method.dual_clip"),
        lambda topology, method: not method.needs_scores,
        "{method} has no policy loss",
    ),
    Rule(
        ("method.correction_cap",),
        _corrects,
        "no token is weighted by what it was sampled with",
    ),
    Rule(
        ("method.updates_per_step",),
        lambda topology, method: method.updates_per_step is None,
        "{method} has a number of its own",
    ),
    Rule(
        ("method.jsd_beta", "teacher.scoring"),
        lambda topology, method: method.needs_scores,
        "{method} learns no teacher's distribution",
    ),
    Rule(
        ("teacher.score_top_k",),
        _scores_remotely,
        "no teacher actor scores tokens",
    ),
    Rule(
        ("method.prefix_share",),
        lambda topology, method: _shows(method, Prefix),
        "{method} begins no response with a teacher's",
    ),
    Rule(
        ("method.merge_candidates",),
        lambda topology, method: _shows(method, NegativeCandidateIncluded),
        "{method} has no NCQ prompts",
    ),
    Rule(
        ("method.teacher_group_size",),
        lambda topology, method: method.teacher_draws != "none",
        "{method} draws no responses of a teacher",
    ),
    Rule(
        ("method.teacher_order",),
        lambda topology, method: bool(topology.more_teachers),
        "more_teachers is empty",
    ),
    Rule(
        ("scheduler.rho_replay", "scheduler.buffer_capacity"),
        lambda topology, method: method.replay,
        "{method} brings no question back",
    ),
    Rule(
        ("scheduler.rho_aug", "scheduler.rho_aug_max"),
        lambda topology, method: bool(method.reformulations),
        "{method} rewrites no prompt",
    ),
    Rule(
        (
            "teacher.compression",
            "teacher.compression_sampling",
            "teacher.compression_max_lines",
        ),
        _writes,
        "{method} shows no candidates",
    ),
    Rule(
        ("student.sampling.support_limit",),
        lambda topology, method: topology.student.sampling.truncates,
        "without top_k, top_p or min_p all tokens are sampled from",
    ),
    Rule(
        ("evaluation.samples", "evaluation.limit", "evaluation.sampling"),
        lambda topology, method: topology.data.heldout is not None,
        "data.heldout is null",
    ),
    Rule(
        (
            "cluster.launcher",
            "cluster.ray_address",
            "cluster.strategy",
            "cluster.port",
            "cluster.join_seconds",
            "cluster.lease_seconds",
        ),
        lambda topology, method: bool(topology.cluster.hosts),
        "cluster.hosts is empty",
    ),
)


def unread_notes(topology: Topology, method: Method) -> list[str]:
    """One line for each reason why settings that are not at their defaults change nothing."""
    notes = []
    for rule in RULES:
        if rule.read(topology, method):
            continue
        because = rule.because.format(method=f"the method {method.name!r}")
        if said := [path for path in rule.settings if _said(topology, path)]:
            change = "changes" if len(said) == 1 else "change"
            notes.append(f"{' and '.join(said)} {change} nothing: {because}")
    return notes


def _said(topology: Topology, path: str) -> bool:
    """Whether the topology has something else in `path` than the default."""
    *sections, name = path.split(".")
    section: Any = topology
    for one in sections:
        section = getattr(section, one)
    if section is None:
        return False
    (field,) = (field for field in structs.fields(section) if field.name == name)
    default = field.default_factory() if field.default is NODEFAULT else field.default
    return bool(getattr(section, name) != default)
