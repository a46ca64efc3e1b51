"""The controller: owner of everything that must not be lost, and a thin shell around the scheduler.

It turns messages into events of `zppo.scheduling.scheduler`, and the scheduler's assignments and
windows into messages. One thread, one socket, no state of its own beyond who is connected; what
must survive is in the scheduler's state (checkpoints) and in the recorder's files.

Consumes: everything actors and the supervisor send. Produces: tasks, windows, policy announcements,
checkpoints and status. Waits for: the next message, at most `TICK_SECONDS`. Is unblocked by: any
message; the watchdog ends a run in which nothing moves for `run.no_progress_seconds` and names what
waits for what.
"""

from __future__ import annotations

import logging
from contextlib import closing

from zppo.errors import EXIT_FAILED, EXIT_INTERRUPTED, count_of
from zppo.plan.processes import carriers, cores, processes
from zppo.records import run_directory
from zppo.scheduling import events
from zppo.scheduling.dispatch import Assignment
from zppo.scheduling.heldout import EvaluationResult
from zppo.scheduling.scheduler import RunFailure
from zppo.scheduling.waiting import waiting
from zppo_actors import runtime
from zppo_actors.controller.advisor import Advisor
from zppo_actors.controller.checkpointer import Checkpointer
from zppo_actors.controller.collector import collect_less
from zppo_actors.controller.ending import Ending
from zppo_actors.controller.file_thread import Background
from zppo_actors.controller.peers import NO_WORKERS, TRAINER, WEIGHTS, Peer, Peers
from zppo_actors.controller.policies import PolicyBoard
from zppo_actors.controller.recorder import FILE_ERRORS, Recorder, opening
from zppo_actors.controller.restore import bound_to, load_scheduler
from zppo_actors.controller.speech import SPEAKS, answer_of
from zppo_actors.controller.status import StepClock, build_status
from zppo_actors.own_time import OwnTime
from zppo_actors.process import ActorContext
from zppo_protocol import messages
from zppo_protocol.errors import ProtocolError
from zppo_protocol.messages import AnyMessage
from zppo_protocol.sockets import Router
from zppo_protocol.values import SUPERVISOR, PolicyManifest

TICK_SECONDS = 0.05
STATUS_SECONDS = 0.5
LEAVE_SECONDS = 10.0
REFUSED_ANSWERS = 3
"""So many answers of one process that were not let in, and it is replaced."""
CONTROLLER = "controller"
LONGEST_REASON = 2000
"""Characters of what an actor says that are worth passing on."""

log = logging.getLogger("zppo.controller")


def main(context: ActorContext) -> int:
    """Run the controller to the end of the run; returns the run's exit code."""
    with closing(Router(runtime.access(context.runtime), context.limits, context.ear)) as router:
        with opening(context.run_dir):
            controller = Controller(context, router)
        collect_less()
        return controller.run()


class Controller:
    def __init__(self, context: ActorContext, router: Router) -> None:
        self._time = OwnTime()
        now = self._time.now()
        self.context, self.router = context, router
        record = run_directory.read(context.run_dir)
        made_with = bound_to(context, record.corpus)
        self.background = Background()
        self.recorder = Recorder(context, self.background)
        self.scheduler = load_scheduler(
            context, record, self.recorder.measured, self.recorder.journal.spent(), now
        )
        self.checkpointer = Checkpointer(context, self.recorder, self.background, made_with)
        table = processes(context.topology, cores())
        self.board = PolicyBoard(carriers(table), context.topology.scheduler.max_staleness)
        self.source: messages.WeightSource | None = None
        self.peers = Peers(context.run_id, router.roles)
        self.pools = {entry.name: entry.pool for entry in table}
        self.clock = StepClock(now)
        self.verdict: messages.RunEnded | None = None
        self.advisor = Advisor(context, self.recorder, self.scheduler.next_index)
        self.ending = Ending(self.scheduler, self.checkpointer, self.recorder, self._save)
        self._last_progress = now
        self._moved: dict[str, float] = {}
        self._next_status = now
        # The journal was rolled back to the checkpoint, in which these windows were in flight.
        for window in self.scheduler.windows.values():
            self.recorder.opened(window)
        for index in record.redraws:
            times = record.trainer_deaths[index]
            detail = f"window {index}: the trainer died on it {times} times; it is sampled again"
            self.recorder.event("controller", "poisoned_window", detail)

    def run(self) -> int:
        """Serve until the run has ended, then tell everybody and leave."""
        try:
            while self.verdict is None:
                self.turn()
        except RunFailure as failure:
            self.verdict = messages.RunEnded(verdict=str(failure), exit_code=EXIT_FAILED)
        except FILE_ERRORS as error:
            self.verdict = self.recorder.trouble(error)
        return self._leave(self.verdict)

    # ---- loop ------------------------------------------------------------------------------------

    def turn(self) -> None:
        """Take what has come, then act on it."""
        self._receive()
        self._act(self._time.now())

    def _receive(self) -> None:
        """Take everything that has come, so that decisions see the newest state."""
        received = self.router.receive(TICK_SECONDS)
        while received is not None:
            peer, message = received
            now = self._time.now()
            self.peers.heard(peer, now)
            if self._handle(peer, message, now):
                self._last_progress = now
            received = self.router.receive(0.0)

    def _act(self, now: float) -> None:
        self._announce_policies()
        self._feed(events.Tick(now=now), now)
        self.recorder.check()
        self.verdict = self.ending.look(now, self.advisor.remark)
        if now >= self._next_status:
            self._next_status = now + STATUS_SECONDS
            self._watch(now)
            self.recorder.strangers(self.router.refused, self.router.refusal)
            self.clock.sample(self.peers, self.scheduler.dispatcher.leases)
            self._send(SUPERVISOR, self._status())

    def _status(self) -> messages.Status:
        waiting = self._waiting()
        return build_status(
            self.scheduler, self.peers, self.recorder, self.clock, waiting, self.advisor.lines
        )

    def _feed(self, event: events.Event, now: float) -> bool:
        """Tell the scheduler, and carry out what comes of it; says whether an answer was
        accepted."""
        accepted = False
        for outcome in self.scheduler.handle(event):
            match outcome:
                case events.Accepted():
                    accepted = True
                case Assignment():
                    self._send(outcome.worker, outcome.job.message)
                case events.Cost():
                    self.recorder.paid(outcome)
                case events.Opened():
                    self.recorder.opened(outcome.window)
                case messages.TrainWindow():
                    self.clock.shipped(now)
                    self._send(TRAINER, outcome)
                case EvaluationResult():
                    self._evaluated(outcome)
                case events.Refused():
                    self._refuse(outcome)
                case events.WorkerStuck():
                    self._restart(outcome.actor, outcome.reason)
        return accepted

    def _announce_policies(self) -> None:
        for peer in self.peers.actors():
            if peer.role != "rollout" and peer.name not in self.board.carriers:
                continue
            manifest = self.board.next_for(peer.name)
            if manifest is not None:
                self._send(peer.name, messages.LoadPolicy(manifest=manifest))
        for place, version in self.board.release():
            self._send(place or TRAINER, messages.ReleasePolicy(version=version))

    def _weights_at(self, source: messages.WeightSource) -> None:
        """The weights are served: whoever brings them to another host may fetch them there."""
        self.source = source
        for name in self.board.carriers:
            self._send(name, source)

    def _evaluated(self, result: EvaluationResult) -> None:
        self.recorder.evaluated(result)
        self.recorder.event(
            "evaluation", "held_out", f"{result.accuracy:.3f} after {count_of(result.step, 'step')}"
        )

    def _watch(self, now: float) -> None:
        self._feed(events.LeaseCheck(now=now), now)
        for peer in self.peers.of_role(WEIGHTS):
            self._watch_silence(peer, now)
        self._watch_trainer(now)
        limit = self.context.topology.run.no_progress_seconds
        if now - self._last_progress > limit:
            raise RunFailure(
                f"nothing moved for {limit:g} s: "
                f"{'; '.join(self._waiting()) or 'no actor has greeted'}"
            )

    def _watch_trainer(self, now: float) -> None:
        """A trainer that hangs is replaced like one that died: the run begins again from its last
        checkpoint. It may be silent while it loads or saves, but not still."""
        peer = self.peers.get(TRAINER)
        if peer is None or self._watch_silence(peer, now):
            return
        limit = self.context.topology.run.no_progress_seconds
        if self.scheduler.training is not None and now - self._last_progress > limit:
            self._restart(
                TRAINER, f"step {self.scheduler.training} made no progress for {limit:g} s"
            )
            self._last_progress = now  # the supervisor ends this attempt

    def _watch_silence(self, peer: Peer, now: float) -> bool:
        """Replace a process that holds no leases, and so is missed by nobody, when it is as if
        dead; says whether it was."""
        lease = self.context.topology.scheduler.lease_seconds
        silent = now - max(peer.heard, self._moved.get(peer.name, 0.0)) > lease
        if silent:
            self._restart(peer.name, f"it said and did nothing for {lease:g} s")
        return silent

    def _is_loading(self, name: str) -> bool:
        """Whether a process may be silent and work all the same: an actor that has not greeted yet,
        or the trainer with its ranks, which reads the student before and writes checkpoints
        after."""
        if self.pools.get(name) == TRAINER:
            return self.board.latest is None or self.checkpointer.waiting_for is not None
        return name != CONTROLLER and name not in self.peers

    def _moving(self, names: list[str], now: float) -> bool:
        self._moved.update(dict.fromkeys(names, now))
        return any(self._is_loading(name) for name in names)

    def _waiting(self) -> list[str]:
        step = self.checkpointer.waiting_for
        saving = (
            [f"the checkpoint of step {step} waits for the trainer"] if step is not None else []
        )
        return saving + waiting(self.scheduler) + self.board.waiting()

    # ---- the end ---------------------------------------------------------------------------------

    def _leave(self, verdict: messages.RunEnded) -> int:
        log.info("run ended: %s", verdict.verdict)
        try:
            # A disk that is full only now makes a failure of what had looked finished.
            self.background.close()
            self.recorder.close_sinks()
        except FILE_ERRORS as error:
            verdict = self.recorder.trouble(error)
        self.router.send(SUPERVISOR, self._status())
        try:
            self.recorder.close(verdict.verdict)
        except FILE_ERRORS as error:  # the last word must go out all the same
            verdict = self.recorder.trouble(error)
        for peer in self.peers.actors():
            self.router.send(peer.name, messages.Shutdown(reason=verdict.verdict))
        self.router.send(SUPERVISOR, verdict)
        deadline = self._time.now() + LEAVE_SECONDS
        while self.peers.actors() and self._time.now() < deadline:
            received = self.router.receive(TICK_SECONDS)
            # A Goodbye speaks for its sender; an exit is told by the supervisor, about another.
            if received is not None and isinstance(
                received[1], messages.Goodbye | messages.ActorExited
            ):
                self.peers.forget(getattr(received[1], "actor", received[0]))
        return verdict.exit_code

    def _save(self) -> None:
        """Keep the scheduler as it is at this very step, and ask for the trainer's share to go with
        it."""
        step = self.scheduler.trained
        self.checkpointer.begin(step, self.scheduler.state())
        self._send(TRAINER, messages.SaveCheckpoint(step=step))

    # ---- messages --------------------------------------------------------------------------------

    def _handle(self, name: str, message: AnyMessage, now: float) -> bool:
        """Take one message; says whether it moved the run forward, which is what the watchdog
        waits for."""
        peer = self.peers.get(name)
        if isinstance(message, messages.Hello):
            self.router.renewed.discard(name)
            self._greet(name, message)
        elif peer is None:
            self.router.send(name, messages.Forgotten())
        elif isinstance(message, messages.Heartbeat) and self._is_unsure(peer):
            self.router.renewed.discard(name)
            self._lost(name)
            self.router.send(name, messages.Forgotten())
        elif not isinstance(message, SPEAKS[peer.role]):
            log.warning("%s sent %s, which is not for it to say", name, type(message).__name__)
        else:
            return self._heed(peer, message, now)
        return False

    def _is_unsure(self, peer: Peer) -> bool:
        """Whether credits, or words about weights, may have been lost with its old connection. Who
        can begin anew does, after what it had to say has been heard."""
        return peer.name in self.router.renewed and peer.role not in (SUPERVISOR, TRAINER)

    def _heed(self, peer: Peer, message: AnyMessage, now: float) -> bool:
        """What a known peer may say; says whether something moved."""
        name = peer.name
        match message:
            case messages.Heartbeat():
                return self._heartbeat(peer, message, now)
            case messages.Credits():
                self._credits(peer, message.count, now)
            case messages.GenerateResult() | messages.ScoreResult() | messages.GradeResult():
                return self._feed(answer_of(message, peer, now), now)
            case messages.TaskFailed():
                self._failed(peer, message, now)
            case messages.PolicyPublished():
                self._published(message.manifest)
                return True
            case messages.PolicyLoaded():
                self._loaded(peer, message)
            case messages.PolicyRefused():
                said = f"version {message.version}: {message.reason[:LONGEST_REASON]}"
                self.recorder.event(name, "refused_policy", said)
                self._restart(name, f"it refused policy {said}")
            # Else the key of one further host would be enough to lead all others astray.
            case messages.WeightSource() if name not in self.board.carriers:
                self._weights_at(message)
            case messages.StepTrained():
                self._step_trained(message, now)
                return True
            case messages.CheckpointSaved():
                self.checkpointer.share_written(message.step)
                self.recorder.event("controller", "checkpoint", f"step {message.step}")
            case messages.CheckpointFailed():
                self.checkpointer.failed(message.step, message.reason)
            case messages.ActorExited():
                self._exited(message)
            case messages.ActorsMoving():
                return self._moving(message.actors, now)
            case messages.StopRequested():
                self.ending.stop(message.reason, EXIT_INTERRUPTED)
            case messages.Goodbye():
                if message.reason:
                    self.recorder.event(name, "left", message.reason)
                self._lost(name)
        return False

    def _greet(self, name: str, hello: messages.Hello) -> None:
        problem = self.peers.problem(name, hello)
        if problem is not None:
            log.warning("%s is rejected: %s", name, problem)
            self.router.send(name, messages.Rejected(reason=problem))
            return
        if name in self.peers:
            # Its earlier incarnation ended without a word; what it held goes to others now.
            self._lost(name)
        self.peers.add(name, hello, self._time.now())
        self._send(
            name,
            messages.Welcome(heartbeat_seconds=self.context.topology.transport.heartbeat_seconds),
        )
        if self.source is not None and name in self.board.carriers:
            self._send(name, self.source)
        if hello.role not in NO_WORKERS:
            self.scheduler.handle(
                events.ActorJoined(actor=name, pool=self.pools[name], incarnation=hello.incarnation)
            )
        log.info("%s joined (incarnation %d, process %d)", name, hello.incarnation, hello.pid)

    def _heartbeat(self, peer: Peer, message: messages.Heartbeat, now: float) -> bool:
        moved = message.progress > peer.progress
        if moved:
            self.scheduler.handle(events.Progressed(actor=peer.name, now=now))
        peer.progress, peer.stats = message.progress, message.stats
        self.clock.beat(peer)
        self._feed(events.Heard(actor=peer.name, tasks=message.tasks, now=now), now)
        return moved

    def _credits(self, peer: Peer, count: int, now: float) -> None:
        if peer.role == "trainer":
            self.scheduler.handle(events.TrainerFree(now=now))
            self.clock.trainer_free(now)
            return
        try:
            self.scheduler.handle(events.Granted(actor=peer.name, count=count))
        except ProtocolError as error:
            log.warning("%s", error)

    def _failed(self, peer: Peer, message: messages.TaskFailed, now: float) -> None:
        self.recorder.event(peer.name, "task_failed", f"{message.task_id}: {message.reason}")
        self.scheduler.handle(
            events.Failed(
                task_id=message.task_id,
                actor=peer.name,
                incarnation=peer.incarnation,
                reason=message.reason,
                retryable=message.retryable,
                now=now,
            )
        )

    def _refuse(self, refusal: events.Refused) -> None:
        """An answer was not let in. Its task is on its way again; who keeps sending such answers is
        replaced."""
        self.recorder.refused(refusal)
        peer = self.peers.get(refusal.actor)
        if peer is not None:
            peer.refused += 1
            if peer.refused >= REFUSED_ANSWERS:
                self._restart(peer.name, f"it sent {peer.refused} answers that cannot be right")

    def _published(self, manifest: PolicyManifest) -> None:
        try:
            self.board.publish(manifest)
        except ValueError as error:
            raise RunFailure(str(error)) from None
        self.scheduler.handle(events.PolicyPublished(version=manifest.version))

    def _loaded(self, peer: Peer, message: messages.PolicyLoaded) -> None:
        if self.board.loaded(peer.name, message.version, message.digest):
            peer.policy_version = message.version
            if peer.role not in NO_WORKERS:
                self.scheduler.handle(events.PolicyLoaded(actor=peer.name, version=message.version))
        else:
            self.recorder.event(
                peer.name, "wrong_policy", f"version {message.version} has another digest"
            )
            self._restart(peer.name, f"it loaded other weights than version {message.version}")

    def _step_trained(self, message: messages.StepTrained, now: float) -> None:
        [trained] = self.scheduler.handle(
            events.StepTrained(step=message.step, seconds=message.seconds)
        )
        assert isinstance(trained, events.Trained)
        line = self.recorder.trained(
            trained, message, self.scheduler.buffer, self.clock.step_done(now)
        )
        done = self.scheduler.trained
        last = done >= self.scheduler.total_steps
        # After the records: a checkpoint is never ahead of its journal.
        if last or done % self.context.topology.checkpoints.every == 0:
            self._save()
        reason = self.advisor.step(line, last=last)
        # After the last step there is nothing left to stop; the verdict says what was found.
        if reason is not None and not last:
            self.ending.stop(reason, EXIT_FAILED)

    # ---- peers -----------------------------------------------------------------------------------

    def _exited(self, message: messages.ActorExited) -> None:
        self.recorder.event(message.actor, "exited", message.verdict)
        peer = self.peers.get(message.actor)
        # The next incarnation may have greeted before this word of the last one came.
        if peer is not None and peer.incarnation <= message.incarnation:
            self._lost(message.actor)
        if message.restarting:
            self.recorder.event(message.actor, "restarting")
            self.recorder.totals["restarts"] += 1

    def _restart(self, name: str, reason: str) -> None:
        """Ask the supervisor for a new incarnation of an actor that lives but does not do its
        work."""
        peer = self.peers.get(name)
        if peer is None:
            return
        self.recorder.event(name, "restart_asked", reason)
        self._send(
            SUPERVISOR,
            messages.RestartActor(actor=name, incarnation=peer.incarnation, reason=reason),
        )
        self._lost(name)

    def _lost(self, name: str) -> None:
        peer = self.peers.forget(name)
        self.board.forget(name)
        if peer is not None and peer.role not in NO_WORKERS:
            self.scheduler.handle(events.ActorLeft(actor=name))

    def _send(self, name: str, message: AnyMessage) -> None:
        """Send, or treat the peer as lost: its jobs go to others and its next incarnation greets
        anew."""
        try:
            sent = name not in self.peers or self.router.send(name, message)
        except ProtocolError as error:
            raise RunFailure(
                f"a {type(message).__name__} for {name} cannot be sent: {error}; raise "
                "transport.max_message_mib"
            ) from None
        if not sent:
            log.warning("%s cannot be reached", name)
            if name != SUPERVISOR:
                self._lost(name)
