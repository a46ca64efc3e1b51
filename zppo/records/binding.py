"""What a checkpoint was made with: the settings that may not change, the corpus, the models' files.

It stands in the manifest of each checkpoint, so that an edited `run.json`, other questions or a
swapped model folder are noticed when a run goes on, by the launcher and by every new attempt. The
settings stand there as values, because a sentence that names the old one can be acted upon; corpus
and model folders as digests. Checkpoints of earlier versions have none of it and are not checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from zppo.config.served import served_student, teachers
from zppo.config.topology import Topology
from zppo.errors import UserError
from zppo.plan.extensions import identities
from zppo.plan.fingerprint import fingerprint

STUDENT = "student.model"
MAX_STALENESS, BATCHES = "scheduler.max_staleness", "scheduler.batches"
RANKS = "actors.trainer.ranks"
PROMPTS = ("data.templates", "data.system_prompt", "data.min_pixels", "data.max_pixels")
FIXED = {
    "method": "the trained steps were made by another recipe",
    "data.reward": "the trained steps were earned by other rewards",
    "data.heldout": "accuracies before and after would be of other questions",
    **dict.fromkeys(PROMPTS, "the trained steps read other prompts"),
    "data": "the data cursor counts questions of another corpus",
    "student": "the checkpoint holds another student",
    "run.seed": "the order of the corpus would change in the middle",
    "optimizer.state_dtype": "the checkpoint holds optimizer states of another kind",
    BATCHES: "what is in flight was begun for the other",
}
"""Settings that a resumed run must keep, and why."""
CONTENTS = {
    "data.heldout": "results on other questions would not compare",
    "data.templates": "the trained steps read other prompts",
}
"""Settings whose files must stay as they were when the run began, and why; the questions of
`data.train` and model folders have rules of their own."""


class MadeWith(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """`settings`: value of each fixed setting by its dotted name, `scheduler.max_staleness`, and
    the number of `actors.trainer.ranks`.
    `corpus`: digest of the training questions. `models`: fingerprint of each model folder.
    `extensions`: identity of the user's own code, by its name in the topology."""

    settings: dict[str, Any]
    corpus: str
    models: dict[str, str]
    extensions: dict[str, str] = {}


class Difference(NamedTuple):
    setting: str
    before: Any
    after: Any
    reason: str


def made_with(topology: Topology, corpus: str) -> MadeWith:
    """What a run of this topology on the questions of digest `corpus` makes its checkpoints with.

    Model folders are read: small files whole, weights in part.
    """
    folders = {Path(model) for model in model_folders(topology).values()}
    return MadeWith(
        settings=fixed_settings(topology),
        corpus=corpus,
        models={str(path): fingerprint(path) for path in sorted(folders) if path.is_dir()},
        extensions=identities(topology),
    )


def model_folders(topology: Topology) -> dict[str, str]:
    """Setting -> the model it names; one behind a server is no folder."""
    return {
        one.model_path: one.model.model for one in [served_student(topology), *teachers(topology)]
    }


def fixed_settings(topology: Topology) -> dict[str, Any]:
    """Dotted name -> value, as JSON has it."""
    leaves = dict(_leaves(topology, ""))
    kept = {name: value for name, value in leaves.items() if _reason(name) is not None}
    counts = {
        MAX_STALENESS: leaves[MAX_STALENESS],
        # What is not set is what runs have begun with since before there was a choice.
        BATCHES: leaves[BATCHES] or "windows",
        RANKS: len(topology.actors.trainer.rank_devices),
    }
    return kept | counts


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> Difference | None:
    """The first fixed setting that is not what it was. One that only one side knows is of another
    version of this program, and is left out."""
    for name, before in old.items():
        reason = _reason(name)
        if reason is not None and name in new and new[name] != before:
            return Difference(name, before, new[name], reason)
    return None


def check_folders(made: MadeWith, topology: Topology, now: MadeWith, step: int) -> None:
    """Raise UserError if a model folder is not the one that the checkpoint of `step` was made with.

    A teacher may be replaced by one of another path.
    """
    for where, path in model_folders(topology).items():
        if path in made.models and made.models[path] != now.models.get(path):
            other = f", or name a copy of the new model in {where}" if where != STUDENT else ""
            raise UserError(
                f"{where}: the files of {path!r} have changed since the checkpoint of step {step} "
                f"was written; put the old ones back{other}"
            )


def check_contents(topology: Topology, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise UserError for what is not as it was `before`, when the run began: digests by setting.
    A record of an earlier version has none."""
    for setting, why in CONTENTS.items():
        if before.get(setting, now[setting]) != now[setting]:
            path = getattr(topology.data, setting.removeprefix("data."))
            raise UserError(
                f"{setting}: {path!r} has changed since the run began; put the old content back, "
                f"because {why}"
            )


def _reason(setting: str) -> str | None:
    """Why a setting cannot change, or None if it can."""
    return next(
        (why for path, why in FIXED.items() if setting == path or setting.startswith(f"{path}.")),
        None,
    )


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Struct):
        for field in value.__struct_fields__:
            yield from _leaves(getattr(value, field), f"{name}.{field}" if name else field)
    else:
        yield name, msgspec.json.decode(msgspec.json.encode(value))
