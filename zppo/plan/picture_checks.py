"""Whether a model can be shown the pictures and videos of questions, and how, and be trained on
what it then says.

Found from the model folder's settings alone, before anything is started.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from zppo.algorithm.methods import get_method
from zppo.config.served import ServedModel, served_student, teachers
from zppo.config.topology import Topology
from zppo.data.question import Question
from zppo.errors import UserError, count_of, first_line
from zppo.plan.processes import asked_teachers, trainer_scores
from zppo.prompting.picture_families import FAMILIES
from zppo.prompting.picture_layout import PictureLayout
from zppo.prompting.tokenization import (
    PROCESSOR,
    VIDEO_PROCESSOR,
    load_picture_layout,
    load_processor,
    load_tokenizer,
)
from zppo_protocol.values import Media, PictureReference, VideoReference, pictures_of

BLIND = frozenset({"simulated"})
"""Engines that show pictures to no model."""
SCORES_TEXT = frozenset({"vllm"})
"""Engines that score responses to text alone."""
PROBED = PictureReference(path="probe", sha256="0" * 64, width=100, height=70)
"""A picture on which processors are tried; no model's patches divide it."""
OWN_LAYOUT = frozenset({"transformers"})
"""Engines that lay pictures out as `zppo.prompting.picture_layout` says, and know no others."""


def layout_of(served: ServedModel, tokenizer: Any) -> PictureLayout | None:
    """How `served` is shown pictures and videos, None for text alone. Raises UserError, also for
    settings of pictures that cannot be used where the engine reads them for text, too."""
    layout = load_picture_layout(served.model.model, tokenizer, served.model_path)
    if layout is not None and served.actor.engine not in OWN_LAYOUT:
        layout.check()
    return layout


def text_alone_note(served: ServedModel, tokenizer: Any) -> list[str]:
    """That `served` could be shown no picture, for whoever looks at a plan for text."""
    layout = layout_of(served, tokenizer)
    return (
        [] if layout is None or not layout.problem else [f"{layout.problem}; text does not need it"]
    )


def has_video(question: Question) -> bool:
    """Whether a video is among what is shown with the question."""
    return any(isinstance(medium, VideoReference) for medium in question.media)


def video_note(served: ServedModel, tokenizer: Any) -> list[str]:
    """How `served` is shown videos, for whoever looks at a plan; nothing where only its engine
    knows."""
    layout = layout_of(served, tokenizer)
    if layout is None:
        return []
    shown = f"{served.model_path}: {served.model.model!r} is shown"
    if layout.shows_videos and layout.family.video is not None:
        return [f"{shown} videos as videos, {layout.family.video.settings.frames} frames in one"]
    return [f"{shown} videos as several pictures, because {layout.frames_because}"]


def check_media(
    where: str, questions: Sequence[Question], topology: Topology, *, trained: bool = False
) -> None:
    """Raise UserError unless whoever is asked these questions, of the source of the setting
    `where`, can be shown their pictures and videos; and, if they are `trained` on, can be trained
    on them."""
    first = next((question.id for question in questions if question.media), None)
    if first is None:
        return
    check_sees(where, first, served_student(topology), trained=trained)
    for teacher in asked_teachers(topology):
        check_sees(where, first, teacher)
    if trained:
        check_scores(where, questions, topology)


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


def check_scores(where: str, questions: Sequence[Question], topology: Topology) -> None:
    """Raise UserError if a distillation's teacher cannot be shown the pictures of these questions,
    some of which have some, when it scores, in the trainer or in an engine."""
    method = get_method(topology.method.name)
    if not method.needs_scores or topology.teacher is None:
        return
    served = teachers(topology)[0]
    question = next(one.id for one in questions if one.media)
    if trainer_scores(method, topology.teacher):
        model = f"{served.model.model!r} ({served.model_path})"
        _check_known(where, question, served, f"the trainer cannot show them to {model}")
    elif served.actor.engine in SCORES_TEXT:
        raise UserError(
            f"{where}: the question {question!r} has pictures, and {served.actor_path}.engine "
            f"{served.actor.engine!r} scores responses to text alone; expected 'transformers', or "
            "that teacher.scoring is colocated"
        )
    _check_same_tokens(where, questions, served_student(topology), served)


def _check_same_tokens(
    where: str, questions: Sequence[Question], student: ServedModel, teacher: ServedModel
) -> None:
    """Raise UserError unless a teacher, which scores the student's own tokens, would make the same
    ones of every picture and video of these questions."""
    read, scored = (
        layout_of(one, load_tokenizer(one.model.model, one.model_path))
        for one in (student, teacher)
    )
    if read is None or scored is None:
        return
    for question in questions:
        for medium in question.media:
            if isinstance(medium, VideoReference) and read.shows_videos:
                _check_reads_video(where, question.id, student, teacher, scored)
            expected, found = (
                sum(map(len, one.shown_as(medium, as_video=read.shows_videos)))
                for one in (read, scored)
            )
            if expected != found:
                raise UserError(
                    f"{where}: the question {question.id!r} has a {_sized(medium)}, which is "
                    f"{expected} tokens for {student.model.model!r} and {found} for "
                    f"{teacher.model.model!r} ({teacher.model_path}), which scores the same "
                    f"tokens; expected one size in {PROCESSOR} and {VIDEO_PROCESSOR} of both"
                )


def _sized(medium: Media) -> str:
    frame = next(pictures_of([medium]))
    size = f"{frame.width} × {frame.height} pixels"
    if isinstance(medium, VideoReference):
        return f"video of {count_of(len(medium.frames), 'frame')} of {size}"
    return f"picture of {size}"


def _check_reads_video(
    where: str, question: str, student: ServedModel, teacher: ServedModel, scored: PictureLayout
) -> None:
    """Raise UserError if a teacher, which scores the student's own tokens, has no input for the
    video of `question`, which the student is shown as such."""
    if scored.family.video is not None:
        return
    raise UserError(
        f"{where}: the question {question!r} has a video, which {student.model.model!r} is shown "
        f"as a video, and {teacher.model.model!r} ({teacher.model_path}), which scores the same "
        "tokens, reads none so; expected a teacher with the video_preprocessor_config.json of its "
        "model, or no videos"
    )


def _check_known(where: str, question: str, served: ServedModel, cannot: str) -> None:
    folder, setting = served.model.model, served.model_path
    layout = load_picture_layout(folder, load_tokenizer(folder, setting), setting)
    if layout is None:
        raise UserError(
            f"{where}: the question {question!r} has pictures, and {cannot}; expected a model of "
            f"the family {' or '.join(sorted(FAMILIES))} with its processor (docs/pictures.md), or "
            "text only"
        )
    layout.check()
    _check_processor(layout, folder, setting)


def _check_processor(layout: PictureLayout, folder: str, where: str) -> None:
    """Raise UserError unless the model's processor can be loaded, and makes as much of a picture as
    its settings say."""
    processor = load_processor(folder, where)
    expected = layout.expansion(PROBED).count(layout.family.mark)
    try:
        made = processor(
            images=[Image.new("RGB", (PROBED.width, PROBED.height))], return_tensors="np"
        )
        found = layout.family.features_of(made)
    except Exception as error:  # settings that nobody foresaw raise whatever NumPy can
        raise UserError(
            f"{where}: the processor of pictures of {folder!r} fails ({first_line(error)}); "
            f"expected {PROCESSOR} as save_pretrained writes it"
        ) from error
    if found != expected:
        raise UserError(
            f"{where}: the processor of pictures of {folder!r} makes {found} features of a picture "
            f"of {PROBED.width} × {PROBED.height} pixels; expected {expected}, as {PROCESSOR} says"
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
