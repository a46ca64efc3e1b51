"""The trainer: takes whole windows, updates the student, publishes one policy version per step.

Invariant: version t + 1 is announced once, after step t, and holds only updates whose loss and
gradient were finite. Weights that are not finite are neither published nor saved, because only what
was published is saved. The trainer keeps nothing that must not be lost: a run continues from its
last checkpoint, of which the trainer writes the model, the optimizer state and the counters, and
the controller the rest.

This is the first rank, and mostly the only one. Others (`zppo_actors.trainer.rank`) are told each
order before it is obeyed here, and take their part in it.
"""

from __future__ import annotations

import sys
import time
from collections import deque

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from zppo.errors import EXIT_FATAL, UserError
from zppo.records import checkpoint
from zppo.training.batch import StalenessError
from zppo.training.state import build_trainer, save_share, try_saving
from zppo.training.step import train_step
from zppo.training.trainer import Trainer
from zppo_actors import runtime
from zppo_actors.membership import LONGEST_REASON, Leave, Membership
from zppo_actors.process import ActorContext
from zppo_actors.trainer.checkpoint import starting_checkpoint
from zppo_actors.trainer.meeting import Meeting, is_loss, meet
from zppo_actors.trainer.memory import out_of_memory
from zppo_actors.weights import NotFinite, shared_memory
from zppo_protocol.messages import (
    AnyMessage,
    CheckpointFailed,
    CheckpointSaved,
    Credits,
    Goodbye,
    Heartbeat,
    PolicyPublished,
    ReleasePolicy,
    SaveCheckpoint,
    Shutdown,
    StepTrained,
    TrainWindow,
)
from zppo_protocol.sockets import Dealer
from zppo_protocol.values import PolicyManifest

CAPACITY = 1
"""Windows held at once: windows are trained in order, and a second one would only age here."""


def main(context: ActorContext) -> int:
    """Run the trainer until it is told to leave; returns the exit code of the process.

    A stale window breaks the promise of the run, and a new attempt would hide it: the exit code
    says not to begin one.
    """
    disable_progress_bar()
    dealer = Dealer(context.credentials, context.limits)
    actor = TrainerActor(context, dealer)
    try:
        return actor.run()
    except StalenessError as error:
        print(error, file=sys.stderr, flush=True)
        return EXIT_FATAL
    except torch.OutOfMemoryError as error:
        return out_of_memory(error, context.topology.actors.trainer)
    except Exception as error:
        if is_loss(error):
            return actor.meeting.lost()
        raise
    finally:
        dealer.close()


class TrainerActor:
    """Messages in and out of `zppo.training`.

    `progress` counts trained micro-batches; `Leave` ends a step in its middle, because the
    controller has no more use for its result.
    """

    def __init__(self, context: ActorContext, dealer: Dealer) -> None:
        self.context = context
        self.dealer = dealer
        self.membership = Membership(context.topology.transport.heartbeat_seconds)
        self.progress = 0
        self.stats = {"running": 0.0}
        self.version = context.start_version
        self.orders: deque[TrainWindow | SaveCheckpoint] = deque()
        self.timeline = context.timeline
        self.meeting = Meeting()
        self.published: PolicyManifest | None = None

    def run(self) -> int:
        """Greet, load the student, publish it, then train windows until told to leave.

        consumes: TrainWindow (one per credit), SaveCheckpoint, ReleasePolicy, Shutdown, Rejected.
        produces: Hello, PolicyPublished, Credits, StepTrained, CheckpointSaved, Heartbeat, Goodbye;
        files of policies and checkpoints. waits for: the next order. It sends heartbeats meanwhile,
        and between micro-batches while it trains. is unblocked by: TrainWindow, SaveCheckpoint,
        Shutdown, Rejected, the end of the supervisor.
        """
        try:
            self.dealer.send(self.context.hello("trainer", CAPACITY))
            self._await_welcome()
            trainer = self._load()
            self.timeline.span("start", self.timeline.began)
            self._publish(trainer)
            self.dealer.send(Credits(count=CAPACITY))
            while True:
                self._obey(trainer, self._next_order())
        except Leave as leave:
            self.meeting.leave()
            self.dealer.send(leave.goodbye())
            return leave.exit_code
        except (UserError, StalenessError) as error:
            self.dealer.send(Goodbye(reason=str(error)))
            raise

    def _load(self) -> Trainer:
        self.meeting = meet(self.context)
        checkpoint = starting_checkpoint(self.context)
        topology, ranks = self.context.topology, self.meeting.ranks
        trainer = build_trainer(topology, time.perf_counter, checkpoint, ranks)
        # In the runtime folder, which goes with the attempt whatever becomes of this process.
        try_saving(trainer, self.context.runtime, topology.student.model)
        trainer.tick = self._tick
        return trainer

    # ---- messages --------------------------------------------------------------------------------

    def _await_welcome(self) -> None:
        """consumes, waits for: Welcome. produces: nothing. is unblocked by: Welcome, Shutdown,
        Rejected."""
        while not self.membership.welcomed:
            self._receive(self.membership.seconds)

    def _next_order(self) -> TrainWindow | SaveCheckpoint:
        """consumes, waits for: an order. produces: Heartbeat, and a word to other ranks with each.
        is unblocked by: an order, Shutdown, Rejected."""
        if not self.orders:
            with self.timeline.during("wait", step=self.version):
                self._wait()
        return self.orders.popleft()

    def _wait(self) -> None:
        try:
            while not self.orders:
                self._receive(self.membership.rest(time.monotonic()))
                if self._beat():
                    self.meeting.tell(None)
        except Leave as leave:
            self.meeting.tell(Shutdown(reason=leave.reason))
            raise

    def _tick(self) -> None:
        """After each micro-batch: count it, report when it is time, and hear what has come
        (Shutdown ends the step)."""
        self.progress += 1
        if self._beat():
            self._receive(0.0)

    def _beat(self) -> bool:
        """Send a heartbeat if it is time; say whether it was."""
        due = self.membership.due(time.monotonic())
        if due:
            self.dealer.send(Heartbeat(progress=self.progress, stats=dict(self.stats)))
        return due

    def _receive(self, timeout_s: float) -> None:
        message = self.dealer.receive(timeout_s)
        while message is not None:
            self._handle(message)
            message = self.dealer.receive(0.0)

    def _handle(self, message: AnyMessage) -> None:
        match message:
            case TrainWindow() | SaveCheckpoint():
                self.orders.append(message)
            case ReleasePolicy():
                shared_memory.remove(self.context.runtime, message.version)
            case _:
                self.membership.obey(message)

    # ---- work ------------------------------------------------------------------------------------

    def _obey(self, trainer: Trainer, order: TrainWindow | SaveCheckpoint) -> None:
        if isinstance(order, SaveCheckpoint):
            self._save(trainer, order)
        else:
            self._train(trainer, order)
            self.dealer.send(Credits(count=CAPACITY))

    def _train(self, trainer: Trainer, window: TrainWindow) -> None:
        """Train one window, publish and report."""
        self.stats["running"] = 1.0
        if window.step != self.version:
            raise RuntimeError(
                f"a window of step {window.step} came, but the weights are of step {self.version}"
            )
        runtime.mark_training(self.context.runtime, window.step)
        self.meeting.tell(window)
        begin = self.timeline.now()
        metrics = train_step(trainer, window)
        tokens, end = metrics["tokens_trained"], self.timeline.now()
        seconds = end - begin
        self._note(window.step, begin, end, metrics)
        self.stats["tokens_per_second"] = tokens / max(seconds, 1e-9)
        self.stats["tokens_total"] = self.stats.get("tokens_total", 0.0) + tokens
        self.version = window.step + 1
        # Before the step is reported: whoever knows of a trained step finds its weights.
        self._publish(trainer)
        group_ids = [group.group_id for group in window.groups]
        self.dealer.send(
            StepTrained(step=window.step, group_ids=group_ids, metrics=metrics, seconds=seconds)
        )
        runtime.mark_training(self.context.runtime, None)
        self.stats["running"] = 0.0

    def _note(self, step: int, begin: float, end: float, metrics: dict[str, float]) -> None:
        """Put a step on the timeline. Its updates are the last thing in it, and the proximal pass
        lies before them, so their durations say where they were."""
        updates = max(begin, end - metrics["seconds_update"])
        proximal = max(begin, updates - metrics.get("seconds_proximal", 0.0))
        if proximal < updates:
            self.timeline.span("proximal", proximal, updates, step=step)
        self.timeline.span("update", updates, end, step=step)
        self.timeline.span("train", begin, end, step=step, size=metrics["tokens_trained"])

    def _publish(self, trainer: Trainer) -> None:
        """Write the present weights into shared memory and announce them. Raises UserError for
        weights that are not finite: nobody hears of them."""
        with self.timeline.during("publish", step=self.version):
            try:
                self.published = shared_memory.publish_each(
                    trainer.policy.weights(), self.version, self.context.runtime
                )
            except NotFinite as error:
                raise UserError(self._origin(trainer, error)) from error
            self.dealer.send(PolicyPublished(manifest=self.published))

    def _origin(self, trainer: Trainer, error: NotFinite) -> str:
        """Where weights that are not finite come from, and what to do about it."""
        if self.version > self.context.start_version:
            return f"step {self.version - 1}: {trainer.optimizer.overflow(error)}"
        if (folder := starting_checkpoint(self.context)) is not None:
            return f"{folder}: {error}; remove this checkpoint, and the one before it is resumed"
        model = self.context.topology.student.model
        return f"student.model: {error} in {model!r}; expected weights that are not damaged"

    def _save(self, trainer: Trainer, order: SaveCheckpoint) -> None:
        """Write the trainer's share of the checkpoint of a step; the controller adds its own and
        commits."""
        step = order.step
        if step != self.version:
            raise RuntimeError(
                f"a checkpoint of step {step} was asked for, but the weights are of step "
                f"{self.version}"
            )
        try:
            with self.timeline.during("save", step=step):
                folder = checkpoint.begin(self.context.run_dir, step)
                weights = self._whole_weights()
                self.meeting.tell(order)
                save_share(trainer, folder, step=step, weights=weights)
        except (OSError, SafetensorError) as error:
            checkpoint.discard(self.context.run_dir, step)
            self.dealer.send(CheckpointFailed(step=step, reason=str(error)[:LONGEST_REASON]))
            return
        self.dealer.send(CheckpointSaved(step=step))

    def _whole_weights(self) -> dict[str, Tensor] | None:
        """The weights of several ranks as they were published, which is where they are together;
        None where one rank has them all."""
        if self.meeting.ranks.count == 1:
            return None
        assert self.published is not None
        return shared_memory.open_policy(self.published)
