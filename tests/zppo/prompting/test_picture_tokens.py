"""Tokens of pictures from their size, against transformers' own resize for Qwen's processors."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from zppo.prompting.picture_tokens import PictureTokens, picture_tokens, resized

SIDES = st.one_of(st.integers(1, 300), st.integers(1, 30_000))
LIMITS = st.sampled_from(
    [(65_536, 16_777_216), (3_136, 1_003_520), (262_144, 1_310_720), (1_024, 1_024)]
)


@pytest.mark.slow
def test_the_resize_of_transformers() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    @settings(max_examples=3000, deadline=None, database=None)
    @given(SIDES, SIDES, st.sampled_from([14, 16]), LIMITS)
    def same(width: int, height: int, patch: int, limits: tuple[int, int]) -> None:
        ours = PictureTokens(patch=patch, merge=2, min_pixels=limits[0], max_pixels=limits[1])
        try:
            theirs = smart_resize(height, width, 2 * patch, *limits)
        except ValueError:
            with pytest.raises(ValueError, match="more than 200 to 1"):
                resized(width, height, ours)
            return
        assert resized(width, height, ours) == theirs[::-1]
        grid = (theirs[0] // patch) * (theirs[1] // patch)  # the processor's image_grid_thw
        assert picture_tokens(width, height, ours) == grid // 2**2 + 2

    same()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(100, 100), (1, 150), (333, 1000), (900, 31)])
def test_the_tokens_of_the_processor_itself(width: int, height: int) -> None:
    """Which does resize, and cuts into patches."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    limits = {"shortest_edge": 65_536, "longest_edge": 262_144}
    processor = Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, size=limits)
    picture = Image.new("RGB", (width, height))
    (grid,) = processor(picture, return_tensors="np")["image_grid_thw"]
    ours = PictureTokens(min_pixels=65_536, max_pixels=262_144)
    assert picture_tokens(width, height, ours) == grid.prod() // 2**2 + 2


def test_sizes_by_hand() -> None:
    """64 tokens at least, 16,384 at most, and two marks."""
    assert picture_tokens(256, 256, PictureTokens()) == 8 * 8 + 2
    assert picture_tokens(1, 1, PictureTokens()) == 8 * 8 + 2
    assert picture_tokens(640, 480, PictureTokens()) == 20 * 15 + 2
    assert picture_tokens(20_000, 20_000, PictureTokens()) == 128 * 128 + 2
