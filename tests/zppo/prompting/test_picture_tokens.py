"""Tokens of pictures and videos from their size, against transformers' own resize for Qwen's
processors."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from zppo.prompting.picture_tokens import (
    PictureTokens,
    VideoTokens,
    picture_tokens,
    resized,
    resized_frames,
)

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
def test_the_resize_of_videos() -> None:
    """With a bound of all frames together and with one of each; a processor that merges two frames
    takes no single one, which then is shown twice."""
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import (
        Qwen3VLVideoProcessor,
        smart_resize,
    )

    limits = st.sampled_from([(4_096, 25_165_824), (131_072, 786_432), (1_024, 1_024)])

    @settings(max_examples=2000, deadline=None, database=None)
    @given(st.integers(1, 9), SIDES, SIDES, limits, st.sampled_from([None, 1, 64, 768]))
    def same(count: int, width: int, height: int, limits: tuple[int, int], cap: int | None) -> None:
        least, most = limits
        ours = VideoTokens(
            patch=16, merge=2, frames=2, min_pixels=least, max_pixels=most, most_tokens=cap
        )
        shown = max(count, 2)
        try:
            w, h = resized_frames(count, width, height, ours)
        except ValueError as error:
            assert str(error) == "its sides are more than 200 to 1"
            with pytest.raises(ValueError, match="aspect ratio"):
                smart_resize(shown, height, width, 2, 32, least, most)
            return
        if cap is None:
            assert (h, w) == smart_resize(shown, height, width, 2, 32, least, most)
        theirs = Qwen3VLVideoProcessor(
            size={"shortest_edge": least, "longest_edge": most},
            cap_pixels_per_frame=cap is not None,
            max_video_tokens=cap or 768,
        ).get_num_of_video_patches(shown, height, width)
        assert (w // 16) * (h // 16) * ((shown + 1) // 2) == theirs

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
