"""What a topology uses of the user's own, and what identifies its code.

Looking at files and versions imports nothing of a file's; only processes that are about to run the
code import it. Commands that read run directories come nowhere near.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from zppo import extensions
from zppo.algorithm.methods import method_names
from zppo.config.served import served_models
from zppo.config.topology import ENGINE_NAMES, Topology, is_own_source
from zppo.errors import UserError
from zppo.extensions import Kind
from zppo.grading.rewards import reward_names

LASTING: tuple[Kind, ...] = ("reward", "method", "source")
"""Kinds of which the steps of a run are made, so that a resumed one needs the same code."""


class Named(NamedTuple):
    """One extension of a topology: the `setting` that names it, and the names built in for it."""

    setting: str
    use: str
    kind: Kind
    built_in: list[str]


def named(topology: Topology) -> Iterator[Named]:
    """All extensions that a topology names, but for sinks, which keep what they were themselves."""
    for index, entry in enumerate(topology.data.reward):
        if entry.use not in reward_names():
            yield Named(f"data.reward[{index}].use", entry.use, "reward", reward_names())
        extractor = entry.args.get("extractor")
        if entry.use in reward_names() and isinstance(extractor, str):
            yield Named(f"data.reward[{index}].args.extractor", extractor, "reward", [])
    for setting, source in (
        ("data.train", topology.data.train),
        ("data.heldout", topology.data.heldout),
    ):
        if source is not None and is_own_source(source):
            yield Named(setting, source, "source", [])
    if topology.method.name not in method_names():
        yield Named("method.name", topology.method.name, "method", method_names())
    for one in served_models(topology):
        if one.actor.engine not in ENGINE_NAMES:
            setting = f"{one.actor_path}.engine"
            yield Named(setting, one.actor.engine, "engine", [*ENGINE_NAMES])


def identities(topology: Topology) -> dict[str, str]:
    """What each extension of a topology is now, by the name the topology has for it. Raises
    UserError if one is not there."""
    return {one.use: extensions.identity_of(*one) for one in named(topology)}


def changed(topology: Topology, before: Mapping[str, str], since: str) -> list[str]:
    """Notes on extensions that are no longer what they were. `since` says when, for sentences.

    Raises UserError for one that the trained steps were made with: a reward that has changed in
    silence would teach something else from here on.
    """
    notes = []
    for one in named(topology):
        now = extensions.identity_of(*one)
        if one.use in before and before[one.use] != now:
            said = f"{one.setting}: the code of {one.use!r} has changed since {since}"
            was = f"it was {_short(before[one.use])} and is {_short(now)}"
            if one.kind in LASTING:
                raise UserError(f"{said} ({was}); put the old code back, or begin a new run")
            notes.append(f"{said}: {was}")
    return notes


def _short(identity: str) -> str:
    """An identity with the first digits of its digest, enough to tell two apart."""
    package, _, digest = identity.rpartition("sha256:")
    return f"{package}sha256:{digest[:12]}"
