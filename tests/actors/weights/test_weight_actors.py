"""The actors that carry weights, over real sockets: the test is their controller."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from worlds import topology

from zppo_actors import runtime
from zppo_actors.process import ActorContext
from zppo_actors.weights import actor, shared_memory
from zppo_actors.weights.layout import weight_path
from zppo_protocol import messages
from zppo_protocol.messages import AnyMessage
from zppo_protocol.sockets import Router
from zppo_protocol.values import PolicyManifest

PATIENCE = 600.0


class Stage:
    """A controller's socket, the trainer's host and another one."""

    def __init__(self, folder: Path) -> None:
        self.home, self.away = folder / "home", folder / "away"
        for host in (self.home, self.away):
            host.mkdir(mode=0o700)
        names = ("weights-0", "weights-1")
        self.router = Router(runtime.issue_keys(self.home, dict.fromkeys(names, "weights")))
        # What a host agent does: only its own actors' keys are there.
        shutil.copytree(self.home / runtime.KEYS_NAME, self.away / runtime.KEYS_NAME)
        self.threads: dict[str, threading.Thread] = {}
        self.codes: dict[str, int] = {}

    def start(self, name: str, folder: Path) -> None:
        context = ActorContext(
            run_dir=folder, runtime=folder, actor=name, role="weights", incarnation=0,
            topology=topology(), run_id="run", start_version=0,
        )  # fmt: skip

        def main() -> None:
            self.codes[name] = actor.main(context)

        self.threads[name] = threading.Thread(target=main, daemon=True)
        self.threads[name].start()
        hello = self.hear(name, messages.Hello)
        assert (hello.actor, hello.role) == (name, "weights")
        self.router.send(name, messages.Welcome(heartbeat_seconds=0.2))

    def hear(self, peer: str, kind: type) -> AnyMessage:
        """The next message of a kind of a peer; others are let go."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            received = self.router.receive(1.0)
            if received is not None and received[0] == peer and isinstance(received[1], kind):
                return received[1]
        raise AssertionError(f"no {kind.__name__} of {peer}")

    def leave(self) -> None:
        for name, thread in self.threads.items():
            self.router.send(name, messages.Shutdown(reason="done"))
            thread.join(PATIENCE)
        self.router.close()


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    stage.leave()
    assert set(stage.codes.values()) == {0} and len(stage.codes) == len(stage.threads)


def published(folder: Path, version: int) -> PolicyManifest:
    generator = torch.Generator().manual_seed(version)
    return shared_memory.publish(
        {"a": torch.randn(300, 1000, generator=generator)}, version, folder
    )


def test_a_version_is_served_carried_told_and_released(stage: Stage) -> None:
    stage.start("weights-0", stage.home)
    source = stage.hear("weights-0", messages.WeightSource)
    assert isinstance(source, messages.WeightSource) and source.host == "127.0.0.1"
    stage.start("weights-1", stage.away)
    manifest = published(stage.home, 1)
    # In either order: a carrier may be told what to bring before it knows where from.
    stage.router.send("weights-1", messages.LoadPolicy(manifest=manifest))
    stage.router.send("weights-1", source)
    loaded = stage.hear("weights-1", messages.PolicyLoaded)
    assert isinstance(loaded, messages.PolicyLoaded)
    assert (loaded.version, loaded.digest) == (1, manifest.digest)
    there = weight_path(stage.away, 1)
    assert there.read_bytes() == weight_path(stage.home, 1).read_bytes()
    stage.router.send("weights-1", messages.ReleasePolicy(version=1))
    deadline = time.monotonic() + PATIENCE
    while there.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not there.exists() and weight_path(stage.home, 1).exists()


def test_who_is_forgotten_greets_again_and_goes_on(stage: Stage) -> None:
    """A link that was cut ends no carrier and no server, and what they have to say is said anew."""
    stage.start("weights-0", stage.home)
    source = stage.hear("weights-0", messages.WeightSource)
    stage.start("weights-1", stage.away)
    manifest = published(stage.home, 1)
    stage.router.send("weights-1", messages.LoadPolicy(manifest=manifest))
    for name, said in (("weights-0", source), ("weights-1", None)):
        stage.router.send(name, messages.Forgotten())
        assert stage.hear(name, messages.Hello)
        stage.router.send(name, messages.Welcome(heartbeat_seconds=0.2))
        assert said is None or stage.hear(name, messages.WeightSource) == said
    for message in (messages.LoadPolicy(manifest=manifest), source):
        stage.router.send("weights-1", message)
    assert stage.hear("weights-1", messages.PolicyLoaded)
    size = weight_path(stage.home, 1).stat().st_size
    beats = iter(lambda: stage.hear("weights-1", messages.Heartbeat), None)
    assert next(beat for beat in beats if beat.progress).progress == size  # type: ignore[union-attr]


def test_what_cannot_be_had_is_refused_with_the_reason(stage: Stage) -> None:
    stage.start("weights-1", stage.away)
    manifest = published(stage.home, 1)
    crooked = msgspec.structs.replace(manifest, digest="0")
    stage.router.send("weights-1", messages.LoadPolicy(manifest=crooked))
    refused = stage.hear("weights-1", messages.PolicyRefused)
    assert isinstance(refused, messages.PolicyRefused) and refused.version == 1
    assert refused.reason == (
        "it cannot be brought to this host: the manifest's digest is 0, its tensors give "
        f"{manifest.digest}"
    )
