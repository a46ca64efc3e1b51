"""What models that see pictures make of one in a prompt, or of a video: the tokens in the place of
its mark, and the tokens that no response may hold.

A chat template writes one mark where a picture or a video stands. What the model reads there is its
*expansion*, which follows from width, height and the settings of the model's processors alone (of a
video also from the times of its frames): so engines, the trainer and the checks at launch each
compute it, without a pixel, and it must be the same (`zppo.prompting.picture_layout`). Among its
tokens those with the mark's id stand for features, one each.

Only the families of `FAMILIES` are known here. Every other one trains on text alone. Settings of a
processor under which the expansion would be another one, or that do not suit the model, are refused
here (`SettingsError`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from zppo.errors import UserError
from zppo.prompting.picture_tokens import PictureTokens, VideoTokens, resized, resized_frames
from zppo_protocol.values import PictureReference, VideoReference

UNSAMPLED = (
    *("image_token_id", "image_token_index", "video_token_id", "video_token_index"),
    *("vision_start_token_id", "vision_end_token_id", "vision_token_id", "audio_token_id"),
)
"""Where config.json keeps the ids that stand for (parts of) pictures, videos and sounds."""
FAKE, GLOBAL = "<fake_token_around_image>", "<global-img>"
MAX_SIDE = 4096
"""Idefics3 makes no side of a picture longer, in pixels."""
PICTURES, VIDEOS = "its processor of pictures has", "its processor of videos has"
QWEN_PATCHES = {
    "patch_size": ("patch_size", 16),
    "merge_size": ("spatial_merge_size", 2),
    "temporal_patch_size": ("temporal_patch_size", 2),
}
"""Settings of Qwen's processors -> what the model's `vision_config` calls the same, and its own
value."""
QWEN_PICTURE_DEFAULTS: Mapping[str, Any] = {"temporal_patch_size": 2}
"""What the processor of pictures takes for what a folder does not say. It would take patches of
other models, too."""
QWEN_VIDEOS = "Qwen3VLVideoProcessor"
"""The one processor of videos that is known here, by the name in its settings."""
QWEN_VIDEO_DEFAULTS: Mapping[str, Any] = {
    "patch_size": 16,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32},
    "cap_pixels_per_frame": None,
    "max_video_tokens": 768,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
"""Its own values, for what a folder does not say."""
SCALING = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")

Tokenizer = Any
"""A tokenizer of transformers."""


class SettingsError(ValueError):
    """What is wrong with the settings of a processor, as the end of a sentence."""


class PictureFamily(Protocol):
    """How one model reads pictures."""

    @property
    def mark(self) -> int:
        """Token id that stands for a feature, and for a whole picture where the template puts
        one."""

    @property
    def turns(self) -> bool:
        """Whether features have positions of their own, in rows and columns (M-RoPE)."""

    @property
    def video(self) -> VideoInput | None:
        """How the model reads a video as such; None: it reads frames as pictures."""

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns that a picture of so many pixels is cut into: of features where the
        family `turns`, else of tiles. Raises ValueError for a picture that it does not take."""

    def expansion(self, tokenizer: Tokenizer, grid: tuple[int, int]) -> list[int]:
        """Token ids in the place of the mark."""

    def features_of(self, made: Mapping[str, Any]) -> int:
        """How many features one picture has, of which the model's processor has `made` this."""


@dataclass(frozen=True)
class UnreadPictures:
    """A model whose settings of pictures are `problem`, a whole sentence: it reads text alone."""

    mark: int
    problem: str
    turns: bool = False
    video: None = None

    def grid(self, width: int, height: int) -> tuple[int, int]:
        raise UserError(self.problem)

    def expansion(self, tokenizer: Tokenizer, grid: tuple[int, int]) -> list[int]:
        raise UserError(self.problem)

    def features_of(self, made: Mapping[str, Any]) -> int:
        raise UserError(self.problem)


@dataclass(frozen=True)
class VideoInput:
    """Qwen3.5: all frames are resized alike, and each square of `patch` · `merge` pixels in
    `frames` of them that follow each other is a feature. Before the features of these frames stands
    their mean time, in words; `start` and `end` enclose them. What is missing of the last frames is
    its last one, repeated.

    `resample` is Pillow's number of the filter, `scaling` what the processor is told of the values
    of pixels.
    """

    mark: int
    start: int
    end: int
    settings: VideoTokens
    resample: int
    scaling: Mapping[str, Any]

    def size(self, video: VideoReference) -> tuple[int, int]:
        """(width, height) in pixels to which every frame is resized. Raises ValueError for a video
        that is not taken."""
        first = video.frames[0]
        return resized_frames(len(video.frames), first.width, first.height, self.settings)

    def merged(self, video: VideoReference) -> Iterator[tuple[float, tuple[PictureReference, ...]]]:
        """(mean time in seconds, frames) of every row of features."""
        count = self.settings.frames
        missing = -len(video.frames) % count
        frames = (*video.frames, *video.frames[-1:] * missing)
        seconds = (*video.seconds, *video.seconds[-1:] * missing)
        for first in range(0, len(frames), count):
            last = first + count
            yield (seconds[first] + seconds[last - 1]) / 2, frames[first:last]


@dataclass(frozen=True)
class QwenPictures:
    """Qwen3.5: a picture is resized, and each square of `patch` · `merge` pixels is a feature."""

    mark: int
    settings: PictureTokens
    video: VideoInput | None = None

    @property
    def turns(self) -> bool:
        return True

    def grid(self, width: int, height: int) -> tuple[int, int]:
        side = self.settings.patch * self.settings.merge
        w, h = resized(width, height, self.settings)
        return h // side, w // side

    def expansion(self, tokenizer: Tokenizer, grid: tuple[int, int]) -> list[int]:
        return [self.mark] * (grid[0] * grid[1])

    def features_of(self, made: Mapping[str, Any]) -> int:
        return math.prod(map(int, made["image_grid_thw"][0])) // self.settings.merge**2


@dataclass(frozen=True)
class IdeficsPictures:
    """Idefics3: a picture is resized as a whole, and where `splits`, cut into tiles of `tile`
    pixels that stand before it; each has `features` features."""

    mark: int
    mark_text: str
    features: int
    tile: int
    longest: int
    splits: bool

    @property
    def turns(self) -> bool:
        return False

    @property
    def video(self) -> None:
        return None

    def grid(self, width: int, height: int) -> tuple[int, int]:
        if not self.splits:
            return 0, 0
        w, h = self._tiled(*_below(*_to_longest(width, height, self.longest), MAX_SIDE))
        return (0, 0) if max(w, h) <= self.tile else (h // self.tile, w // self.tile)

    def _tiled(self, width: int, height: int) -> tuple[int, int]:
        """Both sides as multiples of a tile's, the longer one first."""
        tile, aspect = self.tile, width / height
        if width >= height:
            width = math.ceil(width / tile) * tile
            height = math.ceil(int(width / aspect) / tile) * tile
        else:
            height = math.ceil(height / tile) * tile
            width = math.ceil(int(height * aspect) / tile) * tile
        return width, height

    def expansion(self, tokenizer: Tokenizer, grid: tuple[int, int]) -> list[int]:
        tile = self.mark_text * self.features
        rows = "".join(
            "".join(f"{FAKE}<row_{row + 1}_col_{column + 1}>{tile}" for column in range(grid[1]))
            + "\n"
            for row in range(grid[0])
        )
        text = f"{rows}\n" if rows else ""
        ids: list[int] = tokenizer(f"{text}{FAKE}{GLOBAL}{tile}{FAKE}", add_special_tokens=False)[
            "input_ids"
        ]
        return ids

    def features_of(self, made: Mapping[str, Any]) -> int:
        return int(made["pixel_values"].shape[1]) * self.features


def _to_longest(width: int, height: int, longest: int) -> tuple[int, int]:
    """Idefics3's first resize: the longer side becomes `longest`, the other one even."""
    aspect = width / height
    if width >= height:
        width, height = longest, int(longest / aspect)
        height += height % 2
    else:
        width, height = int(longest * aspect), longest
        width += width % 2
    return max(width, 1), max(height, 1)


def _below(width: int, height: int, longest: int) -> tuple[int, int]:
    aspect = width / height
    if width >= height and width > longest:
        width, height = longest, int(longest / aspect)
    elif height > width and height > longest:
        width, height = int(longest * aspect), longest
    return max(width, 1), max(height, 1)


def _qwen(
    config: Mapping[str, Any], processor: Mapping[str, Any], videos: Mapping[str, Any]
) -> PictureFamily:
    _check_kind(processor, "Qwen2VLImageProcessor")
    _check_patches(PICTURES, {**QWEN_PICTURE_DEFAULTS, **processor}, config["vision_config"])
    size = processor.get("size") or {}
    settings = PictureTokens(
        patch=int(processor["patch_size"]),
        merge=int(processor["merge_size"]),
        min_pixels=int(processor.get("min_pixels") or size["shortest_edge"]),
        max_pixels=int(processor.get("max_pixels") or size["longest_edge"]),
    )
    _check_areas(PICTURES, settings.min_pixels, settings.max_pixels)
    taken = videos.get("video_processor_type") == QWEN_VIDEOS
    video = _qwen_video(config, videos) if taken else None
    return QwenPictures(int(config["image_token_id"]), settings, video)


def _qwen_video(config: Mapping[str, Any], videos: Mapping[str, Any]) -> VideoInput:
    given = {**QWEN_VIDEO_DEFAULTS, **videos}
    _check_patches(VIDEOS, given, config["vision_config"])
    settings = VideoTokens(
        patch=int(given["patch_size"]),
        merge=int(given["merge_size"]),
        frames=int(given["temporal_patch_size"]),
        min_pixels=int(given["size"]["shortest_edge"]),
        max_pixels=int(given["size"]["longest_edge"]),
        most_tokens=int(given["max_video_tokens"]) if given["cap_pixels_per_frame"] else None,
    )
    _check_areas(VIDEOS, settings.min_pixels, settings.max_pixels)
    return VideoInput(
        mark=int(config["video_token_id"]),
        start=int(config["vision_start_token_id"]),
        end=int(config["vision_end_token_id"]),
        settings=settings,
        resample=int(given["resample"]),
        scaling={name: given[name] for name in SCALING},
    )


def _idefics(
    config: Mapping[str, Any], processor: Mapping[str, Any], videos: Mapping[str, Any]
) -> PictureFamily:
    _check_kind(processor, "Idefics3ImageProcessor")
    vision = config["vision_config"]
    splits = bool(processor.get("do_image_splitting", True))
    tile = int(processor["max_image_size"]["longest_edge"])
    if splits:
        _check_resizes(PICTURES, processor)
    if tile != int(vision["image_size"]):
        raise SettingsError(
            f"{PICTURES} max_image_size {tile}; expected {vision['image_size']}, the image_size of "
            "config.json"
        )
    side = int(vision["image_size"]) // int(vision["patch_size"])
    return IdeficsPictures(
        mark=int(config["image_token_id"]),
        mark_text="<image>",
        features=side**2 // int(config["scale_factor"]) ** 2,
        tile=tile,
        longest=int(processor["size"]["longest_edge"]),
        splits=splits,
    )


def _check_kind(processor: Mapping[str, Any], expected: str) -> None:
    """Raise SettingsError for the processor of another family. Names of classes may say on what
    they run."""
    kind = processor.get("image_processor_type", expected)
    if kind not in (expected, f"{expected}Fast", f"{expected}Pil"):
        raise SettingsError(f"{PICTURES} image_processor_type {kind!r}; expected {expected!r}")


def _check_resizes(what: str, settings: Mapping[str, Any]) -> None:
    if settings.get("do_resize") is False:
        raise SettingsError(
            f"{what} do_resize false; expected true, because only pictures of some sizes could be "
            "cut into patches"
        )


def _check_patches(what: str, settings: Mapping[str, Any], vision: Mapping[str, Any]) -> None:
    """Raise SettingsError unless the pixels are cut into the patches that the model's tower
    takes."""
    _check_resizes(what, settings)
    for name, (of_tower, default) in QWEN_PATCHES.items():
        found, own = settings[name], vision.get(of_tower, default)
        if type(found) is not int or found != own:
            raise SettingsError(
                f"{what} {name} {found!r}; expected {own}, the {of_tower} of config.json"
            )


def _check_areas(what: str, least: int, most: int) -> None:
    if not 0 < least <= most:
        raise SettingsError(
            f"{what} sizes of {least} to {most} pixels; expected 1 or more, the larger one last"
        )


FAMILIES = {"qwen3_5": _qwen, "idefics3": _idefics}
"""Model types (config.json) that can be trained on pictures, each verified by tests: what engine
and trainer make of a picture is what transformers itself does."""


def picture_family(
    config: Mapping[str, Any],
    processor: Mapping[str, Any] | None,
    videos: Mapping[str, Any] | None = None,
) -> PictureFamily | None:
    """How the model reads pictures whose config.json this is, whose preprocessor_config.json and
    video_preprocessor_config.json; None if it does not, or is of a family that is not known here.

    Raises KeyError, TypeError or ValueError for settings that are not of their kind, and
    SettingsError for those that cannot be used.
    """
    if processor is None or not is_known(config):
        return None
    return FAMILIES[str(config["model_type"])](config, processor, videos or {})


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether the model of this config.json has a tower for pictures, and is of a family that is
    known here."""
    return config.get("model_type") in FAMILIES and bool(config.get("vision_config"))


def unsampled_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that no response of this model may hold, in rising order: its forward pass would look
    there for features of a picture that does not exist, and fail.

    The one set that every engine leaves out when it samples and the loss leaves out of its softmax,
    of families that are known here.
    """
    if str(config.get("model_type")) not in FAMILIES:
        return ()
    return tuple(sorted({int(config[name]) for name in UNSAMPLED if _is_id(config.get(name))}))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
