"""What is said of sinks before anything starts."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from worlds import topology

from zppo.config.load import load
from zppo.errors import UserError
from zppo.plan.sinks import check_sinks

MINE = """
class Sink:
    def __init__(self, color="red"): ...
    def open(self, run): ...
    def step(self, step, metrics): ...
    def event(self, event): ...
    def close(self): ...

class Short(Sink):
    def step(self, metrics): ...

class Half:
    def open(self, run): ...

def made():
    return Sink()
"""


@pytest.fixture
def said(tmp_path: Path) -> Callable[..., str]:
    (tmp_path / "mine.py").write_text(MINE)

    def sentence(**sinks: Any) -> str:
        """What the check says of a section `sinks`; `MINE` stands for the file."""
        text = msgspec.json.encode(sinks).decode().replace("MINE", str(tmp_path / "mine.py"))
        try:
            check_sinks(topology(sinks=msgspec.json.decode(text)), None)  # type: ignore[arg-type]
        except UserError as error:
            return str(error).replace(str(tmp_path), "DIR")
        return ""

    return sentence


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_package_that_is_missing(
    said: Callable[..., str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert said(**{name: {}}) == (
        f"sinks.{name}: its package is not installed; install it with: pip install 'zppo[{name}]'"
    )


def test_no_password_stands_in_a_run_directory(said: Callable[..., str]) -> None:
    sentence = (
        "sinks.mlflow.tracking_uri: expected an address without a password, which would stand in "
        "the run directory; MLflow reads MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD "
        "from the environment"
    )
    for address in ("https://ann:secret@mlflow.acme.org", "postgresql://ann:s%40x@db:5432/runs"):
        assert said(mlflow={"tracking_uri": address}) == sentence
    for address in ("https://mlflow.acme.org:5000/a:b@c", "sqlite:///runs.db"):
        assert said(mlflow={"tracking_uri": address}) != sentence


def test_a_port_that_is_taken(said: Callable[..., str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert said(prometheus={"port": port}) == (
            f"sinks.prometheus.port: 127.0.0.1:{port} cannot be listened on (Address already in "
            "use); choose another port"
        )
    assert said(prometheus={"port": port}) == ""


def test_a_sink_of_ones_own(said: Callable[..., str]) -> None:
    assert said(use=[{"use": "MINE:Sink", "args": {"color": "blue"}}, {"use": "MINE:made"}]) == ""
    assert said(use=[{"use": "MINE:Sinc"}]) == (
        "sinks.use[0].use: 'DIR/mine.py' has no 'Sinc' (did you mean 'Sink'?)"
    )
    assert said(use=[{"use": "MINE:Sink", "args": {"colour": "blue"}}]) == (
        "sinks.use[0].use: 'DIR/mine.py:Sink' takes (color='red'); expected a function of "
        "(colour=): got an unexpected keyword argument 'colour'"
    )
    assert said(use=[{"use": "MINE:Half"}]) == (
        "sinks.use[0].use: 'DIR/mine.py:Half' has no 'step'; expected a method step(step, metrics)"
    )
    assert said(use=[{"use": "MINE:Short"}]) == (
        "sinks.use[0].use: 'DIR/mine.py:Short.step' takes (self, metrics); expected a function of "
        "(self, step, metrics): too many positional arguments"
    )
    assert said(use=[{"use": "MINE:Sink"}, {"use": "MINE:Sink"}]) == (
        "sinks.use[1].use: there are two sinks 'own-mine.Sink', whose folder in the run directory "
        "would be the same; rename one"
    )


@pytest.mark.parametrize(
    ("sinks", "sentence"),
    [
        ("{wandb: {mode: of}}", "sinks.wandb.mode is 'of'; expected one of offline, online"),
        ("{wanb: {}}", "there is no setting sinks.wanb (did you mean 'wandb'?)"),
        ("{prometheus: {port: 0}}", "sinks.prometheus.port is 0; expected a whole number"),
        ("{aliases: [lr]}", "sinks.aliases[0] is 'lr'; expected"),
        ("{trackio: true}", "sinks.trackio is true; expected"),
    ],
)
def test_settings_are_strict(tmp_path: Path, sinks: str, sentence: str) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(f"data: {{train: a}}\nstudent: {{model: b}}\nsinks: {sinks}\n")
    with pytest.raises(UserError) as caught:
        load(file)
    assert str(caught.value).startswith(f"{file}:3: {sentence}")


def test_a_path_of_ones_own_is_taken_from_the_topology(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text("data: {train: a}\nstudent: {model: b}\nsinks: {use: [{use: './m.py:S'}]}\n")
    assert load(file).sinks.use[0].use == f"{tmp_path}/m.py:S"
