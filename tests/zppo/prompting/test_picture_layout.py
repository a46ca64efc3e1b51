"""Where pictures and videos lie in prompts, against transformers' own processor and positions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vision_helpers
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_files import coloured
from recurrent_models import PICTURES_ALONE, TEMPLATE, VIDEO_SETTINGS, make_seeing, save_seeing
from video_reference import processed, processor_of

from zppo.data.question import Question
from zppo.prompting.picture_layout import MarkError, PictureLayout
from zppo.prompting.prompts import PromptSet
from zppo.prompting.tokenization import encode_prompts, load_picture_layout, load_tokenizer
from zppo_protocol.places import PLACE
from zppo_protocol.values import ChatMessage, Media, PictureReference, Prompt, VideoReference

pytestmark = pytest.mark.slow

SIZES = ((64, 96), (32, 32), (100, 70), (160, 40), (9, 20), (300, 280), (200, 1))
"""Within the bounds of the helper's processors and beyond both of them."""
VIDEO = 6


class Seeing:
    """A folder, what lies in it, and pictures of one colour."""

    def __init__(self, folder: Path) -> None:
        self.model = make_seeing()
        self.folder = save_seeing(self.model, folder / "model")
        self.tokenizer = load_tokenizer(str(self.folder), "student.model")
        self.layout = layout_of(self.folder)
        self.processor = processor_of(self.folder)

        @cache
        def picture(size: tuple[int, int]) -> PictureReference:
            return coloured(folder / f"{size}.png", "red", size)

        self.picture = picture

    def video(self, count: int, size: tuple[int, int], step: float = 0.5) -> VideoReference:
        frames, seconds = (self.picture(size),) * count, tuple(step * i for i in range(count))
        return VideoReference(frames=frames, seconds=seconds)

    def ids(self, prompt: Prompt) -> list[int]:
        [ids] = encode_prompts(self.tokenizer, [prompt], self.layout)
        return ids


def layout_of(folder: Path) -> PictureLayout:
    layout = load_picture_layout(
        str(folder), load_tokenizer(str(folder), "student.model"), "student.model"
    )
    assert layout is not None
    return layout


def asked(*media: Media, text: str = "what?") -> Prompt:
    return Prompt(messages=[ChatMessage(role="user", content=text)], media=list(media))


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seeing]:
    yield Seeing(tmp_path_factory.mktemp("seeing"))


MEDIA = st.lists(
    st.tuples(st.integers(0, 9), st.sampled_from(SIZES), st.floats(0.01, 40.0)), max_size=4
)
"""(frames, 0 for a picture; size; seconds from frame to frame)."""


WORDS = st.text(st.characters(exclude_characters=PLACE, exclude_categories=["Cs"]), max_size=5)
PICTURE_MARK = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO_MARK = "<|vision_start|><|video_pad|><|vision_end|>"


@settings(max_examples=60, deadline=None)
@given(kinds=MEDIA, words=st.lists(WORDS, min_size=5, max_size=5), between=st.booleans())
def test_a_prompt_is_what_transformers_makes_of_it(
    seeing: Seeing, kinds: list[Any], words: list[str], between: bool
) -> None:
    """Tokens and positions, of pictures and videos in any order, before and `between` words, with
    odd numbers of frames and of every size."""
    media = [
        seeing.video(count, size, step) if count else seeing.picture(size)
        for count, size, step in kinds
    ]
    marks = [VIDEO_MARK if count else PICTURE_MARK for count, *_ in kinds]
    first, *others = words[: len(media) + 1] if between else words[:1]
    ids = seeing.ids(asked(*media, text=PLACE.join([first, *others])))
    if not media:
        return
    written = (
        first + "".join(mark + text for mark, text in zip(marks, others, strict=True))
        if between
        else "".join(marks) + first
    )
    made = processed(seeing.processor, written, media)
    assert ids == made["input_ids"][0].tolist()
    placed = seeing.layout.placed(np.asarray(ids), media)
    positions, shift = seeing.layout.positions(len(ids), placed)
    expected, expected_shift = seeing.model.model.get_rope_index(
        made["input_ids"],
        made["mm_token_type_ids"],
        image_grid_thw=made.get("image_grid_thw"),
        video_grid_thw=made.get("video_grid_thw"),
    )
    np.testing.assert_array_equal(positions, expected[:, 0].numpy())
    assert shift == int(expected_shift)
    assert {one.medium for one in placed} == set(range(len(media)))
    places = np.concatenate([np.arange(one.start, one.start + one.length) for one in placed])
    np.testing.assert_array_equal(places, np.flatnonzero(np.isin(ids, list(seeing.layout.marks))))


def test_a_video_as_frames_is_read_off_the_marks(seeing: Seeing) -> None:
    """An engine that shows frames, and a trainer that would show the video, agree."""
    video = seeing.video(3, (64, 96))
    frames = PictureLayout(seeing.layout.family, seeing.tokenizer, "it shows no other")
    assert not frames.shows_videos and seeing.layout.shows_videos
    [ids] = encode_prompts(seeing.tokenizer, [asked(video)], frames)
    assert VIDEO not in ids
    placed = seeing.layout.placed(np.asarray(ids), [video])
    assert [one.medium for one in placed] == [0, 0, 0]
    assert [one.view.frames for one in placed] == [(frame,) for frame in video.frames]
    assert not any(one.view.of_video for one in placed)


@pytest.mark.parametrize(
    ("template", "settings", "because"),
    [
        (TEMPLATE, VIDEO_SETTINGS, ""),
        (PICTURES_ALONE, VIDEO_SETTINGS, "its chat template writes no mark of a video"),
        (
            TEMPLATE,
            VIDEO_SETTINGS | {"video_processor_type": "Another"},
            "its folder has no video_preprocessor_config.json of a kind that is known here",
        ),
        (
            TEMPLATE,
            None,
            "its folder has no video_preprocessor_config.json of a kind that is known here",
        ),
    ],
)
def test_what_a_folder_must_have_to_be_shown_videos(
    seeing: Seeing, tmp_path: Path, template: str, settings: dict[str, Any] | None, because: str
) -> None:
    folder = save_seeing(seeing.model, tmp_path / "model", template)
    file = folder / "video_preprocessor_config.json"
    file.unlink()
    if settings is not None:  # in the bundle that transformers writes of a whole processor
        (folder / "processor_config.json").write_text(json.dumps({"video_processor": settings}))
    layout = layout_of(folder)
    assert layout.frames_because == because
    video = seeing.video(3, (64, 96))
    [ids] = encode_prompts(load_tokenizer(str(folder), "x"), [asked(video)], layout)
    assert (VIDEO in ids) == (not because)
    np.testing.assert_array_equal(
        [one.view.of_video for one in layout.placed(np.asarray(ids), [video])],
        [not because] * (3 if because else 2),
    )


def test_a_family_without_a_video_input(tmp_path: Path) -> None:
    folder = vision_helpers.save_seeing(vision_helpers.make_seeing(), tmp_path / "model")
    assert layout_of(folder).frames_because == (
        "its folder has no video_preprocessor_config.json of a kind that is known here"
    )


def test_another_video_than_was_referred_to(seeing: Seeing) -> None:
    """Its times are words of the prompt, and its frames decide how many tokens it takes."""
    video = seeing.video(3, (64, 96))
    ids = np.asarray(seeing.ids(asked(seeing.picture((32, 32)), video)))
    others = {
        seeing.video(3, (64, 96), step=0.7): len(seeing.layout.expansion(video)),
        seeing.video(5, (64, 96)): len(seeing.layout.expansion(seeing.video(5, (64, 96)))),
    }
    for other, tokens in others.items():
        with pytest.raises(ValueError) as refused:
            seeing.layout.placed(ids, [seeing.picture((32, 32)), other])
        assert str(refused.value) == (
            f"video 1 of 1, of {len(other.frames)} frames of 64 × 96 pixels, should be {tokens} "
            "tokens, and other ones stand in the prompt"
        )
    with pytest.raises(ValueError) as more:
        seeing.layout.placed(ids, [seeing.picture((32, 32))])
    assert str(more.value) == "more marks of videos follow the last of 0 videos"
    with pytest.raises(ValueError, match="video 2 of 2"):
        seeing.layout.placed(ids, [seeing.picture((32, 32)), video, video])


def test_words_cannot_stand_for_a_video(seeing: Seeing) -> None:
    with pytest.raises(MarkError) as refused:
        seeing.ids(asked(seeing.picture((32, 32)), text="a <|video_pad|>"))
    assert str(refused.value) == "the prompt holds 1 mark of videos for 0 videos"


def test_every_prompt_that_asks_the_question_brings_its_video(seeing: Seeing) -> None:
    video = seeing.video(3, (64, 96))
    question = Question(id="q", text="what?", answer="1", grader="exact", media=(video,))
    prompts = PromptSet()
    asking = [
        prompts.plain(question),
        prompts.bcq(question, ["one", "two"]),
        prompts.ncq(question, ["1"], ["one"]),
        prompts.hint(question, "look"),
        prompts.write_hint(question, "one", 512, 5),
    ]
    for prompt in asking:
        [ids] = encode_prompts(seeing.tokenizer, [prompt], seeing.layout)
        placed = seeing.layout.placed(np.asarray(ids), [video])
        shown = [one.view.frames for one in placed]
        assert shown == [video.frames[:2], (video.frames[2],) * 2]
