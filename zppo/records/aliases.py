"""What other systems call the metrics of a step, so that dashboards made for them find a run of
ours. `docs/metrics.md` shows the same table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from zppo.config.sinks import Tool

PART = "<part>"


class Alias(NamedTuple):
    """`name` of `tool` is the sum of `ours`; one minus it if `complement`. `<part>` in both stands
    for any name."""

    tool: Tool
    name: str
    ours: tuple[str, ...]
    complement: bool = False

    def of(self, line: Mapping[str, float | int]) -> Iterator[tuple[str, float | int]]:
        """(name, value) of what the tool would have written at a step."""
        family, whole, _ = self.ours[0].partition(PART)
        if not whole:
            value = self._value(line)
            if value is not None:
                yield self.name, value
            return
        for name, value in line.items():
            if name.startswith(family):
                yield self.name.replace(PART, name.removeprefix(family)), value

    def _value(self, line: Mapping[str, float | int]) -> float | int | None:
        """None where ours was not measured."""
        if not all(name in line for name in self.ours):
            return None
        total = sum(line[name] for name in self.ours)
        return 1.0 - total if self.complement else total


ALIASES: tuple[Alias, ...] = (
    Alias("trl", "reward", ("accuracy/plain",)),
    Alias("trl", "reward", ("reward/plain",)),
    Alias("trl", "rewards/<part>/mean", ("reward_part/<part>",)),
    Alias("trl", "frac_reward_zero_std", ("audit/plain/mixed",), complement=True),
    Alias("trl", "completions/mean_length", ("length/mean",)),
    Alias("trl", "completions/clipped_ratio", ("length/truncated",)),
    Alias("trl", "loss", ("train/loss",)),
    Alias("trl", "grad_norm", ("train/grad_norm",)),
    Alias("trl", "entropy", ("train/entropy",)),
    Alias("trl", "clip_ratio/low_mean", ("train/clip_low_share",)),
    Alias("trl", "clip_ratio/high_mean", ("train/clip_high_share",)),
    Alias("trl", "sampling/importance_sampling_ratio/mean", ("train/importance_weight_mean",)),
    Alias("trl", "sampling/sampling_logp_difference/max", ("train/log_prob_gap_max",)),
    Alias("trl", "kl", ("train/reference_kl",)),
    Alias("trl", "step_time", ("time/step",)),
    Alias("verl", "critic/score/mean", ("accuracy/plain",)),
    Alias("verl", "critic/score/mean", ("reward/plain",)),
    Alias("verl", "response_length/mean", ("length/mean",)),
    Alias("verl", "response_length/clip_ratio", ("length/truncated",)),
    Alias("verl", "actor/pg_loss", ("train/loss",)),
    Alias("verl", "actor/grad_norm", ("train/grad_norm",)),
    Alias("verl", "actor/entropy", ("train/entropy",)),
    Alias("verl", "actor/pg_clipfrac", ("train/clip_low_share", "train/clip_high_share")),
    Alias("verl", "actor/pg_clipfrac_lower", ("train/dual_clip_share",)),
    Alias("verl", "actor/ppo_kl", ("train/approximate_kl",)),
    Alias("verl", "actor/kl_loss", ("train/reference_kl",)),
    Alias("verl", "rollout_corr/kl", ("train/mismatch_kl",)),
    Alias("verl", "rollout_corr/rollout_is_mean", ("train/importance_weight_mean",)),
    Alias("verl", "timing_s/step", ("time/step",)),
    Alias("prime_rl", "loss/mean", ("train/loss",)),
    Alias("prime_rl", "optim/grad_norm", ("train/grad_norm",)),
    Alias("prime_rl", "off_policy/mean", ("staleness/mean",)),
    Alias("prime_rl", "off_policy/max", ("staleness/max",)),
    Alias("prime_rl", "off_policy/in_flight/mean", ("staleness/in_flight",)),
    Alias("prime_rl", "off_policy/in_queue/mean", ("staleness/in_queue",)),
    Alias("prime_rl", "time/wait_for_batch", ("time/trainer_wait",)),
)
"""Of two with the same name the later counts where it was measured: what is earned, not what is
right. Names that prime-rl shares with us (`time/step`) need no alias."""


def with_aliases(line: Mapping[str, float | int], tools: Iterable[Tool]) -> dict[str, float | int]:
    """The metrics of a step, and after them what `tools` call them."""
    chosen = set(tools)
    theirs = (pair for alias in ALIASES if alias.tool in chosen for pair in alias.of(line))
    return {**line, **dict(theirs)}
