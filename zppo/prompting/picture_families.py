"""What models that see pictures make of one in a prompt: the tokens in the place of its mark, and
the tokens that no response may hold.

A chat template writes one mark where a picture stands. What the model reads there is its
*expansion*, which follows from the picture's width and height and the settings of the model's
processor alone: so engines, the trainer and the checks at launch each compute it, without a pixel,
and it must be the same. Among its tokens those with the mark's id stand for features of the
picture, one each.

Only the families of `FAMILIES` are known here. Every other one trains on text alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from zppo.prompting.picture_tokens import PictureTokens, resized

UNSAMPLED = (
    *("image_token_id", "image_token_index", "video_token_id", "video_token_index"),
    *("vision_start_token_id", "vision_end_token_id", "vision_token_id", "audio_token_id"),
)
"""Where config.json keeps the ids that stand for (parts of) pictures, videos and sounds."""
FAKE, GLOBAL = "<fake_token_around_image>", "<global-img>"
MAX_SIDE = 4096
"""Idefics3 makes no side of a picture longer, in pixels."""

Tokenizer = Any
"""A tokenizer of transformers."""


class MarkError(ValueError):
    """The prompt holds more or fewer marks of pictures than it has pictures."""


class PictureFamily(Protocol):
    """How one model reads pictures."""

    @property
    def mark(self) -> int:
        """Token id that stands for a feature, and for a whole picture where the template puts
        one."""

    @property
    def turns(self) -> bool:
        """Whether features have positions of their own, in rows and columns (M-RoPE)."""

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns that a picture of so many pixels is cut into: of features where the
        family `turns`, else of tiles. Raises ValueError for a picture that it does not take."""

    def expansion(self, tokenizer: Tokenizer, grid: tuple[int, int]) -> list[int]:
        """Token ids in the place of the mark."""


@dataclass(frozen=True)
class QwenPictures:
    """Qwen3.5: a picture is resized, and each square of `patch` · `merge` pixels is a feature."""

    mark: int
    settings: PictureTokens

    @property
    def turns(self) -> bool:
        return True

    def grid(self, width: int, height: int) -> tuple[int, int]:
        side = self.settings.patch * self.settings.merge
        w, h = resized(width, height, self.settings)
        return h // side, w // side

    def expansion(self, tokenizer: Tokenizer, grid: tuple[int, int]) -> list[int]:
        return [self.mark] * (grid[0] * grid[1])


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


def _qwen(config: Mapping[str, Any], processor: Mapping[str, Any]) -> PictureFamily:
    size = processor.get("size") or {}
    settings = PictureTokens(
        patch=int(processor["patch_size"]),
        merge=int(processor["merge_size"]),
        min_pixels=int(processor.get("min_pixels") or size["shortest_edge"]),
        max_pixels=int(processor.get("max_pixels") or size["longest_edge"]),
    )
    return QwenPictures(int(config["image_token_id"]), settings)


def _idefics(config: Mapping[str, Any], processor: Mapping[str, Any]) -> PictureFamily:
    vision = config["vision_config"]
    side = int(vision["image_size"]) // int(vision["patch_size"])
    return IdeficsPictures(
        mark=int(config["image_token_id"]),
        mark_text="<image>",
        features=side**2 // int(config["scale_factor"]) ** 2,
        tile=int(processor["max_image_size"]["longest_edge"]),
        longest=int(processor["size"]["longest_edge"]),
        splits=bool(processor.get("do_image_splitting", True)),
    )


FAMILIES = {"qwen3_5": _qwen, "idefics3": _idefics}
"""Model types (config.json) that can be trained on pictures, each verified by tests: what engine
and trainer make of a picture is what transformers itself does."""


def picture_family(
    config: Mapping[str, Any], processor: Mapping[str, Any] | None
) -> PictureFamily | None:
    """How the model of this config.json and preprocessor_config.json reads pictures; None if it
    does not, or is of a family that is not known here.

    Raises KeyError, TypeError or ValueError for settings that are not of their kind.
    """
    make = FAMILIES.get(str(config.get("model_type")))
    if make is None or processor is None or not config.get("vision_config"):
        return None
    return make(config, processor)


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


@dataclass(frozen=True)
class Placed:
    """A picture in a prompt: its features are the tokens [start, start + length) of the prompt that
    have the mark's id, in a `grid` of rows and columns."""

    start: int
    length: int
    grid: tuple[int, int]


class PictureLayout:
    """Pictures in the prompts of one model."""

    def __init__(self, family: PictureFamily, tokenizer: Tokenizer) -> None:
        self.family = family
        self._tokenizer = tokenizer
        self._expansions: dict[tuple[int, int], list[int]] = {}

    def expansion(self, width: int, height: int) -> list[int]:
        """Token ids of a picture of so many pixels. Raises ValueError as `grid` does."""
        grid = self.family.grid(width, height)
        if grid not in self._expansions:
            self._expansions[grid] = self.family.expansion(self._tokenizer, grid)
        return self._expansions[grid]

    def expand(self, ids: Sequence[int], sizes: Sequence[tuple[int, int]]) -> list[int]:
        """The prompt with every mark expanded; `sizes` are (width, height) of its pictures in
        order. Raises MarkError unless there are as many marks as pictures."""
        mark = self.family.mark
        if ids.count(mark) != len(sizes):
            raise MarkError(
                f"the prompt holds {ids.count(mark)} marks of pictures for {len(sizes)} pictures"
            )
        expanded, pictures = list[int](), iter(sizes)
        for one in ids:
            expanded += self.expansion(*next(pictures)) if one == mark else [one]
        return expanded

    def features(self, width: int, height: int) -> int:
        """How many tokens of a picture's expansion stand for its features."""
        return self.expansion(width, height).count(self.family.mark)

    def placed(self, ids: np.ndarray, sizes: Sequence[tuple[int, int]]) -> list[Placed]:
        """Where the pictures of a prompt [P] stand. Raises ValueError unless it is what `expand`
        makes of them: then the ids were made with other settings of the processor, or of other
        pictures."""
        mark, found, cursor = self.family.mark, list[Placed](), 0
        places = np.flatnonzero(ids == mark)
        for number, size in enumerate(sizes, start=1):
            expansion = self.expansion(*size)
            ahead = places[places >= cursor]
            start = int(ahead[0]) - expansion.index(mark) if len(ahead) else -1
            if start < cursor or ids[start : start + len(expansion)].tolist() != expansion:
                raise ValueError(
                    f"picture {number} of {len(sizes)}, of {size[0]} × {size[1]} pixels, should be "
                    f"{len(expansion)} tokens, and other ones stand in the prompt"
                )
            found.append(Placed(start, len(expansion), self.family.grid(*size)))
            cursor = start + len(expansion)
        if (places >= cursor).any():
            raise ValueError(f"more marks of pictures follow the last of {len(sizes)} pictures")
        return found

    def positions(self, length: int, placed: Sequence[Placed]) -> tuple[np.ndarray, int]:
        """Positions [3, P] int64 of a prompt of `length` tokens, in time, rows and columns, and
        what is added to the place of every token behind it. Of a family that does not turn, places
        themselves."""
        places = np.arange(length, dtype=np.int64)
        positions = np.broadcast_to(places, (3, length)).copy()
        if not self.family.turns:
            return positions, 0
        shift = 0
        for one in placed:
            (rows, columns), end = one.grid, one.start + one.length
            first = one.start + shift
            cells = np.arange(rows * columns)
            positions[:, one.start : end] = first
            positions[1, one.start : end] += cells // columns
            positions[2, one.start : end] += cells % columns
            shift = first + max(rows, columns) - end
            positions[:, end:] = places[end:] + shift
        return positions, shift
