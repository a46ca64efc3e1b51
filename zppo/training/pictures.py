"""What a model makes of the pictures and videos of its prompts: their features, and where these
stand.

Used by the trainer and by the engine that runs transformers, so that both compute the same. The
layout (`zppo.prompting.picture_layout`) says without a pixel which tokens of a prompt stand for the
features of which view; the pixels are read where they are needed, by reference, and only if the
file is still what was referred to. A `Tower` keeps the features of a view as long as what computes
them keeps its weights, whatever the text half does.

A tower looks at each row of merged frames alone, so a video is as many views, and these go through
it in one pass with the pictures: every pass is one of the tower, whatever it is shown.

Shape legend: B rows, L padded positions, P tokens of a prompt, N features of the pictures of a
pass, n of one view, H hidden size, F frames that are merged, C colours, S pixels of a patch.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from zppo.data.pictures import read_picture
from zppo.prompting.picture_families import IdeficsPictures
from zppo.prompting.picture_layout import PictureLayout, View
from zppo.prompting.tokenization import load_picture_layout, load_processor, load_tokenizer
from zppo.training.head import trunk
from zppo_protocol.values import Media, PictureReference

KEPT_BYTES = 256 << 20
"""Most bytes that a tower keeps: of features if it is frozen, else of pixels."""

Key = tuple[object, ...]
Pixels = dict[str, Tensor]
"""What the processor makes of one view, by the name of the model's argument."""
T = TypeVar("T")


@dataclass(frozen=True)
class SeenPrompt:
    """The views of one prompt: `positions_3P` of its tokens in time, rows and columns, and the
    `shift` of every token behind them; `media_tokens` as in `GroupSamples`; `pixels` of each view
    where they have been read already."""

    views: tuple[View, ...]
    positions_3P: np.ndarray
    shift: int
    media_tokens: list[int]
    pixels: tuple[Pixels, ...] = field(default=(), repr=False)


class Kept(Generic[T]):
    """The values used last, up to `most` bytes."""

    def __init__(self, size: Callable[[T], int], most: int = KEPT_BYTES) -> None:
        self._values: OrderedDict[Key, T] = OrderedDict()
        self._size, self._most, self._held = size, most, 0

    def get(self, key: Key) -> T | None:
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: Key, value: T) -> None:
        if key in self._values:
            return
        self._values[key] = value
        self._held += self._size(value)
        while self._held > self._most:
            self._held -= self._size(self._values.popitem(last=False)[1])

    def clear(self) -> None:
        self._values.clear()
        self._held = 0


class Tower:
    """What sees pictures in one model, that of `folder`, which the setting `where` names. `frozen`:
    its weights stay as they are until `renew`."""

    def __init__(
        self, model: Any, layout: PictureLayout, folder: str, where: str, frozen: bool
    ) -> None:
        self.layout = layout
        self.frozen = frozen
        self._model = model
        self._folder, self._where = folder, where
        self._weights: object = None
        self._features = Kept[Tensor](_bytes)
        self._pixels = Kept[Pixels](lambda pixels: sum(map(_bytes, pixels.values())))

    @classmethod
    def of(cls, model: Any, folder: str, where: str, *, frozen: bool = True) -> Tower | None:
        """The tower of a model that was loaded from `folder`; None for a model without one, or of
        a family that is trained on text alone. Raises UserError, naming the setting `where`."""
        layout = load_picture_layout(folder, load_tokenizer(folder, where), where)
        return None if layout is None else cls(model, layout, folder, where, frozen)

    @functools.cached_property
    def _processor(self) -> Any:
        """Loaded for the first picture: a run on text alone does without. Raises UserError."""
        return load_processor(self._folder, self._where)

    def seen(self, prompt_ids: np.ndarray, media: Sequence[Media]) -> SeenPrompt | None:
        """The pictures and videos of a prompt [P]; None if it has none. Raises ValueError unless
        the prompt is what this model reads."""
        if not media:
            return None
        placed = self.layout.placed(prompt_ids, media)
        media_tokens = [0] * len(media)
        for one in placed:
            media_tokens[one.medium] += one.view.features
        positions_3P, shift = self.layout.positions(len(prompt_ids), placed)
        views = tuple(one.view for one in placed)
        return SeenPrompt(views, positions_3P, shift, media_tokens)

    def pixels(self, view: View) -> Pixels:
        """Read what is seen, in any thread. Raises PictureError if a file is not what was referred
        to."""
        if view.size is None:
            return self.processed(read_picture(view.frames[0]))
        pictures = {frame: read_picture(frame) for frame in dict.fromkeys(view.frames)}
        return self._merged([pictures[frame] for frame in view.frames], view.size)

    def processed(self, picture: Image.Image) -> Pixels:
        """What the model's processor makes of a picture. Raises UserError if it cannot be
        loaded."""
        made = self._processor(images=[picture], return_tensors="pt")
        return {name: value for name, value in made.items() if isinstance(value, Tensor)}

    def _merged(self, frames: Sequence[Image.Image], size: tuple[int, int]) -> Pixels:
        """What the model's processor of videos makes of frames that it merges.

        That one needs torchvision, so the processor of pictures does its work on each frame, and
        the frames are laid side by side where it would repeat a picture.
        """
        video = self.layout.family.video
        assert video is not None, "the layout has such views for models of videos alone"
        resized = [
            frame if frame.size == size else frame.resize(size, Image.Resampling(video.resample))
            for frame in frames
        ]
        made = self._processor(
            images=resized,
            do_resize=False,
            patch_size=video.settings.patch,
            merge_size=video.settings.merge,
            temporal_patch_size=1,
            return_tensors="pt",
            **video.scaling,
        )
        by_frame_NCS = made["pixel_values"].unflatten(1, (3, -1)).chunk(len(frames))
        merged_NCFS = torch.stack(by_frame_NCS, dim=2)
        return {
            "pixel_values": merged_NCFS.flatten(1),
            "image_grid_thw": made["image_grid_thw"][:1],
        }

    def renew(self, weights: object) -> None:
        """The tower has the weights of this identity from now on: what others made is forgotten."""
        if weights != self._weights:
            self._weights = weights
            self._features.clear()

    def features(self, prompts: Sequence[SeenPrompt]) -> list[Tensor]:
        """Features [n, H] of all views of these prompts, in order. Raises PictureError."""
        wanted = [
            (view, prompt.pixels[number] if prompt.pixels else None)
            for prompt in prompts
            for number, view in enumerate(prompt.views)
        ]
        views = {_key(view): (view, pixels) for view, pixels in wanted}
        if not self.frozen:  # rows of one prompt share what was made of its pictures
            made = self._see([self._read(*one) for one in views.values()])
            trained = dict(zip(views, made, strict=True))
            return [trained[_key(one)] for one, _ in wanted]
        missing = {key: one for key, one in views.items() if self._features.get(key) is None}
        fresh = dict[Key, Tensor]()
        if missing:
            with torch.no_grad():
                made = self._see([self._read(*one) for one in missing.values()])
            fresh = dict(zip(missing, made, strict=True))
        found = [
            fresh[key] if (key := _key(one)) in fresh else self._held(key) for one, _ in wanted
        ]
        for key, features in fresh.items():
            self._features.put(key, features.clone())  # else it would hold those of its whole pass
        return found

    def inputs(self, prompts: Sequence[SeenPrompt | None], positions_BL: Tensor) -> dict[str, Any]:
        """What a pass over rows that begin with these prompts takes beside its ids; `positions_BL`
        are places in each row, counted for each rollout from the end of its prompt. Empty where no
        row has a picture."""
        seen = [prompt for prompt in prompts if prompt is not None]
        if not seen:
            return {}
        views = [view for prompt in seen for view in prompt.views]
        features = list(zip(views, self.features(seen), strict=True))
        # The model puts each kind, in the order of the rows, where its own mark stands.
        kinds = {
            "image": [one for view, one in features if not view.of_video],
            "video": [one for view, one in features if view.of_video],
        }
        inputs: dict[str, Any] = {
            "mm_encoder_outputs": {
                kind: self._pooled(torch.cat(parts)) for kind, parts in kinds.items() if parts
            }
        }
        if self.layout.family.turns:
            inputs["position_ids"] = _turned(prompts, positions_BL)
        return inputs

    def _pooled(self, features_NH: Tensor) -> BaseModelOutputWithPooling:
        """As the model's own encoder gives them: Idefics3's as a tensor, Qwen3.5's as one for each
        picture, which the model joins."""
        pooled: Any = features_NH if self._tiled else (features_NH,)
        return BaseModelOutputWithPooling(pooler_output=pooled)

    @property
    def _tiled(self) -> bool:
        return isinstance(self.layout.family, IdeficsPictures)

    def _read(self, view: View, pixels: Pixels | None) -> Pixels:
        if pixels is not None:
            return pixels
        if self.frozen:  # whose features are kept
            return self.pixels(view)
        found = self._pixels.get(_key(view))
        if found is None:
            found = self.pixels(view)
            self._pixels.put(_key(view), found)
        return found

    def _held(self, key: Key) -> Tensor:
        features = self._features.get(key)
        assert features is not None, "only one thread puts features in, after it has taken these"
        return features

    def _see(self, views: Sequence[Pixels]) -> list[Tensor]:
        """Features [n, H] of each view, in one pass of the tower."""
        axis = 1 if self._tiled else 0
        joined = {
            name: torch.cat([one[name] for one in views], axis).to(self._model.device)
            for name in views[0]
        }
        output = trunk(self._model).get_image_features(**joined, return_dict=True).pooler_output
        if self._tiled:
            counts = [one["pixel_values"].shape[1] for one in views]
            return [part.flatten(0, 1) for part in output.split(counts)]
        return list(output)


def _turned(prompts: Sequence[SeenPrompt | None], positions_BL: Tensor) -> Tensor:
    """Positions [3, B, L] in time, rows and columns, on the device of `positions_BL`."""
    turned_3BL = positions_BL.expand(3, *positions_BL.shape).clone()
    for row, prompt in enumerate(prompts):
        if prompt is None:
            continue
        length = min(prompt.positions_3P.shape[1], positions_BL.shape[1])
        turned_3BL[:, row, :length] = torch.from_numpy(prompt.positions_3P[:, :length])
        turned_3BL[:, row, length:] += prompt.shift
    return turned_3BL


def blank(tower: Tower, side: int = 32) -> tuple[list[int], SeenPrompt]:
    """A prompt that is one small grey picture: for a pass that must go through the tower although
    none of its rows has a picture."""
    grey = PictureReference(path="blank", sha256="0" * 64, width=side, height=side)
    ids = tower.layout.expansion(grey)
    seen = tower.seen(np.asarray(ids), [grey])
    assert seen is not None
    return ids, replace(seen, pixels=(tower.processed(Image.new("RGB", (side, side), "grey")),))


def _key(view: View) -> Key:
    """Frames of a video have the size of the first one."""
    shown = view.frames[0]
    return *(frame.sha256 for frame in view.frames), shown.width, shown.height, view.size


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
