"""The advisor: judges every trained step by the rules of `zppo.diagnosis`, and says when to end.

A finding is an event when it appears or becomes severe, and again when it is gone; in between it
stands in the live view. A run ends early for two reasons only: a teacher that was silent for
`run.silent_teacher_windows` windows, or a severe finding where `run.on_advice` is `stop`. Windows
that an earlier attempt had opened do not count for the first, or a run whose teacher is back could
not go on.
"""

from __future__ import annotations

import logging
from collections import deque

from zppo.config.topology import RunConfig
from zppo.diagnosis.evidence import FIRST_LINES, NEWEST_LINES, Advisory, Evidence, Line
from zppo.diagnosis.rules import advisories, silences
from zppo.records.summary import read_lines
from zppo_actors.controller.recorder import Recorder
from zppo_actors.process import ActorContext

log = logging.getLogger("zppo.controller")


class Advisor:
    """`first_window` is the first window that this attempt opens."""

    def __init__(self, context: ActorContext, recorder: Recorder, first_window: int) -> None:
        self._run: RunConfig = context.topology.run
        self._recorder, self._first_window = recorder, first_window
        lines = read_lines(context.run_dir / "metrics.jsonl")
        self._first: list[Line] = list(lines[:FIRST_LINES])
        self._newest: deque[Line] = deque(lines, maxlen=NEWEST_LINES)
        self.found: list[Advisory] = advisories(self._evidence(ended=False)) if lines else []

    def step(self, line: Line, *, last: bool) -> str | None:
        """Judge the step that `line` of metrics.jsonl is of; returns why the run has to end, if it
        has to. `last`: no step follows."""
        if len(self._first) < FIRST_LINES:
            self._first.append(line)
        self._newest.append(line)
        before, self.found = self.found, advisories(self._evidence(ended=last))
        self._tell(before)
        return self._silence() or self._stop()

    @property
    def lines(self) -> list[str]:
        """The findings for the live view, the severe first."""
        return [advisory.sentence for advisory in self.found]

    @property
    def remark(self) -> str:
        """What a verdict says of severe findings; empty if there are none."""
        severe = [advisory.rule for advisory in self.found if advisory.severity == "severe"]
        return f", but with severe advice: {', '.join(severe)} (zppo doctor)" if severe else ""

    def _evidence(self, *, ended: bool) -> Evidence:
        return Evidence(
            first=self._first,
            newest=list(self._newest),
            ended=ended,
            silent_windows=self._run.silent_teacher_windows,
        )

    def _tell(self, before: list[Advisory]) -> None:
        known = {(advisory.rule, advisory.severity) for advisory in before}
        for advisory in self.found:
            if (advisory.rule, advisory.severity) not in known:
                log.warning("advice: %s", advisory.sentence)
                self._recorder.event("controller", "advice", advisory.sentence)
        still = {advisory.rule for advisory in self.found}
        for rule in dict.fromkeys(advisory.rule for advisory in before):
            if rule not in still:
                self._recorder.event("controller", "advice_gone", rule)

    def _silence(self) -> str | None:
        limit = self._run.silent_teacher_windows
        own = [line for line in self._newest if line["step"] >= self._first_window]
        for pool, windows, tasks in silences(own) if limit else ():
            if windows >= limit:
                return (
                    f"{pool} answered none of its {tasks} tasks in {windows} windows in a row "
                    f"(run.silent_teacher_windows: {limit}; 0 goes on without it); see "
                    f"logs/{pool}-0.log"
                )
        return None

    def _stop(self) -> str | None:
        severe = next((a for a in self.found if a.severity == "severe"), None)
        return severe.sentence if severe is not None and self._run.on_advice == "stop" else None
