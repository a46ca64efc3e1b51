"""What transformers makes of videos: its own processor of Qwen3.5, whole.

Its processor of videos calls three functions of torchvision, which is not here: they are Pillow's
bicubic resize, and plain arithmetic, in its place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    Qwen3VLProcessor,
    image_processing_backends,
    video_processing_utils,
)
from transformers.image_utils import PILImageResampling
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from zppo.data.pictures import read_picture
from zppo_protocol.values import Media, VideoReference, pictures_of


class WholeProcessor(Qwen3VLProcessor):  # type: ignore[misc]
    """Takes a processor of videos although torchvision is not here."""

    def check_argument_for_proper_class(self, name: str, argument: Any) -> None:
        """Each is of the class that the folder names."""


def _resize(image: Tensor, size: Sequence[int], interpolation: object, antialias: bool) -> Tensor:
    assert interpolation == "bicubic" and antialias
    frames = [
        Image.fromarray(frame.permute(1, 2, 0).numpy()).resize(
            (size[1], size[0]), Image.Resampling.BICUBIC
        )
        for frame in image.flatten(0, -4)
    ]
    made = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) for one in frames])
    return made.unflatten(0, image.shape[:-3])


def _normalize(image: Tensor, mean: Any, std: Any, inplace: bool = False) -> Tensor:
    means, stds = (torch.as_tensor(one).view(-1, 1, 1) for one in (mean, std))
    return (image - means) / stds


@contextmanager
def _torchvision() -> Iterator[None]:
    modes = SimpleNamespace(BICUBIC="bicubic", LANCZOS="lanczos")
    functions = SimpleNamespace(
        resize=_resize,
        normalize=_normalize,
        grayscale_to_rgb=lambda video: video,
        InterpolationMode=modes,
    )
    filters = {PILImageResampling.BICUBIC: "bicubic"}
    with (
        mock.patch.object(video_processing_utils, "tvF", functions, create=True),
        mock.patch.object(image_processing_backends, "tvF", functions, create=True),
        mock.patch.object(
            image_processing_backends, "pil_torch_interpolation_mapping", filters, create=True
        ),
    ):
        yield


def processor_of(folder: Path) -> WholeProcessor:
    """The processor of pictures, videos and text in a folder of `recurrent_models.save_seeing`."""
    settings = json.loads((folder / "video_preprocessor_config.json").read_text())
    settings.pop("video_processor_type")
    return WholeProcessor(
        AutoImageProcessor.from_pretrained(folder, backend="pil"),
        AutoTokenizer.from_pretrained(folder),
        Qwen3VLVideoProcessor(**settings),
    )


def processed(
    processor: WholeProcessor, text: str, media: Sequence[Media], frames: int = 2
) -> dict[str, Tensor]:
    """What it makes of a text with a mark for each medium: ids, pixels, grids and what kind each
    token is of. A video of fewer than `frames` frames, which it refuses, is given its last one
    again."""
    images = [read_picture(one) for one in media if not isinstance(one, VideoReference)]
    films, times = [], []
    for one in media:
        if isinstance(one, VideoReference):
            again = max(0, frames - len(one.frames))
            shown = [read_picture(frame) for frame in pictures_of([one])]
            films.append([np.asarray(frame) for frame in shown + shown[-1:] * again])
            seconds = [*one.seconds, *one.seconds[-1:] * again]
            times.append({"fps": 1.0, "total_num_frames": len(seconds), "frames_indices": seconds})
    videos = {
        "do_sample_frames": False,
        "cap_pixels_per_frame": False,
        "input_data_format": "channels_last",  # else frames of one row are taken for one colour
        "video_metadata": times,
    }
    with _torchvision():
        made = processor(
            text=[text],
            images=images or None,
            videos=films or None,
            return_tensors="pt",
            **({"videos_kwargs": videos} if films else {}),
        )
    return dict(made)
