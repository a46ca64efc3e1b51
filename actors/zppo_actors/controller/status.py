"""What the live view is told, and the clock of who waited for whom."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from zppo.records.metrics import Scalars
from zppo.scheduling.scheduler import Scheduler
from zppo.scheduling.waiting import phase
from zppo_actors.controller.peers import Peer, Peers
from zppo_actors.controller.recorder import Recorder, entry_counters
from zppo_protocol.messages import ActorStatus, Status

RECENT_STEPS = 10


class StepClock:
    """Measures each step: how long the trainer waited for its window, how idle the rollout engines
    were, and whether the graders were at work.

    Each heartbeat of a rollout engine counts once, in the step in which it comes, because it speaks
    of all the time since the one before. A step in which none comes says nothing of the engines.
    """

    def __init__(self, now: float) -> None:
        self._step_began = now
        self._free_since: float | None = None
        self._waited = 0.0
        self._idle_slots = self._slots = 0.0
        self._graders_busy: list[bool] = []
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT_STEPS)

    def trainer_free(self, now: float) -> None:
        self._free_since = now

    def shipped(self, now: float) -> None:
        if self._free_since is not None:
            self._waited = now - self._free_since
        self._free_since = None

    def beat(self, peer: Peer) -> None:
        """A heartbeat came, with these `stats`; one of an engine that may not sample yet has no
        `idle`."""
        if peer.role == "rollout" and (idle := peer.stats.get("idle")) is not None:
            self._idle_slots += peer.capacity * min(1.0, max(0.0, idle))
            self._slots += peer.capacity

    def sample(self, peers: Peers, leases: Callable[[str], int]) -> None:
        """Look at the graders once, for whether each holds tasks."""
        graders = peers.of_role("grader")
        if graders:
            self._graders_busy.append(all(leases(grader.name) for grader in graders))

    def step_done(self, now: float) -> Scalars:
        """Metrics of the step that ends now; the next one begins."""
        self._recent.append((now - self._step_began, self._waited))
        metrics: Scalars = {"time/trainer_wait": self._waited}
        if self._slots:
            metrics["time/rollout_idle"] = self._idle_slots / self._slots
        if self._graders_busy:
            metrics["time/grader_busy"] = sum(self._graders_busy) / len(self._graders_busy)
        self._step_began, self._waited = now, 0.0
        self._idle_slots, self._slots, self._graders_busy = 0.0, 0.0, []
        return metrics

    @property
    def step_seconds(self) -> float:
        """Mean duration of the recent steps in seconds; 0 before the first."""
        return sum(step for step, _ in self._recent) / len(self._recent) if self._recent else 0.0

    @property
    def wait_share(self) -> float:
        """Share of the recent steps that the trainer spent waiting."""
        total = sum(step for step, _ in self._recent)
        return sum(waited for _, waited in self._recent) / total if total else 0.0


def build_status(
    scheduler: Scheduler,
    peers: Peers,
    recorder: Recorder,
    clock: StepClock,
    waiting: list[str],
    advice: list[str],
) -> Status:
    step, total = scheduler.trained, scheduler.total_steps
    windows = list(scheduler.windows)
    ready = sum(scheduler.ready(index) for index in windows)
    counters = {
        **recorder.totals,
        **entry_counters(scheduler.buffer),
        "windows_open": len(windows) - ready,
        "windows_ready": ready,
        "buffer_size": len(scheduler.buffer),
        "buffer_capacity": scheduler.buffer.capacity,
        "reissued": scheduler.dispatcher.reissued,
    }
    gauges = {
        **recorder.gauges,
        "step_seconds": clock.step_seconds,
        "trainer_wait_share": clock.wait_share,
        "lead": float(scheduler.pacer.lead),
    }
    return Status(
        phase=phase(scheduler),
        step=step,
        total_steps=total,
        eta_seconds=clock.step_seconds * (total - step),
        actors=[actor_status(peer, scheduler) for peer in peers.actors()],
        counters=counters,
        gauges=gauges,
        waiting=waiting,
        events=list(recorder.events),
        advice=advice,
    )


def actor_status(peer: Peer, scheduler: Scheduler) -> ActorStatus:
    dispatcher = scheduler.dispatcher
    leases = dispatcher.leases(peer.name)
    working = leases > 0 or (peer.role == "trainer" and scheduler.training is not None)
    return ActorStatus(
        actor=peer.name,
        role=peer.role,
        state="working" if working else "waiting",
        incarnation=peer.incarnation,
        credits=dispatcher.credits(peer.name),
        leases=leases,
        policy_version=scheduler.published if peer.role == "trainer" else peer.policy_version,
        stats=peer.stats,
    )
