"""Whether a model can be shown the pictures of questions, and be trained on what it then says.

Found from the model folder's settings alone, before anything is started.
"""

from __future__ import annotations

from zppo.algorithm.methods import get_method
from zppo.config.served import ServedModel, teachers
from zppo.config.topology import Topology
from zppo.errors import UserError
from zppo.plan.processes import trainer_scores
from zppo.prompting.picture_families import FAMILIES
from zppo.prompting.tokenization import load_picture_layout, load_tokenizer

BLIND = frozenset({"simulated"})
"""Engines that show pictures to no model."""
SCORES_TEXT = frozenset({"vllm"})
"""Engines that score responses to text alone."""
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
    model = f"{served.model.model!r} ({served.model_path})"
    cannot = (
        f"{model} cannot be trained on them"
        if trained
        else f"the engine {engine!r} cannot show them to {model}"
    )
    _check_known(where, question, served, cannot)


def check_scores(where: str, question: str, topology: Topology) -> None:
    """Raise UserError if a distillation's teacher cannot be shown the pictures of `question` when
    it scores, in the trainer or in an engine."""
    method = get_method(topology.method.name)
    if not method.needs_scores or topology.teacher is None:
        return
    served = teachers(topology)[0]
    if trainer_scores(method, topology.teacher):
        model = f"{served.model.model!r} ({served.model_path})"
        _check_known(where, question, served, f"the trainer cannot show them to {model}")
    elif served.actor.engine in SCORES_TEXT:
        raise UserError(
            f"{where}: the question {question!r} has pictures, and {served.actor_path}.engine "
            f"{served.actor.engine!r} scores responses to text alone; expected 'transformers', or "
            "that teacher.scoring is colocated"
        )


def _check_known(where: str, question: str, served: ServedModel, cannot: str) -> None:
    folder, setting = served.model.model, served.model_path
    if load_picture_layout(folder, load_tokenizer(folder, setting), setting) is None:
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
