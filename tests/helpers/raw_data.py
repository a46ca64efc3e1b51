"""Raw data sets made up in the two layouts that `zppo build-data` reads, and a recipe for them."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

RECIPE: dict[str, Any] = {
    "seed": 3,
    "sources": {
        "first": {
            "columns": {
                "question": ["extra_info.question", "question"],
                "answer": "answer",
                "images": ["images", "image"],
                "sub_dataset": "data_source",
                "reward_type": "extra_info.reward_type",
            },
            "graders": {"multiple_choice": "choice", "numeric": "math"},
        },
        "second": {
            "columns": {
                "question": "question",
                "answer": "answer",
                "images": "image",
                "sub_dataset": "source",
                "pass_rate": "pass_rate",
            },
        },
    },
    "picture_mark": "<image>",
    "filters": {
        "max_pass_rate": 0.5,
        "max_answer_characters": 20,
        "min_pictures": 1,
        "min_picture_side": 100,
    },
    "names": {"prefixes": ["stem"], "suffixes": ["merged"], "aliases": {"geometry3k": "geo3k"}},
    "tiers": [
        {"cap": 6, "sub_datasets": {"first": ["ai2d", "tqa"], "second": ["ai2d", "geo3k"]}},
        {"cap": 3, "sub_datasets": {"second": ["raven"]}},
    ],
}
LAYOUTS = ("jsonl", "parquet")


@cache
def png(seed: int, width: int = 120, height: int = 100) -> bytes:
    """A picture that only this seed has."""
    rng = random.Random(seed)
    colour = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
    image = Image.new("RGB", (width, height), colour)
    image.putpixel((0, 0), (seed % 256, seed // 256 % 256, seed // 65536 % 256))
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def first(number: int, **changes: Any) -> dict[str, Any]:
    """A row of the first source, with pictures as bytes."""
    asked = changes.pop("question", f"<image>\nHow long is side {number}?")
    kind = changes.pop("reward_type", "numeric")
    row = {
        "data_source": "stem-ai2d_merged",
        "answer": str(number),
        "images": [png(number)],
        "extra_info": {"question": asked, "reward_type": kind},
    }
    return row | changes


def second(number: int, **changes: Any) -> dict[str, Any]:
    """A row of the second source."""
    row = {
        "source": "geometry3k",
        "question": f"<image> Which angle is {number}?",
        "answer": str(number),
        "image": png(10_000 + number),
        "pass_rate": 0.25,
    }
    return row | changes


def write_recipe(file: Path, **changes: Any) -> Path:
    """A recipe file; changes go by section."""
    data = RECIPE | changes
    file.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return file


def write_source(folder: Path, rows: Sequence[dict[str, Any]], layout: str, files: int = 1) -> Path:
    """The rows dealt out to `files` files: Parquet with {bytes, path}, or JSONL with paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        name = f"train-{number:05d}-of-{files:05d}"
        part = list(rows[number::files])
        if layout == "parquet":
            write_parquet(folder / f"{name}.parquet", part)
        else:
            write_jsonl(folder / f"{name}.jsonl", part)
    return folder


def write_parquet(file: Path, rows: Sequence[dict[str, Any]], group: int = 100) -> None:
    plain = [{name: _cell(value) for name, value in row.items()} for row in rows]
    pq.write_table(pa.Table.from_pylist(plain), file, row_group_size=group)


def write_jsonl(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    folder = file.parent / "pictures"
    folder.mkdir(exist_ok=True)
    with file.open("w", encoding="utf-8") as stream:
        for row in rows:
            plain = {name: _path(value, folder) for name, value in row.items()}
            stream.write(json.dumps(plain) + "\n")


def _cell(value: Any) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], bytes):
        return [_cell(one) for one in value]
    return {"bytes": value, "path": None} if isinstance(value, bytes) else value


def _path(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_path(one, folder) for one in value]
    if not isinstance(value, bytes):
        return value
    file = folder / f"{hash(value) & (2**64 - 1):016x}.png"
    file.write_bytes(value)
    return f"pictures/{file.name}"
