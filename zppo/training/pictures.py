"""What a model makes of the pictures of its prompts: their features, and where these stand.

Used by the trainer and by the engine that runs transformers, so that both compute the same. The
layout (`zppo.prompting.picture_families`) says from sizes alone which tokens of a prompt stand for
features; the pixels are read where they are needed, by reference, and only if the file is still
what was referred to. A `Tower` keeps the features of a picture as long as what computes them keeps
its weights, whatever the text half does.

Shape legend: B rows, L padded positions, P tokens of a prompt, N features of the pictures of a
pass, H hidden size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from zppo.data.pictures import read_picture
from zppo.errors import UserError, first_line
from zppo.prompting.picture_families import IdeficsPictures, PictureLayout
from zppo.prompting.tokenization import PROCESSOR, load_picture_layout, load_tokenizer
from zppo.training.head import trunk
from zppo_protocol.values import Media, PictureReference, pictures_of

KEPT_BYTES = 256 << 20
"""Most bytes that a tower keeps: of features if it is frozen, else of pixels."""

Key = tuple[str, int, int]
Pixels = dict[str, Tensor]
"""What the processor makes of one picture, by the name of the model's argument."""
T = TypeVar("T")


@dataclass(frozen=True)
class SeenPrompt:
    """The pictures of one prompt: `positions_3P` of its tokens in time, rows and columns, and the
    `shift` of every token behind them; `pixels` where they have been read already."""

    references: tuple[PictureReference, ...]
    positions_3P: np.ndarray
    shift: int
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
    """What sees pictures in one model. `frozen`: its weights stay as they are until `renew`."""

    def __init__(self, model: Any, layout: PictureLayout, processor: Any, frozen: bool) -> None:
        self.layout = layout
        self.frozen = frozen
        self._model = model
        self._processor = processor
        self._weights: object = None
        self._features = Kept[Tensor](_bytes)
        self._pixels = Kept[Pixels](lambda pixels: sum(map(_bytes, pixels.values())))

    @classmethod
    def of(cls, model: Any, folder: str, where: str, *, frozen: bool = True) -> Tower | None:
        """The tower of a model that was loaded from `folder`; None for a model without one, or of
        a family that is trained on text alone. Raises UserError, naming the setting `where`."""
        layout = load_picture_layout(folder, load_tokenizer(folder, where), where)
        if layout is None:
            return None
        try:
            processor = AutoImageProcessor.from_pretrained(
                folder, backend="pil", local_files_only=True
            )
        except Exception as error:  # damaged files raise whatever the library's parsers can
            raise UserError(
                f"{where}: {folder!r} has no processor of pictures that can be loaded "
                f"({first_line(error)}); expected {PROCESSOR} as save_pretrained writes it, or, "
                "for text alone, a folder without it"
            ) from error
        return cls(model, layout, processor, frozen)

    def seen(self, prompt_ids: np.ndarray, media: Sequence[Media]) -> SeenPrompt | None:
        """The pictures of a prompt [P]; None if it has none. Raises ValueError unless the prompt is
        what this model reads."""
        references = tuple(pictures_of(media))
        if not references:
            return None
        placed = self.layout.placed(prompt_ids, [(one.width, one.height) for one in references])
        return SeenPrompt(references, *self.layout.positions(len(prompt_ids), placed))

    def media_tokens(self, media: Sequence[Media]) -> list[int]:
        """Features of each picture and video."""
        return [
            sum(self.layout.features(one.width, one.height) for one in pictures_of([whole]))
            for whole in media
        ]

    def pixels(self, reference: PictureReference) -> Pixels:
        """Read a picture, in any thread. Raises PictureError if its file is not what was referred
        to."""
        return self.processed(read_picture(reference))

    def processed(self, picture: Image.Image) -> Pixels:
        """What the model's processor makes of a picture."""
        made = self._processor(images=[picture], return_tensors="pt")
        return {name: value for name, value in made.items() if isinstance(value, Tensor)}

    def renew(self, weights: object) -> None:
        """The tower has the weights of this identity from now on: what others made is forgotten."""
        if weights != self._weights:
            self._weights = weights
            self._features.clear()

    def features(self, prompts: Sequence[SeenPrompt]) -> Tensor:
        """Features [N, H] of all pictures of these prompts, in order. Raises PictureError."""
        wanted = [
            (reference, prompt.pixels[number] if prompt.pixels else None)
            for prompt in prompts
            for number, reference in enumerate(prompt.references)
        ]
        pictures = {_key(reference): (reference, pixels) for reference, pixels in wanted}
        if not self.frozen:  # rows of one prompt share what was made of its pictures
            made = self._see([self._read(*one) for one in pictures.values()])
            trained = dict(zip(pictures, made, strict=True))
            return torch.cat([trained[_key(one)] for one, _ in wanted])
        missing = {key: one for key, one in pictures.items() if self._features.get(key) is None}
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
        return torch.cat(found)

    def inputs(self, prompts: Sequence[SeenPrompt | None], positions_BL: Tensor) -> dict[str, Any]:
        """What a pass over rows that begin with these prompts takes beside its ids; `positions_BL`
        are places in each row, counted for each rollout from the end of its prompt. Empty where no
        row has a picture."""
        seen = [prompt for prompt in prompts if prompt is not None]
        if not seen:
            return {}
        features = self.features(seen)
        # Idefics3 takes them as a tensor, Qwen3.5 as one for each picture, which it joins.
        tiled = isinstance(self.layout.family, IdeficsPictures)
        pooled: Any = features if tiled else (features,)
        output = BaseModelOutputWithPooling(pooler_output=pooled)
        inputs: dict[str, Any] = {"mm_encoder_outputs": {"image": output}}
        if self.layout.family.turns:
            inputs["position_ids"] = _turned(prompts, positions_BL)
        return inputs

    def _read(self, reference: PictureReference, pixels: Pixels | None) -> Pixels:
        if pixels is not None:
            return pixels
        if self.frozen:  # whose features are kept
            return self.pixels(reference)
        found = self._pixels.get(_key(reference))
        if found is None:
            found = self.pixels(reference)
            self._pixels.put(_key(reference), found)
        return found

    def _held(self, key: Key) -> Tensor:
        features = self._features.get(key)
        assert features is not None, "only one thread puts features in, after it has taken these"
        return features

    def _see(self, pictures: Sequence[Pixels]) -> list[Tensor]:
        """Features [n, H] of each picture, in one pass of the tower."""
        tiled = isinstance(self.layout.family, IdeficsPictures)
        axis = 1 if tiled else 0
        joined = {
            name: torch.cat([one[name] for one in pictures], axis).to(self._model.device)
            for name in pictures[0]
        }
        output = trunk(self._model).get_image_features(**joined, return_dict=True).pooler_output
        if tiled:
            counts = [one["pixel_values"].shape[1] for one in pictures]
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
    ids = tower.layout.expansion(side, side)
    placed = tower.layout.placed(np.asarray(ids), [(side, side)])
    pixels = tower.processed(Image.new("RGB", (side, side), "grey"))
    reference = PictureReference(path="blank", sha256="0" * 64, width=side, height=side)
    positions, shift = tower.layout.positions(len(ids), placed)
    return ids, SeenPrompt((reference,), positions, shift, (pixels,))


def _key(reference: PictureReference) -> Key:
    return reference.sha256, reference.width, reference.height


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
