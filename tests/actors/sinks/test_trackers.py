"""Outside trackers, in their offline modes: a run and its resume are one run there, and every step
is in it once. Those that are not installed are skipped; `make test` installs trackio."""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from worlds import topology

from zppo_actors.sinks.base import Event
from zppo_actors.sinks.outlets import Outlets

pytestmark = pytest.mark.slow


def run_twice(folder: Path, **sinks: Any) -> None:
    """Steps 0 to 3, then, from the checkpoint of step 2, steps 2 to 4 and an evaluation."""
    chosen = topology(sinks={"tensorboard": False, "close_seconds": 300.0, **sinks})

    def line(step: int) -> dict[str, Any]:
        return {"step": step, "train/loss": step / 4, "tasks/failed/bcq/teacher-0": 1}

    for start, stop in ((0, 4), (2, 5)):
        outlets = Outlets(chosen, folder / "run", start, [line(step) for step in range(start)])
        for step in range(start, stop):
            outlets.step(line(step))
        outlets.event(Event(actor="controller", event="advice", detail="warning: …"))
        outlets.evaluated(start, 0.5)
        assert list(outlets.close()) == []


LOSSES = [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]
"""What `run_twice` leaves: steps 2 and 3 as the first attempt had them, and not again."""


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio = pytest.importorskip("trackio")
    for module in (trackio.utils, trackio.sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    run_twice(tmp_path, trackio={"project": "mine"})
    [file] = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as connection:
        rows = list(connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id"))
    assert len({name for name, _, _ in rows}) == 1
    values = [(step, msgspec.json.decode(metrics)) for _, step, metrics in rows]
    assert [(s, m["train/loss"]) for s, m in values if "train/loss" in m] == LOSSES
    assert [(s, m["loss"]) for s, m in values if "loss" in m] == LOSSES
    assert [s for s, m in values if "heldout/accuracy" in m] == [0, 2]


def test_wandb(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run_twice(tmp_path, wandb={"project": "mine", "mode": "offline"})
    files = sorted((tmp_path / "run/sinks/wandb/wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1
    rows = [row for file in files for row in wandb_rows(file)]
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == LOSSES
    assert [row["step"] for row in rows if "heldout/accuracy" in row] == [0, 2]


def wandb_rows(file: Path) -> list[dict[str, Any]]:
    """The history of an offline run: one protocol buffer in each record of the file."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for data in leveldb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = record.history.item
        rows.append({"/".join(i.nested_key) or i.key: float(i.value_json) for i in items})
    return rows


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: blocks of 32 KiB of pieces with a header of seven
    bytes (checksum, length, and whether it is whole, first, middle or last); W&B's own header of
    seven bytes stands before the first."""
    position, part = 7, b""
    while position + 7 <= len(data):
        left = 32_768 - position % 32_768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield part
            part = b""


def test_mlflow(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    run_twice(tmp_path, mlflow={"experiment": "mine"})
    folder = tmp_path / "run/sinks/mlflow"
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mine")
    [found] = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == (folder / "run_id").read_text()
    assert found.info.status == "FINISHED" and found.data.params["run.seed"] == "0"
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert sorted((metric.step, metric.value) for metric in history) == LOSSES
