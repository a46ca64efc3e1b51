"""Sinks on threads of their own: what they are given, once each, and what becomes of those that are
wrong, slow or away."""

from __future__ import annotations

import json
import socket
import socketserver
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from wires import free_port
from worlds import topology

from zppo.config.sinks import PrometheusConfig
from zppo.config.topology import Topology
from zppo_actors.sinks import outlet as outlet_module
from zppo_actors.sinks.base import Event, RunInfo
from zppo_actors.sinks.outlets import Outlets
from zppo_actors.sinks.prometheus import MOST_CONNECTIONS, PrometheusSink

OWN = '''
import json

class Sink:
    """Writes what it is given; `{where}` is where it goes wrong."""

    def __init__(self, file):
        self.file = file

    def note(self, *what):
        with open(self.file, "a") as out:
            out.write(json.dumps(what) + "\\n")

    def open(self, run):
        {open}
        self.note("open", run.id, run.name, run.start, run.settings["run"]["seed"])

    def step(self, step, metrics):
        {step}
        self.note("step", step, metrics)

    def event(self, event):
        {event}
        self.note("event", event.event)

    def close(self):
        {close}
        self.note("close")
'''


def own(folder: Path, name: str = "mine", **wrong: str) -> dict[str, Any]:
    """A sink of a user's own, with a line of code in each method."""
    lines = dict.fromkeys(("open", "step", "event", "close"), "pass")
    text = OWN
    for method, line in {"where": str(wrong), **lines, **wrong}.items():
        text = text.replace("{" + method + "}", line)
    (folder / f"{name}.py").write_text(text)
    return {"use": f"{folder / name}.py:Sink", "args": {"file": str(folder / f"{name}.txt")}}


def heard(folder: Path, name: str = "mine") -> list[list[Any]]:
    file = folder / f"{name}.txt"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def until(happened: Callable[[], bool]) -> None:
    """Wait for what a sink does on its thread; the time limit of the test ends a wait in vain."""
    while not happened():
        threading.Event().wait(0.01)


def settings(**sinks: Any) -> Topology:
    return topology(sinks={"tensorboard": False, "close_seconds": 30.0, **sinks})


def lines(*steps: int, **metrics: float) -> list[dict[str, Any]]:
    return [{"step": step, "accuracy/plain": step / 8, **metrics} for step in steps]


def attempt(
    chosen: Topology, folder: Path, start: int, stop: int, known: list[dict[str, Any]] | None = None
) -> list[tuple[str, str]]:
    """One attempt at a run that trains the steps from `start` to before `stop`; what was said."""
    known = lines(*range(start)) if known is None else known
    outlets = Outlets(chosen, folder / "run", start, known)
    for line in lines(*range(start, stop)):
        outlets.step(line)
    return [*outlets.close(), *outlets.news()]


def test_a_sink_hears_the_run_and_the_names_of_others(tmp_path: Path) -> None:
    chosen = settings(use=[own(tmp_path)])
    outlets = Outlets(chosen, tmp_path / "run", 0)
    outlets.step({"step": 0, "accuracy/plain": 0.25, "audit/plain/mixed": 0.75})
    outlets.evaluated(0, 0.5)
    outlets.event(Event(actor="controller", event="advice", detail="severe no_gradient: …"))
    assert list(outlets.close()) == []
    (_, run_id, *opened), *rest = heard(tmp_path)
    assert opened == ["run", 0, 0] and len(run_id) == 16
    assert rest == [
        [
            "step",
            0,
            {
                "accuracy/plain": 0.25,
                "audit/plain/mixed": 0.75,
                "reward": 0.25,
                "frac_reward_zero_std": 0.25,
                "critic/score/mean": 0.25,
            },
        ],
        ["step", 0, {"heldout/accuracy": 0.5}],
        ["event", "advice"],
        ["close"],
    ]


def test_over_all_attempts_a_step_is_given_once_and_none_is_missing(tmp_path: Path) -> None:
    """The first attempt had no sink, the second was lost after step 5, the third went on from 4."""
    chosen = settings(use=[own(tmp_path)], aliases=[])
    assert attempt(settings(), tmp_path, 0, 2) == []
    assert attempt(chosen, tmp_path, 2, 6) == []
    assert attempt(chosen, tmp_path, 4, 8) == []
    said = heard(tmp_path)
    assert [what[1] for what in said if what[0] == "step"] == list(range(8))
    opened = [what for what in said if what[0] == "open"]
    assert [what[3] for what in opened] == [2, 4]
    assert opened[0][1] == opened[1][1]


@pytest.mark.parametrize("where", ["open", "step", "event", "close"])
def test_a_sink_that_raises_is_named_once_and_left_out(tmp_path: Path, where: str) -> None:
    broken = own(tmp_path, "broken", **{where: "raise SystemExit('the disk is away\\nand more')"})
    outlets = Outlets(settings(use=[broken, own(tmp_path)]), tmp_path / "run", 0)
    for line in lines(0, 1, 2):
        outlets.step(line)
        outlets.event(Event(actor="controller", event="checkpoint", detail=""))
    said = [*outlets.close(), *outlets.news()]
    assert said == [
        (
            "sink_failed",
            "sinks.own-broken.Sink: SystemExit: the disk is away; the run goes on without it",
        )
    ]
    assert outlets.failed == 1 and outlets.dropped == 0
    assert [what[1] for what in heard(tmp_path) if what[0] == "step"] == [0, 1, 2]
    assert heard(tmp_path)[-1] == ["close"]


def test_a_sink_that_hangs_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlet_module, "QUEUED", 3)
    hang = "self.note('step'); __import__('threading').Event().wait()"
    chosen = settings(use=[own(tmp_path, "stuck", step=hang), own(tmp_path)], close_seconds=1.0)
    outlets = Outlets(chosen, tmp_path / "run", 0)
    for line in lines(0, 1, 2):
        outlets.step(line)
    until(lambda: len(heard(tmp_path, "stuck")) == 2 and len(heard(tmp_path)) == 4)
    for line in lines(3, 4, 5):
        outlets.step(line)
    assert outlets.dropped == 2
    until(lambda: len(heard(tmp_path)) == 7)  # it has nothing left to do but to close
    assert list(outlets.news()) == [
        (
            "sink_slow",
            "sinks.own-stuck.Sink: it is slow or away, and what does not fit into its queue is "
            "dropped",
        )
    ]
    assert list(outlets.close()) == [
        (
            "sink_left",
            "sinks.own-stuck.Sink: it did not close in 1 s (sinks.close_seconds) and had 3 to "
            "take; metrics.jsonl has all steps",
        )
    ]
    until(lambda: heard(tmp_path)[-1] == ["close"])
    assert len(heard(tmp_path)) == 8


def test_code_that_changed_is_named(tmp_path: Path) -> None:
    attempt(settings(use=[own(tmp_path)]), tmp_path, 0, 1)
    said = attempt(settings(use=[own(tmp_path, step="metrics = {}")]), tmp_path, 1, 2)
    assert said == [
        (
            "sink_changed",
            "sinks.own-mine.Sink: its code is not what it was before the run was resumed",
        )
    ]


# ---- ours ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tensorboard_reads_the_run_and_purges_what_was_rolled_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    chosen = topology(sinks={"tensorboard": True})
    attempt(chosen, tmp_path, 0, 4)
    outlets = Outlets(chosen, tmp_path / "run", 2, lines(0, 1))
    outlets.step({"step": 2, "accuracy/plain": 0.75})
    outlets.evaluated(3, 0.5)
    assert list(outlets.close()) == []
    board = EventAccumulator(str(tmp_path / "run/tensorboard"))
    board.Reload()
    points = [(event.step, event.value) for event in board.Scalars("accuracy/plain")]
    assert points == [(0, 0.0), (1, 0.125), (2, 0.75)]
    assert [event.step for event in board.Scalars("heldout/accuracy")] == [3]
    assert not (tmp_path / "run/sinks").exists()


@pytest.mark.slow
def test_prometheus_reads_the_last_step(tmp_path: Path) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    port = free_port()
    outlets = Outlets(settings(prometheus={"port": port}, aliases=[]), tmp_path / "run", 0)
    outlets.step({"step": 7, "train/loss": -1.5e-7, "buffer/by_entry_accuracy/0.125": 3})
    outlets.event(Event(actor="controller", event="advice", detail=""))
    wanted = {
        ("zppo_train_loss", ""): -1.5e-7,
        ("zppo_step", ""): 7.0,
        ("zppo_buffer_by_entry_accuracy_0_125", ""): 3.0,
        ("zppo_events_total", "advice"): 1.0,
    }

    def found() -> dict[tuple[str, str], float]:
        try:
            text = scrape(port)
        except urllib.error.URLError:  # it does not listen yet
            return {}
        return {
            (sample.name, sample.labels.get("event", "")): sample.value
            for family in parser.text_string_to_metric_families(text)
            for sample in family.samples
        }

    until(lambda: found() == wanted)
    with pytest.raises(urllib.error.HTTPError):
        scrape(port, "/")
    assert list(outlets.close()) == []
    with pytest.raises(urllib.error.URLError):
        scrape(port)


def test_those_who_connect_and_say_nothing_take_no_more_than_they_may(tmp_path: Path) -> None:
    sink = PrometheusSink(PrometheusConfig(port=free_port()))
    run = RunInfo(id="r", name="run", directory=tmp_path, folder=tmp_path, settings={}, start=0)
    sink.open(run)
    address = "127.0.0.1", sink._config.port
    silent = [socket.create_connection(address) for _ in range(MOST_CONNECTIONS)]
    until(lambda: served() == MOST_CONNECTIONS)
    for _ in range(50):
        with socket.create_connection(address) as one:
            assert one.recv(1) == b""
    assert served() == MOST_CONNECTIONS
    for one in silent:
        one.close()
    until(lambda: served() == 0)
    assert "zppo_events_total" in scrape(sink._config.port)
    sink.close()


def test_a_connection_that_finds_no_thread_takes_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = PrometheusSink(PrometheusConfig(port=free_port()))
    run = RunInfo(id="r", name="run", directory=tmp_path, folder=tmp_path, settings={}, start=0)
    sink.open(run)

    def no_thread(*arguments: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(socketserver.ThreadingMixIn, "process_request", no_thread)
        for _ in range(MOST_CONNECTIONS + 1):
            with socket.create_connection(("127.0.0.1", sink._config.port)) as one:
                assert one.recv(1) == b""
    assert "zppo_events_total" in scrape(sink._config.port)
    sink.close()


def served() -> int:
    """The connections that have a thread."""
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


def test_two_runs_on_one_port_cost_the_second_its_sink(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        chosen = settings(prometheus={"port": taken.getsockname()[1]})
        said = attempt(chosen, tmp_path, 0, 1)
    [(event, sentence)] = said
    assert event == "sink_failed"
    assert sentence == (
        "sinks.prometheus: OSError: [Errno 98] Address already in use; the run goes on without it"
    )


def scrape(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=600.0) as answer:
        return str(answer.read().decode())
