"""Prompts as token ids: the one way from chat messages to what a model reads, for engines and for
checks at launch.

A prompt goes through the chat template of the tokenizer, up to where the response starts. A
tokenizer without a template gets the messages one below the other, and nothing behind them. A start
that is given to the response ends the prompt: the same tokens are then read and not sampled. Where
the model's layout of pictures is given, a prompt's pictures stand at their places, each as the
tokens that the model reads there.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec

from zppo.config.served import ServedModel
from zppo.errors import UserError, first_line
from zppo.prompting.content import messages_as_text, messages_in_parts
from zppo.prompting.picture_families import (
    PictureFamily,
    SettingsError,
    UnreadPictures,
    is_known,
    picture_family,
)
from zppo.prompting.picture_layout import PictureLayout
from zppo_protocol.values import Prompt, ResponseStart, share_of

_runs_models = True
PROBE = "probe"
PROCESSOR, BUNDLE, IN_BUNDLE = (
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor",
)
"""Where a model folder keeps the settings of its processor of pictures: a file of its own, or a
part of another one."""
VIDEO_PROCESSOR, VIDEO_IN_BUNDLE = "video_preprocessor_config.json", "video_processor"
"""The same of its processor of videos."""
NO_VIDEO_INPUT = f"its folder has no {VIDEO_PROCESSOR} of a kind that is known here"
NO_VIDEO_MARK = "its chat template writes no mark of a video"


def run_no_models() -> None:
    """Say that this process loads tokenizers and no model. transformers is then imported without
    torch, in a third of the time, and for the whole of the process. What it has to say of
    configurations, which may be its own defaults, is in the logs of those that run the models."""
    global _runs_models
    _runs_models = False
    logging.getLogger("transformers.configuration_utils").setLevel(logging.ERROR)


@contextmanager
def _torch_hidden() -> Iterator[None]:
    """Where no models are run, imports meanwhile find no torch, unless it or transformers is there
    already, and transformers does not say that there is none: it loads itself again for some of its
    parts."""
    if _runs_models:
        yield
        return
    advice = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(advice)
    os.environ[advice] = "1"
    hidden = "torch" not in sys.modules and "transformers" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules["torch"]
        del os.environ[advice]
        os.environ.update({} if before is None else {advice: before})


def load_tokenizer(folder: str, where: str) -> Any:
    """The tokenizer of a model folder. Raises UserError, naming the setting `where`, if it cannot
    be loaded; a name that is no folder is not looked for on the Hub."""
    if not Path(folder).is_dir():
        raise UserError(
            f"{where}: there is no model folder {folder!r}; expected one as save_pretrained or `hf "
            "download` writes it"
        )
    with _torch_hidden():  # and imported here, because most commands need no tokenizer
        from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # damaged files raise whatever the library's parsers can
        raise UserError(
            f"{where}: {folder!r} has no tokenizer that can be loaded ({first_line(error)})"
        ) from error


def load_picture_layout(folder: str, tokenizer: Any, where: str) -> PictureLayout | None:
    """How the model in `folder` reads pictures and videos in a prompt; None if it does not, or is
    of a family that is trained on text alone.

    The one place that decides whether a model is shown a video as such: if its family, its folder
    and its chat template have what that takes. Settings of its processors that cannot be used are
    no obstacle to text: `PictureLayout.problem` says what is wrong with them.
    Raises UserError, naming the setting `where`, for a config.json that cannot be read.
    """
    config = _settings(Path(folder) / "config.json", where)
    family = _family(folder, config, where)
    if family is None:
        return None
    return PictureLayout(family, tokenizer, _frames_because(family, tokenizer))


def _family(folder: str, config: Any, where: str) -> PictureFamily | None:
    if not (isinstance(config, dict) and is_known(config)):
        return None
    path, mark = Path(folder), config.get("image_token_id")
    try:
        bundle = _settings(path / BUNDLE, where)
        own = _settings(path / PROCESSOR, where) or bundle.get(IN_BUNDLE)
        videos = bundle.get(VIDEO_IN_BUNDLE) or _settings(path / VIDEO_PROCESSOR, where)
        return picture_family(config, own, videos)
    except SettingsError as error:
        problem = f"{where}: {folder!r} cannot be shown pictures: {error}"
    except UserError as error:
        problem = str(error)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = (
            f"{where}: {folder!r} does not say how its model reads pictures ({first_line(error)}); "
            f"expected config.json, {PROCESSOR} and {VIDEO_PROCESSOR} as save_pretrained writes "
            "them"
        )
    if not isinstance(mark, int):
        raise UserError(problem)
    return UnreadPictures(mark, problem)


def load_processor(folder: str, where: str) -> Any:
    """The model's processor of pictures, on Pillow. Raises UserError, naming the setting
    `where`."""
    with _torch_hidden():
        from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # damaged files raise whatever the library's parsers can
        raise UserError(
            f"{where}: {folder!r} has no processor of pictures that can be loaded "
            f"({first_line(error)}), and a question has pictures; expected {PROCESSOR} as "
            "save_pretrained writes it, or text only"
        ) from error


def _frames_because(family: PictureFamily, tokenizer: Any) -> str:
    """Why a model is shown the frames of a video as pictures; empty if it is shown the video."""
    if family.video is None:
        return NO_VIDEO_INPUT
    parts = [{"type": "video"}, {"type": "text", "text": PROBE}]
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            [{"role": "user", "content": parts}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
    except Exception:  # a template may raise whatever Jinja2 can
        return NO_VIDEO_MARK
    return "" if ids.count(family.video.mark) == 1 else NO_VIDEO_MARK


def _settings(path: Path, where: str) -> Any:
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: {str(path)!r} cannot be read: {error}") from None


def encode_prompts(
    tokenizer: Any, prompts: Sequence[Prompt], pictures: PictureLayout | None = None
) -> list[list[int]]:
    """Token ids of each prompt, in one batch, and behind them those of its response's start.
    Without a layout of `pictures` these are left out.

    Raises ValueError for a picture or video that the model does not take, and MarkError for words,
    of the prompt or of its response's start, that hold the mark of one.
    """
    if not prompts:
        return []
    chats = _encode_chats(tokenizer, prompts, pictures)
    encoded = [
        ids if prompt.start is None else ids + encode_start(tokenizer, prompt.start)
        for prompt, ids in zip(prompts, chats, strict=True)
    ]
    if pictures is None:
        return encoded
    return [
        pictures.expand(ids, prompt.media) for prompt, ids in zip(prompts, encoded, strict=True)
    ]


def written_out(tokenizer: Any, prompt: Prompt, pictures: PictureLayout | None = None) -> str:
    """What the chat template makes of a prompt that `encode_prompts` cuts into tokens. Raises
    whatever the template does."""
    (chat,) = _chats(tokenizer, [prompt], pictures)
    text: str = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=False, **prompt.chat_template_kwargs
    )
    return text


def takes_parts(tokenizer: Any) -> bool:
    """Whether the chat template shows the text of a part, and not the part itself as Python prints
    it."""
    parts = [{"type": "text", "text": PROBE}]
    messages = [{"role": "user", "content": parts}]
    try:
        text: str = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
    except Exception:  # a template may raise whatever Jinja2 can
        return False
    return PROBE in text and "'type'" not in text


def encode_start(tokenizer: Any, start: ResponseStart) -> list[int]:
    """The first ⌊share·n⌋ of the n tokens of its text (Algorithm 6)."""
    ids: list[int] = tokenizer(start.text, add_special_tokens=False)["input_ids"]
    return ids[: share_of(start.share, len(ids))]


def check_same_vocabulary(student: ServedModel, teacher: ServedModel) -> None:
    """Raise UserError, with the first difference, unless both tokenizers give every token the same
    id.

    Distillation compares probabilities id by id, and a teacher's tokens are trained on as ids.
    Logits that a model has beyond its tokenizer do not count.
    """
    students, teachers = (
        {
            index: token
            for token, index in load_tokenizer(one.model.model, one.model_path).get_vocab().items()
        }
        for one in (student, teacher)
    )
    different = sorted(index for index, token in (students.items() ^ teachers.items()))
    if different:
        first = different[0]
        raise UserError(
            f"{teacher.model_path}: the method needs one vocabulary, but token {first} is "
            f"{_quoted(students.get(first))} for the student {student.model.model!r} and "
            f"{_quoted(teachers.get(first))} for the teacher {teacher.model.model!r}"
        )


def _quoted(token: str | None) -> str:
    return "no token" if token is None else repr(token)


def _encode_chats(
    tokenizer: Any, prompts: Sequence[Prompt], pictures: PictureLayout | None
) -> list[list[int]]:
    if tokenizer.chat_template is None:
        texts = [
            "\n".join(one["content"] for one in messages_as_text(prompt)) for prompt in prompts
        ]
        bare = tokenizer(texts, add_special_tokens=False)["input_ids"]
        framed = tokenizer(texts)["input_ids"]
        return [_open_ended(ids, inner) for ids, inner in zip(framed, bare, strict=True)]
    encoded: list[list[int]] = []
    for variables, alike in groupby(prompts, key=lambda prompt: prompt.chat_template_kwargs):
        chats = _chats(tokenizer, [*alike], pictures)
        encoded += tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=False, **variables
        )
    return encoded


def _chats(
    tokenizer: Any, prompts: Sequence[Prompt], pictures: PictureLayout | None
) -> list[list[Any]]:
    """The messages of each prompt as the chat template is given them: in parts for a model that is
    shown pictures, if its template takes them."""
    if pictures is None or not takes_parts(tokenizer):
        return [list(messages_as_text(prompt)) for prompt in prompts]
    video = (lambda _: {"type": "video"}) if pictures.shows_videos else None
    return [messages_in_parts(prompt, lambda _: {"type": "image"}, video) for prompt in prompts]


def _open_ended(framed: list[int], bare: list[int]) -> list[int]:
    """A text's ids with what the tokenizer puts before them and without what it puts behind: an
    end token there would tell the model that all is said."""
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return framed[: start + len(bare)]
    return framed
