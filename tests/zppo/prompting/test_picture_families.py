"""What a picture becomes in a prompt, against the processors and models of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from recurrent_models import LARGEST, SMALLEST, make_image_processor, make_seeing
from transformers import Idefics3Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from vision_helpers import make_tokenizer

from zppo.prompting.picture_families import (
    IdeficsPictures,
    QwenPictures,
    picture_family,
    unsampled_ids,
)
from zppo.prompting.picture_layout import PictureLayout
from zppo.prompting.picture_tokens import PictureTokens
from zppo_protocol.values import PictureReference

START, END, MARK, VIDEO = 3, 4, 5, 6
"""Ids of the marks of `make_seeing`."""
QWEN = QwenPictures(MARK, PictureTokens(patch=16, merge=2, min_pixels=SMALLEST, max_pixels=LARGEST))
SIDES = st.integers(1, 300)
Texts = list[list[int]]


def shown(size: tuple[int, int]) -> PictureReference:
    """A picture of this width and height, which nobody reads."""
    return PictureReference(path="x", sha256="0" * 64, width=size[0], height=size[1])


def prompt(texts: Texts) -> list[int]:
    """Words, with a picture between every two pieces of text, as a chat template writes it."""
    ids = list(texts[0])
    for text in texts[1:]:
        ids += [START, MARK, END, *text]
    return ids


@st.composite
def prompts(draw: Any) -> tuple[Texts, list[tuple[int, int]]]:
    """Pieces of text, perhaps empty, and the sizes of the pictures between them."""
    sizes = draw(st.lists(st.tuples(SIDES, SIDES), max_size=4))
    sizes = [size for size in sizes if max(size) <= 200 * min(size)]
    words = st.lists(st.integers(7, 60), max_size=5)
    return draw(st.lists(words, min_size=len(sizes) + 1, max_size=len(sizes) + 1)), sizes


@pytest.fixture(scope="module")
def positions_of_transformers() -> Any:
    model = make_seeing().model

    def positions(ids: list[int], grids: list[tuple[int, int]]) -> tuple[np.ndarray, int]:
        rows = torch.tensor([ids])
        grids_thw = torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in grids])
        found, shift = model.get_rope_index(rows, (rows == MARK).int(), image_grid_thw=grids_thw)
        return found[:, 0].numpy(), int(shift)

    return positions


@settings(max_examples=60, deadline=None)
@given(case=prompts())
def test_a_prompt_is_expanded_found_again_and_placed_as_transformers_places_it(
    positions_of_transformers: Any, case: tuple[Texts, list[tuple[int, int]]]
) -> None:
    texts, sizes = case
    layout = PictureLayout(QWEN, None)
    media = [shown(size) for size in sizes]
    ids = layout.expand(prompt(texts), media)
    placed = layout.placed(np.asarray(ids, np.int32), media)
    assert [ids[one.start : one.start + one.length] for one in placed] == [
        [MARK] * one.view.features for one in placed
    ]
    assert [(one.medium, one.view.frames) for one in placed] == [
        (number, (medium,)) for number, medium in enumerate(media)
    ]
    if not sizes:
        assert ids == prompt(texts)
        return
    positions, shift = layout.positions(len(ids), placed)
    expected, expected_shift = positions_of_transformers(ids, [QWEN.grid(*one) for one in sizes])
    np.testing.assert_array_equal(positions, expected)
    assert shift == expected_shift


@settings(max_examples=40, deadline=None)
@given(width=SIDES, height=SIDES)
def test_qwen_features_are_those_of_its_processor(width: int, height: int) -> None:
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(ValueError, match=r"^its sides are more than 200 to 1$"):
            QWEN.grid(width, height)
        return
    made = make_image_processor()(images=[Image.new("RGB", (width, height))], return_tensors="np")
    _, rows, columns = made["image_grid_thw"][0].tolist()
    assert QWEN.grid(width, height) == (rows // 2, columns // 2)


@settings(max_examples=25, deadline=None)
@given(
    width=st.integers(1, 500), height=st.integers(1, 500), longest=st.sampled_from([56, 150, 210])
)
def test_idefics_tiles_are_those_of_its_processor(width: int, height: int, longest: int) -> None:
    """Tokens too: `expansion` is what its own processor writes in the place of the mark."""
    if max(width, height) > 200 * min(width, height):
        return
    pictures = Idefics3ImageProcessorPil(
        size={"longest_edge": longest}, max_image_size={"longest_edge": 56}, do_image_splitting=True
    )
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<row_{r}_col_{c}>" for r in range(1, 6) for c in range(1, 6)])
    processor = Idefics3Processor(pictures, tokenizer, image_seq_len=4)
    made = processor(text="<image>", images=[Image.new("RGB", (width, height))])
    family = IdeficsPictures(
        tokenizer.convert_tokens_to_ids("<image>"), "<image>", 4, 56, longest, splits=True
    )
    expansion = PictureLayout(family, tokenizer).expansion(shown((width, height)))
    assert expansion == made["input_ids"][0]
    rows, columns = family.grid(width, height)
    assert made["pixel_values"].shape[1] == rows * columns + 1


@pytest.mark.parametrize(
    ("ids", "sizes", "sentence"),
    [
        (
            [7, START, MARK, MARK, END],
            [(32, 32)],
            "more marks of pictures follow the last of 1 pictures",
        ),
        (
            [7, START, MARK, END, 9],
            [(64, 64)],
            "picture 1 of 1, of 64 × 64 pixels, should be 4 tokens, and other ones stand in the "
            "prompt",
        ),
        (
            [7, 8, 9],
            [(32, 32)],
            "picture 1 of 1, of 32 × 32 pixels, should be 1 token, and other ones stand in the "
            "prompt",
        ),
    ],
)
def test_a_prompt_made_with_other_settings_or_pictures_is_refused(
    ids: list[int], sizes: list[tuple[int, int]], sentence: str
) -> None:
    with pytest.raises(ValueError) as caught:
        PictureLayout(QWEN, None).placed(np.asarray(ids), [shown(size) for size in sizes])
    assert str(caught.value) == sentence


def test_words_cannot_stand_for_a_picture() -> None:
    with pytest.raises(ValueError) as caught:
        PictureLayout(QWEN, None).expand([7, MARK, 9, MARK], [shown((32, 32))])
    assert str(caught.value) == "the prompt holds 2 marks of pictures for 1 picture"


def test_what_no_response_may_hold() -> None:
    config = make_seeing().config.to_dict()
    assert unsampled_ids(config) == (START, END, MARK, VIDEO)
    assert unsampled_ids(config | {"model_type": "llama"}) == ()


def test_a_folder_that_does_not_say_how_it_reads_pictures() -> None:
    config = make_seeing().config.to_dict()
    assert picture_family(config, None) is None
    with pytest.raises(KeyError):
        picture_family(config, {"merge_size": 2})
    assert picture_family(config | {"model_type": "llava"}, {}) is None
