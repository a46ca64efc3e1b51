"""What a run leaves behind while it runs: journal, metrics, fates, held-out results, rollouts, and
running totals.

The one writer of these files; owned by the controller. `totals` and `gauges` carry the names of the
live view.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from zppo.algorithm.methods import get_method
from zppo.algorithm.replay_buffer import ReplayBuffer
from zppo.algorithm.window import PLAIN, Window
from zppo.config.topology import TeacherConfig
from zppo.errors import EXIT_FAILED, FULL, UserError, words_of
from zppo.records.flops import token_counts
from zppo.records.metrics import (
    LASTING_FATES,
    SPENT_PREFIX,
    Scalars,
    buffer_metrics,
    entry_name,
    failed_tries,
    reformulated_kinds,
    spent_costs,
    trainer_metrics,
    window_metrics,
)
from zppo.records.run_directory import Place
from zppo.records.summary import Record, end_gauges, plain_accuracy, read_lines
from zppo.scheduling.events import Cost, Refused, Trained
from zppo.scheduling.heldout import EvaluationResult
from zppo.scheduling.scheduler import RunFailure
from zppo_actors.controller.file_thread import Background
from zppo_actors.controller.journal import Journal, TrainedRow
from zppo_actors.controller.sinks import MetricSinks
from zppo_actors.process import ActorContext
from zppo_actors.sinks.base import Event
from zppo_actors.sinks.outlets import Outlets
from zppo_protocol.messages import RunEnded, StepTrained

SHOWN_EVENTS = 20
SINK_TROUBLES = ("failed", "dropped")

log = logging.getLogger("zppo.controller")


FILE_ERRORS = (OSError, sqlite3.Error)
"""What a full disk makes of the records."""


@contextlib.contextmanager
def opening(run_dir: Path) -> Iterator[None]:
    """While an attempt opens its records. Raises UserError where the disk is full: another attempt
    would find it so. What is missing or cannot be read, as a checkpoint, is another error."""
    try:
        yield
    except FILE_ERRORS as error:
        if isinstance(error, OSError) and error.errno not in FULL:
            raise
        raise UserError(_unwritable(run_dir, error)) from error


def _unwritable(run_dir: Path, error: Exception) -> str:
    return (
        f"the records in {str(run_dir)!r} cannot be written ({words_of(error)}); expected a disk "
        "with room there, then zppo launch --resume"
    )


class Recorder:
    def __init__(self, context: ActorContext, background: Background) -> None:
        start = context.start_version
        self._place = Place(context.run_dir)
        self._background = background
        self._scored = get_method(context.topology.method.name).needs_scores
        self._has_reference = context.topology.method.kl_coefficient > 0
        self.journal = Journal(context.run_dir, start)
        # Also at step 0: an attempt may have died before its first checkpoint.
        self.journal.roll_back(start)
        self.sinks = MetricSinks(context.run_dir, context.topology.sinks, start)
        lines = read_lines(context.run_dir / "metrics.jsonl")
        heldout = read_lines(context.run_dir / "heldout.jsonl")
        self.outlets = Outlets(context.topology, context.run_dir, start, lines, heldout)
        self.totals: Counter[str] = Counter()
        self._strangers_due = 1
        self.gauges: dict[str, float] = {
            "max_staleness": float(context.topology.scheduler.max_staleness)
        }
        self._accuracies: defaultdict[str, list[float]] = defaultdict(list)
        self.events: deque[str] = deque(maxlen=SHOWN_EVENTS)
        self.measured: list[int] = []
        """Steps whose policy has been measured on the held-out questions already."""
        self._recall(lines, heldout)
        self._recall_costs(lines, context.topology.teacher)
        if self.journal.renewed is not None:
            self.event("controller", "journal_renewed", self.journal.renewed)
            log.warning("%s", self.journal.renewed)

    def event(self, actor: str, event: str, detail: str = "") -> None:
        """Journal an event and show it."""
        self.journal.record_event(time.time(), actor, event, detail)
        self.outlets.event(Event(actor=actor, event=event, detail=detail))
        what = f"{event.replace('_', ' ')}: {detail}" if detail else event.replace("_", " ")
        self.events.append(f"{time.strftime('%H:%M:%S')} {actor}: {what}")

    def strangers(self, count: int, reason: str) -> None:
        """So many connections were refused in all, the last one for this reason. Said of the 1st,
        and when they have doubled, because a scanner may knock thousands of times."""
        if count >= self._strangers_due:
            self._strangers_due = 2 * count
            self.event(
                "controller", "refused_connection", f"{count} so far; the last one: {reason}"
            )

    def refused(self, refusal: Refused) -> None:
        """An answer was not let in: journal it, show it, count it and log it."""
        detail = f"{refusal.task_id}: it sent {refusal.reason}"
        self.event(refusal.actor, "refused_answer", detail)
        self.totals["answers_refused"] += 1
        log.warning("an answer of %s to %s", refusal.actor, detail)

    def paid(self, cost: Cost) -> None:
        """A teacher's work has cost something."""
        self.journal.record_cost(cost.kind, cost.requests, cost.tokens)
        self._count_cost(cost.kind, cost.requests, cost.tokens)

    def _count_cost(self, kind: str, requests: int, tokens: int) -> None:
        self.totals[f"{SPENT_PREFIX}requests/{kind}"] += requests
        self.totals[f"{SPENT_PREFIX}tokens/{kind}"] += tokens

    def opened(self, window: Window) -> None:
        """A new window, or a restored one. What is trained of it is in the journal, or was before
        this one began."""
        with self.journal.together():
            for visit in window.plain_visits:
                if visit.origin == "new":
                    self.journal.record_dispatched(visit.question.id, window.index, visit.epoch)

    def trained(
        self, trained: Trained, message: StepTrained, buffer: ReplayBuffer, waits: Scalars
    ) -> Scalars:
        """One finished step: the journal gets what the trainer says it trained, not what it was
        sent. Returns the step's line of metrics.jsonl. Raises RunFailure where they would be lost.
        """
        self.check_place()
        window, fates = trained.window, trained.fates
        rows = journal_rows(trained, message.group_ids)
        self.journal.record_trained(message.step, rows, trained.settled)
        lasting = [fate for fate in fates if fate.fate in LASTING_FATES]
        metrics = {
            **window_metrics(window, message.step),
            **token_counts(
                window, trained.tokens, scored=self._scored, reference=self._has_reference
            ),
            **buffer_metrics(len(buffer), buffer.capacity, by_entry_accuracy(buffer), lasting),
            **trainer_metrics(message.metrics),
            **waits,
            **{name: n for name, n in self.totals.items() if name.startswith(SPENT_PREFIX)},
            **{f"sinks/{what}": n for what in SINK_TROUBLES if (n := self.totals[f"sinks_{what}"])},
        }
        line = self.sinks.write(message.step, metrics)
        self.outlets.step(line)
        self.sinks.write_fate(message.step, lasting)
        self._background.submit(self.sinks.write_rollouts, message.step, trained)
        self._add(line)
        return line

    def check_place(self) -> None:
        """Raise RunFailure where the run directory is not the one that the records are in."""
        problem = self._place.problem()
        if problem is not None:
            raise RunFailure(problem)

    def trouble(self, error: Exception) -> RunEnded:
        """The end of a run whose records cannot be written."""
        verdict = self._place.problem() or _unwritable(self._place.path, error)
        return RunEnded(verdict=verdict, exit_code=EXIT_FAILED)

    def evaluated(self, result: EvaluationResult) -> None:
        self.sinks.write_heldout(result)
        self.outlets.evaluated(result.step, result.accuracy)
        self._heldout(result.step, result.accuracy)

    def check(self) -> None:
        """Raise what went wrong in file work that has finished; say what went wrong with sinks, and
        count it."""
        self._background.check()
        self._tell(self.outlets.news())
        self.totals["sinks_failed"], self.totals["sinks_dropped"] = (
            self.outlets.failed,
            self.outlets.dropped,
        )

    def close_sinks(self) -> None:
        """Let the sinks take what waits, for a while, and say which have not."""
        self._tell(self.outlets.close())

    def close(self, verdict: str) -> None:
        self.journal.record_event(time.time(), "controller", "run_ended", verdict)
        self.journal.close()
        self.sinks.close()
        self._place.close()

    def _tell(self, troubles: Iterable[tuple[str, str]]) -> None:
        for event, detail in troubles:
            log.warning("%s", detail)
            self.event("controller", event, detail)

    def _recall(self, lines: Iterable[Record], heldout: Iterable[Record]) -> None:
        """Totals of a resumed run, from its own files."""
        for line in lines:
            self._add(line)
        for line in heldout:
            self._heldout(line["step"], line["accuracy"])
            self.measured.append(line["step"])
        self.totals["restarts"] = self.journal.count("restarting")
        self.totals["answers_refused"] = self.journal.count("refused_answer")

    def _recall_costs(self, lines: Sequence[Record], teacher: TeacherConfig | None) -> None:
        """What the teachers have cost so far. A journal that has just been begun anew gets it from
        the last step."""
        if self.journal.renewed is not None and lines:
            for known in spent_costs(lines[-1]):
                self.journal.record_cost(*known)
        for kind, cost in self.journal.spent().items():
            self._count_cost(kind, cost.requests, cost.tokens)
        for name in ("requests", "tokens"):
            limit = getattr(teacher.budget, name) if teacher is not None else None
            if limit is not None:
                self.totals[f"budget_{name}"] = limit

    def _add(self, line: Scalars) -> None:
        for total, name in _SUMMED.items():
            self.totals[total] += int(line.get(name, 0))
        for kind in reformulated_kinds(line):
            self.totals[f"groups_{kind}"] += int(line[f"window/{kind}"])
            self._accuracy(kind, line.get(f"accuracy/{kind}"))
        self._accuracy(PLAIN, plain_accuracy(line))
        for kind, actor, tries in failed_tries(line):
            self.totals[f"failed/{kind}/{actor}"] += tries
        for gauge, name in _LATEST.items():
            if name in line:
                self.gauges[gauge] = float(line[name])
        self.gauges["staleness_max"] = max(
            self.gauges.get("staleness_max", 0.0), float(line.get("staleness/max", 0))
        )

    def _accuracy(self, kind: str, value: float | None) -> None:
        """The newest accuracy of a kind, and its mean over the first and the last tenth."""
        if value is not None:
            series = self._accuracies[kind]
            series.append(float(value))
            self.gauges[f"accuracy_{kind}"] = series[-1]
            self.gauges |= end_gauges(kind, series)

    def _heldout(self, step: int, accuracy: float) -> None:
        self.gauges["heldout_before" if step == 0 else "heldout_last"] = accuracy


def journal_rows(trained: Trained, group_ids: list[str]) -> list[TrainedRow]:
    """What the trainer says it trained, and one row of kind `none` for each question that had
    nothing to train."""
    known = {
        c.id: (visit.window, c.id, visit.question.id, c.kind, visit.origin)
        for visit, c in trained.composed
    }
    nobody = trained.window.index
    rows = [known.get(group_id, (nobody, group_id, "?", "?", "?")) for group_id in group_ids]
    composed = {visit.plain.id for visit, _ in trained.composed}
    idle = [visit for visit in trained.window.plain_visits if visit.plain.id not in composed]
    return rows + [
        (visit.window, f"{visit.plain.id}/none", visit.question.id, "none", visit.origin)
        for visit in idle
    ]


_SUMMED = {
    "questions_new": "window/new",
    "questions_replayed": "window/replayed",
    "admitted": "buffer/admitted",
    "graduated": "buffer/graduated",
    "evicted": "buffer/evicted",
    "tokens_generated": "tokens/generated",
    "updates": "train/updates",
}
_LATEST = {
    "staleness_mean": "staleness/mean",
    "step_seconds": "time/step",
    "wall_seconds": "wall_seconds",
    "answers_missing": "answers/missing",
    "answers_timed_out": "answers/timed_out",
    "truncated": "length/truncated",
}


def by_entry_accuracy(buffer: ReplayBuffer) -> dict[float, int]:
    """How many entries were admitted at each accuracy."""
    return Counter(entry.entry_accuracy for entry in buffer.entries())


def entry_counters(buffer: ReplayBuffer) -> dict[str, int]:
    """The same under the names of the live view."""
    return {
        f"buffer_by_entry/{entry_name(a)}": n for a, n in sorted(by_entry_accuracy(buffer).items())
    }
