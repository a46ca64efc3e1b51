"""Prompts with pictures and videos for vLLM: chat messages with places for them, and what is shown
there.

A prompt goes to vLLM as token ids with *one* placeholder a picture or video, as the chat template
writes it, and the media beside it; vLLM's own processor of the model puts as many tokens in the
placeholder's stead as the medium has features. Two invariants:

- what comes back as the prompt of a sample is that expanded prompt, the ids that the model has
  really read, and the same as the model's own Hugging Face processor makes;
- where the size at which a model sees a picture is known here (`zppo.prompting.picture_families`),
  vLLM gets it in that size. Its processors resize with torchvision, which gives other pixels than
  Pillow, with which the trainer does.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoConfig

from zppo.data.pictures import PictureError, read_picture
from zppo.errors import UserError
from zppo.prompting.content import messages_in_parts
from zppo.prompting.picture_families import QwenPictures, VideoInput
from zppo.prompting.picture_tokens import resized
from zppo.prompting.tokenization import (
    encode_start,
    load_picture_layout,
    load_processor,
    takes_parts,
)
from zppo_actors.engines.base import EngineError
from zppo_actors.engines.tokenization import PromptTokenizer
from zppo_protocol.values import Media, PictureReference, Prompt, VideoReference, pictures_of

MARKS = ("image_token_id", "image_token_index")
"""Where configurations keep the id of the token that stands for (a part of) a picture."""
VIDEO_MARK = "video_token_id"
"""The same for a video."""
KINDS = ("image", "video")
"""What vLLM calls pictures and videos."""
Size = tuple[int, int]


def takes_pictures(folder: str) -> bool:
    """Whether the model in `folder` has an encoder of pictures."""
    return getattr(_config(folder), "vision_config", None) is not None


def _config(folder: str) -> Any:
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


class PictureTokenizer(PromptTokenizer):
    """The tokenizer of a model that takes pictures: placeholders stand where the chat template puts
    them."""

    def __init__(self, folder: str, where: str) -> None:
        """Raises UserError if the tokenizer has no chat template that takes messages of several
        parts, or for settings of pictures that do not say what they should."""
        super().__init__(folder, where)
        if not takes_parts(self._tokenizer):
            raise UserError(
                f"{where}: the model {folder!r} takes pictures, but its tokenizer has no chat "
                "template that takes messages of text and pictures"
            )
        layout = load_picture_layout(folder, self._tokenizer, where)
        if layout is not None:
            layout.check()
        self.shown = Shown(
            layout.family if layout and isinstance(layout.family, QwenPictures) else None,
            videos=layout is not None and layout.shows_videos,
            folder=folder,
            where=where,
        )
        config = _config(folder)
        marks = (mark for name in MARKS if (mark := getattr(config, name, None)) is not None)
        self._mark: Any = next(marks, None)
        self._video_mark: Any = getattr(config, VIDEO_MARK, None)

    def encode(self, prompt: Prompt) -> np.ndarray:
        """Token ids [P] int32 with one placeholder a picture or video.

        Raises EngineError for a prompt without tokens, one whose places are not one for each, or
        one with more marks of pictures or videos than it has of them: at such a mark vLLM would
        look for features that are not there, and its engine core ends.
        """
        video = (lambda _: {"type": "video"}) if self.shown.videos else None
        try:
            messages = messages_in_parts(prompt, lambda _: {"type": "image"}, video)
        except ValueError as error:
            raise EngineError(str(error), retryable=False) from error
        ids: list[int] = self._tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **prompt.chat_template_kwargs,
        )
        if prompt.start is not None:
            ids = ids + encode_start(self._tokenizer, prompt.start)
        if not ids:
            raise EngineError("the prompt has no tokens", retryable=False)
        pictures, videos = self.shown.split(prompt.media)
        for kind, mark, count in (
            ("picture", self._mark, len(pictures)),
            ("video", self._video_mark, len(videos)),
        ):
            if ids.count(mark) > count:
                raise EngineError(
                    f"the words of the prompt hold the mark of a {kind}", retryable=False
                )
        return np.asarray(ids, dtype=np.int32)


class Shown:
    """How one model is shown pictures and videos: in which size, where that is known (`family`),
    and whether `videos` as such or as their frames."""

    def __init__(
        self, family: QwenPictures | None, *, videos: bool, folder: str, where: str
    ) -> None:
        self.videos = videos
        self._family = family
        self._folder, self._where = folder, where

    @functools.cached_property
    def _filter(self) -> Image.Resampling:
        """With which the trainer resizes pictures of this model. Raises UserError."""
        return Image.Resampling(load_processor(self._folder, self._where).resample)

    def split(self, media: Sequence[Media]) -> tuple[list[PictureReference], list[VideoReference]]:
        """What is shown as pictures, and as videos."""
        videos = [one for one in media if self.videos and isinstance(one, VideoReference)]
        rest = [one for one in media if not (self.videos and isinstance(one, VideoReference))]
        return list(pictures_of(rest)), videos

    def open(self, media: Sequence[Media]) -> dict[str, Any]:
        """What a prompt for vLLM has beside its tokens. Raises EngineError for a file that is not
        what was referred to, or what the model does not take, and UserError for a folder without
        the processor that pictures take."""
        pictures, videos = self.split(media)
        try:
            data: dict[str, Any] = {}
            if pictures:
                data["image"] = [self._picture(one) for one in pictures]
            if videos:
                data["video"] = [self._video(one) for one in videos]
        except (PictureError, ValueError) as error:
            raise EngineError(str(error), retryable=False) from error
        fitted = {} if self._family is None else {"mm_processor_kwargs": {"do_resize": False}}
        return {"multi_modal_data": data} | fitted

    def tokens(self, media: Sequence[Media], found: Mapping[str, Sequence[int]]) -> list[int]:
        """Tokens of each picture or video, from those that vLLM found for each kind, in order."""
        left: dict[str, Iterator[int]] = {kind: iter(found.get(kind, ())) for kind in KINDS}
        return [
            next(left["video"])
            if self.videos and isinstance(one, VideoReference)
            else sum(itertools.islice(left["image"], len(list(pictures_of([one])))))
            for one in media
        ]

    def _picture(self, reference: PictureReference) -> Image.Image:
        picture = read_picture(reference)
        if self._family is None:
            return picture
        size = resized(reference.width, reference.height, self._family.settings)
        return _resized(picture, size, self._filter)

    def _video(self, video: VideoReference) -> tuple[np.ndarray, dict[str, Any]]:
        """Frames [T, H, W, 3] and their times as vLLM's processor takes them; at least as many as
        the model merges, the last one repeated."""
        assert self._family is not None and self._family.video is not None
        form: VideoInput = self._family.video
        size = form.size(video)
        again = max(0, form.settings.frames - len(video.frames))
        frames = [
            np.asarray(_resized(read_picture(one), size, Image.Resampling(form.resample)))
            for one in video.frames
        ]
        frames += frames[-1:] * again
        times = [*video.seconds, *video.seconds[-1:] * again]
        # A frame a second, of which these were taken: the place of a frame is its time.
        return np.stack(frames), {
            "fps": 1.0,
            "frames_indices": times,
            "total_num_frames": len(times),
            "do_sample_frames": False,
        }


def _resized(picture: Image.Image, size: Size, by: Image.Resampling) -> Image.Image:
    return picture if picture.size == size else picture.resize(size, by)
