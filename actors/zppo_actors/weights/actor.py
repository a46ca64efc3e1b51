"""The actors that carry weights from host to host, where a run has engines beside the trainer's.

`weights-0`, on the trainer's host, serves what the trainer publishes there. Each other host with
rollout engines has one that brings every version into its runtime folder once, and tells the
controller when it lies there. To the controller such a carrier is like an engine: it is told to
load a version and answers with the digest of what it has.
"""

from __future__ import annotations

import time

from zppo_actors.membership import LONGEST_REASON, Leave, Membership
from zppo_actors.process import ActorContext
from zppo_actors.weights.fetcher import Fetcher
from zppo_actors.weights.layout import weight_path
from zppo_actors.weights.recycling import set_aside
from zppo_actors.weights.server import WeightServer
from zppo_protocol.addresses import TCP, scheme_of, tcp_endpoint
from zppo_protocol.messages import (
    AnyMessage,
    Forgotten,
    Heartbeat,
    LoadPolicy,
    PolicyLoaded,
    PolicyRefused,
    ReleasePolicy,
    WeightSource,
)
from zppo_protocol.sockets import Dealer
from zppo_protocol.values import PolicyManifest

STEP_SECONDS = 0.05
"""So long a fetch goes on before the controller is heard again."""


def host_in(address: str) -> str:
    """Where the trainer's host is reached, which is the controller's, by the controller's address;
    loopback where that is a path of this host."""
    return tcp_endpoint(address)[0].strip("[]") if scheme_of(address) == TCP else "127.0.0.1"


def main(context: ActorContext) -> int:
    """Serve or fetch until told to leave; returns the exit code."""
    dealer = Dealer(context.credentials, context.limits)
    try:
        if context.index == 0:
            return Serving(context, dealer).run()
        return Carrying(context, dealer).run()
    finally:
        dealer.close()


class _WeightActor:
    """The loop that both have: greet, heed, beat, work."""

    def __init__(self, context: ActorContext, dealer: Dealer) -> None:
        self._context, self._dealer = context, dealer
        self._membership = Membership(context.topology.transport.heartbeat_seconds)
        self._timeline = context.timeline

    def run(self) -> int:
        """Greet, then work until told to leave.

        consumes: what `_heed` takes. produces: Hello, Heartbeat, Goodbye, and what `_work` does.
        waits for: the next message; a carrier that fetches waits for bytes instead. is unblocked
        by: a message, bytes, the clock.
        """
        self._greet()
        try:
            while True:
                if self._membership.due(time.monotonic()):
                    self._dealer.send(Heartbeat(progress=self._progress, stats=self._stats()))
                rest = 0.0 if self._busy else self._membership.rest(time.monotonic())
                message = self._dealer.receive(rest)
                if message is not None:
                    self._heed(message)
                self._work()
        except Leave as leave:
            self._dealer.send(leave.goodbye())
            return leave.exit_code

    @property
    def _busy(self) -> bool:
        return False

    @property
    def _progress(self) -> int:
        return 0

    def _stats(self) -> dict[str, float]:
        return {}

    def _greet(self) -> None:
        self._dealer.send(self._context.hello("weights", 0))

    def _heed(self, message: AnyMessage) -> None:
        """What is on its way goes on while this process is forgotten, and is told of anew."""
        if not isinstance(message, Forgotten):
            self._membership.obey(message)
        elif self._membership.greets_again(time.monotonic()):
            self._greet()

    def _work(self) -> None:
        pass


class Serving(_WeightActor):
    """On the trainer's host: says where weights are to be had, and lets a thread hand them out."""

    def __init__(self, context: ActorContext, dealer: Dealer) -> None:
        super().__init__(context, dealer)
        host, bind = host_in(context.credentials.address), context.topology.transport.bind
        self._server = WeightServer(context.runtime, host, bind=bind)
        self._told = False

    def _stats(self) -> dict[str, float]:
        return {"refused_total": float(self._server.refused)}

    def _heed(self, message: AnyMessage) -> None:
        if self._membership.begins_anew(message):
            self._told = False
        super()._heed(message)

    def _work(self) -> None:
        if self._membership.welcomed and not self._told:
            self._told = True
            self._dealer.send(self._server.source)


class Carrying(_WeightActor):
    """On any other host: brings versions here."""

    def __init__(self, context: ActorContext, dealer: Dealer) -> None:
        super().__init__(context, dealer)
        self._fetcher = Fetcher(context.runtime)
        self._began, self._version = 0.0, 0

    @property
    def _busy(self) -> bool:
        return self._fetcher.busy

    @property
    def _progress(self) -> int:
        """A transfer may take longer than a run waits for anything else to move."""
        return self._fetcher.bytes_total

    def _stats(self) -> dict[str, float]:
        return {"bytes_total": float(self._fetcher.bytes_total), "running": float(self._busy)}

    def _heed(self, message: AnyMessage) -> None:
        match message:
            case WeightSource():
                self._fetcher.come_from(message)
            case LoadPolicy():
                self._want(message.manifest)
            case ReleasePolicy():
                set_aside(weight_path(self._context.runtime, message.version))
            case _:
                super()._heed(message)

    def _want(self, manifest: PolicyManifest) -> None:
        self._began, self._version = self._timeline.now(), manifest.version
        try:
            self._fetcher.want(manifest)
        except (OSError, ValueError) as error:
            self._refuse(error)

    def _work(self) -> None:
        """Fetch on; say so when a version is here, or cannot be had."""
        try:
            arrived = self._fetcher.step(STEP_SECONDS)
        except (OSError, ValueError) as error:
            self._refuse(error)
            return
        if arrived is None:
            return
        seconds = self._timeline.now() - self._began
        self._timeline.span("load", self._began, step=arrived.version)
        self._dealer.send(
            PolicyLoaded(version=arrived.version, digest=arrived.digest, seconds=seconds)
        )

    def _refuse(self, error: Exception) -> None:
        reason = f"it cannot be brought to this host: {error}"
        self._dealer.send(PolicyRefused(version=self._version, reason=reason[:LONGEST_REASON]))
