"""A model folder is known again, and another one of the same shape is not taken for it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from zppo.plan import fingerprint as fingerprint_module
from zppo.plan.fingerprint import fingerprint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 8}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("A model.")
    generator = np.random.default_rng(0)
    tensors = {f"layer.{i}": generator.normal(size=(40, 50)).astype(np.float32) for i in range(5)}
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_copy_is_the_same_model_whatever_its_times_and_notes(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    (copy / "README.md").write_text("A copy.")
    os.utime(copy / "model.safetensors", (0, 0))
    assert fingerprint(copy) == fingerprint(model)


def edit_config(model: Path) -> None:
    (model / "config.json").write_text('{"hidden_size": 9}')


def edit_template(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ messages }}!")


def add_generation_config(model: Path) -> None:
    (model / "generation_config.json").write_text("{}")


def train_one_layer(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["layer.3"] = tensors["layer.3"] * np.float32(1.001)
    save_file(tensors, model / "model.safetensors")


def rename_a_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["layer.9"] = tensors.pop("layer.3")
    save_file(tensors, model / "model.safetensors")


def cut_short(model: Path) -> None:
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size - 300)


CHANGES = [
    edit_config, edit_template, add_generation_config, train_one_layer, rename_a_tensor, cut_short,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_shows(model: Path, change: Callable[[Path], None]) -> None:
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) != before


def test_weights_that_are_no_safetensors_do_not_stop_it(model: Path) -> None:
    before = fingerprint(model)
    (model / "model.safetensors").write_bytes(b"\xff" * 100)
    assert fingerprint(model) != before
    (model / "model.safetensors").write_bytes(b"")
    assert fingerprint(model) != before


def test_a_large_file_is_read_in_small_part(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve gigabytes that take no space on the disk, of more tensors than are looked at."""
    count, each = 3000, 4 << 20
    entries = {
        f"t{i}": {"dtype": "F32", "shape": [each // 4], "data_offsets": [i * each, (i + 1) * each]}
        for i in range(count)
    }
    header = json.dumps(entries).encode()
    with (model / "large.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + count * each)
    starts: list[int] = []
    look = fingerprint_module._at

    def watched(file: BinaryIO, start: int) -> bytes:
        starts.append(start)
        return look(file, start)

    monkeypatch.setattr(fingerprint_module, "_at", watched)
    assert fingerprint(model)
    large = starts[: len(starts) - 5]
    assert 512 < len(large) <= 1024
    assert large[-1] - large[0] > 0.99 * (count - 1) * each, "spread over the whole file"
