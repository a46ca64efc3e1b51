"""Refusal of settings of the loss that do not go together, or that nothing would read.

A setting that is read by nobody is a mistake somewhere else: a surrogate, a correction or a KL that
was meant and not asked for. So each setting says here what it needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from zppo.algorithm.methods import Method
from zppo.config.method import MethodConfig
from zppo.config.presets import PRESETS
from zppo.config.topology import Topology
from zppo.errors import UserError

POLICY_LOSS = (
    "preset",
    "advantage_rewards",
    "surrogate",
    "ratio_level",
    "sapo_temperature_positive",
    "sapo_temperature_negative",
    "fixed_length",
    "correction_floor",
    "correction_level",
    "entropy_coefficient",
    "entropy_target",
    "entropy_step",
    "entropy_coefficient_max",
    "entropy_quantile",
    "kl_coefficient",
    "kl_estimator",
    "kl_correction",
)
"""Settings that a distillation does not read, beside those that are refused in `checks`."""
WITHIN_GROUP = ("grpo_bessel", "grpo", "center_only", "rloo")
"""Advantages that see one group at a time."""
UNREAD_BOUNDS = {"cispo": ("dual_clip",), "sapo": ("clip_low", "clip_high", "dual_clip")}
"""Bounds that a surrogate does not have. Many presets fill them in, so they are noted, and only
where the topology itself says them."""
DEFAULTS = MethodConfig()


class Need(NamedTuple):
    """`setting` may differ from its default only where `met`; `because` says why not elsewhere."""

    setting: str
    met: bool
    because: str


def check_loss(topology: Topology, method: Method) -> None:
    """Raise UserError for the first setting of the loss that has nothing to act on."""
    config = topology.method
    if method.needs_scores:
        for setting in POLICY_LOSS:
            _refuse_unread(config, setting, f"{method.name!r} has no policy loss")
        return
    for setting, met, because in _needs(config):
        if not met:
            _refuse_unread(config, setting, because)
    _check_bounds(config)
    if config.advantage_rewards == "decoupled":
        _check_decoupled(topology)


def _check_decoupled(topology: Topology) -> None:
    config, rewards = topology.method, len(topology.data.reward)
    if rewards < 2:
        raise UserError(
            "method.advantage_rewards is 'decoupled'; expected 'sum', because data.reward has "
            f"{rewards or 'no'} {'entry' if rewards == 1 else 'entries'}, and there is nothing to "
            "normalise apart"
        )
    if config.advantage not in WITHIN_GROUP:
        raise UserError(
            f"method.advantage is {config.advantage!r}; expected one of {', '.join(WITHIN_GROUP)}, "
            "because method.advantage_rewards 'decoupled' normalises each reward within its group"
        )


def preset_notes(config: MethodConfig) -> list[str]:
    """One line where the topology says otherwise than the preset that it names."""
    if config.preset is None:
        return []
    other = [
        f"{name} {shown(getattr(config, name))} (not {shown(value)})"
        for name, value in PRESETS[config.preset].items()
        if getattr(config, name) != value
    ]
    if not other:
        return []
    return [f"method.preset is {config.preset!r}, but the topology sets {', '.join(other)}"]


def preset_values(config: MethodConfig) -> str:
    """What the preset stands for, as the run has it."""
    names = PRESETS[config.preset] if config.preset is not None else {}
    return ", ".join(f"{name} {shown(getattr(config, name))}" for name in names)


def loss_notes(config: MethodConfig) -> list[str]:
    """What works but may surprise."""
    notes = preset_notes(config)
    if config.ratio_level == "sequence" and config.loss_normalisation in ("token", "micro_batch"):
        notes.append(
            f"method.ratio_level is 'sequence' and method.loss_normalisation "
            f"{config.loss_normalisation!r}: a response counts by its length; GSPO has 'sequence'"
        )
    whole = config.advantage_scope == "step" and config.advantage_rewards == "sum"
    if whole and config.advantage in WITHIN_GROUP:
        notes.append(
            f"method.advantage_scope is 'step', which changes nothing: method.advantage "
            f"{config.advantage!r} sees one group at a time"
        )
    notes += _unread_bounds(config)
    return notes


def _unread_bounds(config: MethodConfig) -> Iterator[str]:
    filled_in = PRESETS[config.preset] if config.preset is not None else {}
    for name in UNREAD_BOUNDS.get(config.surrogate, ()):
        value, default = getattr(config, name), getattr(DEFAULTS, name)
        if value not in (default, filled_in.get(name, default)):
            yield (
                f"method.{name} is {shown(value)}, which changes nothing: method.surrogate "
                f"{config.surrogate!r} has no such bound"
            )


def shown(value: object) -> str:
    """A value as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _needs(config: MethodConfig) -> Iterator[Need]:
    surrogate, corrected = config.surrogate, config.correction
    sapo = surrogate == "sapo"
    other = f"method.surrogate is {surrogate!r}"
    yield Need("sapo_temperature_positive", sapo, other)
    yield Need("sapo_temperature_negative", sapo, other)
    yield Need("ratio_level", surrogate == "clip", f"{other}, which weighs single tokens")
    normalisation = config.loss_normalisation
    fixed = f"method.loss_normalisation is {normalisation!r}"
    yield Need("fixed_length", normalisation == "fixed_length", fixed)
    against = "method.ratio is 'behaviour', which leaves nothing to correct"
    yield Need("correction_floor", config.ratio == "proximal", against)
    yield Need("correction_level", config.ratio == "proximal", against)
    masks = f"method.correction is {corrected!r}, and only a mask has a lower bound"
    yield Need("correction_floor", corrected == "mask", masks)
    yield Need("correction_level", corrected != "none", "method.correction is 'none'")
    adaptive = config.entropy_target is not None
    for name in ("entropy_step", "entropy_coefficient_max"):
        yield Need(name, adaptive, "method.entropy_target is null: the coefficient stays")
    for name in ("kl_estimator", "kl_correction"):
        yield Need(name, config.kl_coefficient > 0, "method.kl_coefficient is 0")


def _check_bounds(config: MethodConfig) -> None:
    floor, cap = config.correction_floor, config.correction_cap
    if floor is not None and floor >= cap:
        raise UserError(
            f"method.correction_floor is {floor:g}; expected null or a number below {cap:g}, "
            "method.correction_cap"
        )
    if config.entropy_target is not None and config.entropy_coefficient == 0.0:
        raise UserError(
            f"method.entropy_target is {config.entropy_target:g}; expected null, or a "
            "method.entropy_coefficient above 0 to begin with"
        )
    most = config.entropy_coefficient_max
    if config.entropy_target is not None and config.entropy_coefficient > most:
        raise UserError(
            f"method.entropy_coefficient is {config.entropy_coefficient:g}; expected at most "
            f"{most:g}, method.entropy_coefficient_max"
        )
    if config.kl_estimator == "k2" and config.kl_correction == "straight_through":
        raise UserError(
            "method.kl_correction is 'straight_through'; expected 'none' or 'importance', because "
            "the gradient of method.kl_estimator 'k2' is the right one already"
        )


def _refuse_unread(config: MethodConfig, setting: str, because: str) -> None:
    value, default = getattr(config, setting), getattr(DEFAULTS, setting)
    if value != default:
        raise UserError(
            f"method.{setting} is {_quoted(value)}; expected {_quoted(default)}, because {because}"
        )


def _quoted(value: object) -> str:
    return repr(value) if isinstance(value, str) else shown(value)
