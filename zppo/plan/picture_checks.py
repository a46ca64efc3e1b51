"""Whether a model can be shown the pictures of questions, and be trained on what it then says.

Found from the model folder's settings alone, before anything is started.
"""

from __future__ import annotations

from zppo.config.served import ServedModel
from zppo.config.topology import Topology
from zppo.errors import UserError
from zppo.prompting.picture_families import FAMILIES
from zppo.prompting.tokenization import load_picture_layout, load_tokenizer

BLIND = frozenset({"simulated"})
"""Engines that show pictures to no model."""
OWN_LAYOUT = frozenset({"transformers"})
"""Engines that lay pictures out as `zppo.prompting.picture_families` says, and know no others."""


def check_sees(where: str, question: str, served: ServedModel, *, trained: bool = False) -> None:
    """Raise UserError if `served` cannot be shown the pictures of `question`, which stands in the
    source of the setting `where`; or, if it is `trained`, cannot be trained on them."""
    engine = served.actor.engine
    if engine in BLIND:
        raise UserError(
            f"{where}: the question {question!r} has pictures; expected text only, because the "
            f"engine {engine!r} cannot show them to the model"
        )
    if not trained and engine not in OWN_LAYOUT:
        return
    folder, setting = served.model.model, served.model_path
    if load_picture_layout(folder, load_tokenizer(folder, setting), setting) is None:
        model = f"{folder!r} ({setting})"
        cannot = (
            f"{model} cannot be trained on them"
            if trained
            else f"the engine {engine!r} cannot show them to {model}"
        )
        raise UserError(
            f"{where}: the question {question!r} has pictures, and {cannot}; expected a model of "
            f"the family {' or '.join(sorted(FAMILIES))} with its processor (docs/pictures.md), or "
            "text only"
        )


def check_tower(topology: Topology, *, pictured: bool) -> None:
    """Raise UserError for a tower that is to be trained where no question of data.train is
    `pictured`, or an engine would go on showing what the old one made of a picture."""
    if not topology.student.train_tower:
        return
    engine = topology.actors.rollout.engine
    if not pictured:
        raise UserError(
            "student.train_tower is true; expected false, because no question of data.train has a "
            "picture"
        )
    if engine not in OWN_LAYOUT:
        raise UserError(
            f"student.train_tower is true; expected false, because the engine {engine!r} keeps "
            "what a tower has made of a picture; or actors.rollout.engine transformers"
        )
