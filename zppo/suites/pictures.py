"""The paper's bounds for pictures (appendix B.2), for servers of our own: 256 · 32² to 1,280 · 32²
pixels.

Bounds are an option of a model's picture processor, which families name differently. Those whose
processor is Qwen2-VL's (Qwen2-VL to Qwen3.5) call them `min_pixels` and `max_pixels` and get them;
others keep their own. They are given as those of pictures alone: vLLM would hand bare ones to the
processor of videos as well, which bounds all frames of a video together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from zppo.suites.order import Served, SuiteOrder

BOUNDS = {"images_kwargs": {"min_pixels": 256 * 32 * 32, "max_pixels": 1280 * 32 * 32}}
OPTION = "mm-processor-kwargs"
PROCESSOR = "Qwen2VLImageProcessor"
FILES = ("preprocessor_config.json", "processor_config.json")


def server_options(model: Served, order: SuiteOrder) -> dict[str, str]:
    """Options of the server of a model that is served here; those of the command line come
    first."""
    if model.folder is None:
        return {}
    bounded = {OPTION: msgspec.json.encode(BOUNDS).decode()} if _takes_them(model.folder) else {}
    return {**bounded, **order.server_args}


def _takes_them(folder: str) -> bool:
    for name in FILES:
        try:
            config: Any = msgspec.json.decode((Path(folder) / name).read_bytes())
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            continue  # what is wrong with a folder the server says better
        part = config.get("image_processor", config) if isinstance(config, dict) else {}
        if isinstance(part, dict) and PROCESSOR in str(part.get("image_processor_type", "")):
            return True
    return False
