"""What a step trains: windows in their order, or batches filled with what has finished.

*Windows* (`InOrder`) is Algorithm 1 as it stands: step w trains window w, whole, so every group
waits for the slowest chain (plain → teacher → compression → BCQ, NCQ) of its window.

*Filled* (`Filled`) leaves sampling as it is: windows are opened, and their caps decided, as before.
But a step takes finished groups of any window. The invariants:

- a group begins under the newest policy v, so its *deadline* is step v + max_staleness. Step t is
  not begun while a group of deadline t is under way: the trainer waits for it, nothing is dropped;
- a step trains exactly as many new questions as its window has, those with the oldest tokens first.
  Not more may ever be due, so step t waits as well while more than later steps can take would be
  left over. Replayed questions and rewritten prompts join in the same order, until the step has as
  many groups as ρ_replay and ρ_aug give it in Algorithm 1; only those that are due go beyond that;
- a visit is trained once, whole, or its plain group first and what was made of it in a later step.
  Where its groups only count together (dynamic sampling, a composer that looks at all of them, the
  teacher's scores) it is trained whole;
- a window is settled at most 2 · (max_staleness + 1) steps after its own: that step waits for
  the rest of it. Where the teacher cannot keep up, so many steps of plain groups run ahead of it;
- a step behind which no window is open takes all that is left, and waits for it: the last one, or
  one before a window whose questions are still in flight.

That so many are never due: all new questions that begin under policy v are of windows up to
v + max_staleness (`zppo.scheduling.pacing`), so those due by step d are of windows up to d, and
steps up to d train as many questions as these windows have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

import numpy as np
from msgspec import Struct, structs

from zppo.algorithm.composition import student_groups
from zppo.algorithm.steps import Recipe, is_hard
from zppo.algorithm.window import EVALUATE, PLAIN, Group, Visit, Window
from zppo.config.topology import SchedulerConfig
from zppo.scheduling.dispatch import Job
from zppo.scheduling.jobs import ROLLOUT_POOL
from zppo_protocol.messages import GenerateTask

NEVER = int(np.iinfo(np.int32).max)
"""The version of what has no tokens: it is never stale."""


class Batch(NamedTuple):
    """What a step trains, as a window of its index, and since when that could have been."""

    window: Window
    since: float


class Filling(Protocol):
    """Told of all that moves; answers what the next step trains. `missing` and `windows`, those in
    flight, are the scheduler's."""

    def current(self, job: Job, published: int) -> Job:
        """The job as it is to be handed out while `published` is the newest policy."""

    def opened(self, window: Window) -> None:
        """A window is in flight now, new or restored."""

    def began(self, visit: Visit, group: Group, version: int | None = None) -> None:
        """The oldest token of a group will be of this version; None: its samples are there."""

    def lost(self, group_id: str) -> None:
        """The group is not under way any more, and has no samples."""

    def visit_moved(self, window: Window, visit: Visit, now: float) -> None:
        """Something of the visit has come."""

    def window_moved(self, window: Window, now: float) -> None:
        """The window took a decision, or nothing of it is missing any more."""

    def batch(self, step: int, *, drains: bool) -> Batch | None:
        """What `step`, the next one, trains; None: that is not known yet. It is in the trainer from
        now on. `drains`: it trains all that is left."""

    def trained(self, batch: Window) -> list[int]:
        """The batch has been trained: the windows of which nothing is left, not in flight now."""

    def waits(self, step: int, *, drains: bool) -> str | None:
        """What `step`, the next one, waits for, in plain words."""


class InOrder:
    """Step w trains window w."""

    def __init__(self, windows: dict[int, Window], missing: dict[int, set[str]]) -> None:
        self._windows, self._missing = windows, missing
        self._since: dict[int, float] = {}

    def current(self, job: Job, published: int) -> Job:
        return job

    def opened(self, window: Window) -> None:
        pass

    def began(self, visit: Visit, group: Group, version: int | None = None) -> None:
        pass

    def lost(self, group_id: str) -> None:
        pass

    def visit_moved(self, window: Window, visit: Visit, now: float) -> None:
        pass

    def window_moved(self, window: Window, now: float) -> None:
        if whole(window, self._missing):
            self._since[window.index] = now

    def batch(self, step: int, *, drains: bool) -> Batch | None:
        window = self._windows.get(step)
        if window is None or not whole(window, self._missing):
            return None
        return Batch(window, self._since.pop(step))

    def trained(self, batch: Window) -> list[int]:
        del self._windows[batch.index], self._missing[batch.index]
        return [batch.index]

    def waits(self, step: int, *, drains: bool) -> str | None:
        window = self._windows.get(step)
        waits = window is not None and not whole(window, self._missing)
        return f"window {step}" if waits else None


class _Finished(Struct):
    """A visit that a step could train, in whole or its plain group."""

    new: bool
    oldest: int
    since: float


class _Counted:
    """Names with a version each, and how many there are up to a version."""

    def __init__(self) -> None:
        self._versions: dict[str, int] = {}
        self._counts: Counter[int] = Counter()

    def put(self, name: str, version: int) -> None:
        self.drop(name)
        self._versions[name] = version
        self._counts[version] += 1

    def drop(self, name: str) -> None:
        version = self._versions.pop(name, None)
        if version is not None:
            self._counts[version] -= 1
            if not self._counts[version]:
                del self._counts[version]

    def up_to(self, version: int) -> int:
        return sum(count for one, count in self._counts.items() if one <= version)


class Filled:
    """See the module docstring."""

    def __init__(
        self,
        windows: dict[int, Window],
        missing: dict[int, set[str]],
        recipe: Recipe,
        config: SchedulerConfig,
        *,
        scored: bool,
    ) -> None:
        """`scored`: the teacher's scores are needed, which are asked for once a window is
        composed."""
        self._windows, self._missing, self._recipe = windows, missing, recipe
        self._bound, self._lag, self._scored = config.max_staleness, config.lag, scored
        composer = recipe.method.composer
        self._together = scored or recipe.dynamic_sampling or composer is not student_groups
        self._sizes: dict[int, int] = {}
        """|X_new| of each window in flight."""
        self._finished: dict[str, _Finished] = {}
        """By the id of the plain group."""
        self._new_finished: set[str] = set()
        """Those of them that are new questions."""
        self._new_begun = _Counted()
        """Plain groups of new questions that no step could train yet."""
        self._others_begun = _Counted()
        """The same of all other groups of the student."""
        self._in_trainer: dict[str, tuple[Window, Visit, bool]] = {}
        """Visits by the id of the plain group, and whether all that was left of them."""

    # ---- what moves ------------------------------------------------------------------------------

    def current(self, job: Job, published: int) -> Job:
        message = job.message
        if job.pool != ROLLOUT_POOL or job.min_version == published:
            return job
        if not isinstance(message, GenerateTask) or message.kind == EVALUATE:
            return job
        message = structs.replace(message, min_version=published)
        return structs.replace(job, min_version=published, message=message)

    def opened(self, window: Window) -> None:
        self._sizes[window.index] = window.new_count
        for visit in window.visits:
            for group in visit.student_groups() if visit.trained != "all" else ():
                if group.samples is not None:
                    self.began(visit, group)

    def began(self, visit: Visit, group: Group, version: int | None = None) -> None:
        oldest = oldest_version(group) if version is None else version
        new = visit.origin == "new" and group.kind == PLAIN
        (self._new_begun if new else self._others_begun).put(group.id, oldest)

    def lost(self, group_id: str) -> None:
        self._new_begun.drop(group_id)
        self._others_begun.drop(group_id)

    def window_moved(self, window: Window, now: float) -> None:
        for visit in window.visits:
            self.visit_moved(window, visit, now)

    def visit_moved(self, window: Window, visit: Visit, now: float) -> None:
        name = visit.plain.id
        if visit.trained == "all" or name in self._in_trainer or not visit.plain.done:
            return
        if self._complete(window, visit):
            ready = visit.student_groups()
        elif not self._together and not visit.late:
            ready = [visit.plain]
        else:
            return
        for group in ready:
            self.lost(group.id)
        if name not in self._finished:
            new = visit.origin == "new" and not visit.late
            oldest = min(map(oldest_version, ready), default=NEVER)
            self._finished[name] = _Finished(new, oldest, now)
            if new:
                self._new_finished.add(name)

    def _complete(self, window: Window, visit: Visit) -> bool:
        """Whether all of a visit has come that will."""
        if self._scored and not whole(window, self._missing):
            return False
        if not visit.plain.done or (self._undecided(window) and is_hard(visit, self._recipe)):
            return False
        rewritten = (reformulation.group for reformulation in visit.reformulations)
        return all(group.done for group in visit.teacher_groups()) and all(
            group is not None and group.done for group in rewritten
        )

    def _undecided(self, window: Window) -> bool:
        """Whether more may still be made of the window's hard questions."""
        method = self._recipe.method
        if window.phase == "plain" and method.teacher_draws == "selected":
            return True
        return window.phase in ("plain", "selected") and bool(method.reformulations)

    # ---- the next batch --------------------------------------------------------------------------

    def batch(self, step: int, *, drains: bool) -> Batch | None:
        if self.waits(step, drains=drains) is not None or step not in self._windows:
            return None
        chosen = list(self._finished_visits())
        if not drains:
            chosen = self._chosen(step, chosen)
        parts, since = [], []
        for window, visit in chosen:
            finished = self._finished.pop(visit.plain.id)
            self._new_finished.discard(visit.plain.id)
            complete = self._complete(window, visit)
            self._in_trainer[visit.plain.id] = window, visit, complete
            parts.append(structs.replace(visit) if complete else plain_part(visit))
            if finished.new:
                since.append(finished.since)
        hard = sum(is_hard(visit, self._recipe) for visit in parts if not visit.late)
        batch = Window(index=step, visits=parts, phase="composed", hard_questions=hard)
        return Batch(batch, max(since))

    def _chosen(
        self, step: int, finished: list[tuple[Window, Visit]]
    ) -> list[tuple[Window, Visit]]:
        """The finished visits to train, in the order of their windows."""
        wanted = self._sizes[step]
        order = sorted(finished, key=lambda one: self._finished[one[1].plain.id].oldest)
        new = [one for one in order if self._finished[one[1].plain.id].new][:wanted]
        groups = sum(self._groups(*one) for one in new)
        names = {visit.plain.id for _, visit in new}
        for window, visit in order:
            one = self._finished[visit.plain.id]
            if one.new:
                continue
            count = self._groups(window, visit)
            due = one.oldest + self._bound <= step or window.index <= step - self._lag
            if due or groups + count <= self._regular(wanted):
                groups += count
                names.add(visit.plain.id)
        return [one for one in finished if one[1].plain.id in names]

    def _groups(self, window: Window, visit: Visit) -> int:
        """How many groups of a finished visit are trained now."""
        return len(visit.student_groups()) if self._complete(window, visit) else 1

    def _regular(self, new: int) -> int:
        """Groups of a step of Algorithm 1 that has so many new questions, at most."""
        rewritten = self._recipe.reformulated(new, new) if self._recipe.method.reformulations else 0
        return new + self._recipe.replayed(new) + rewritten

    def _finished_visits(self) -> Iterator[tuple[Window, Visit]]:
        for index in sorted(self._windows):
            window = self._windows[index]
            for visit in window.visits:
                if visit.plain.id in self._finished:
                    yield window, visit

    def waits(self, step: int, *, drains: bool) -> str | None:
        if step not in self._windows:
            return None
        until = step if drains else step - self._lag
        rest = [
            index
            for index, window in self._windows.items()
            if index <= until and not whole(window, self._missing)
        ]
        if rest:
            return f"the rest of window {', '.join(map(str, rest))}"
        if drains:
            return None
        missing = self._sizes[step] - len(self._new_finished)
        if missing > 0:
            return f"{missing} more finished questions"
        due = self._others_begun.up_to(step - self._bound)
        due = max(due, *(self._surplus(step, by) for by in range(step, step + self._bound + 1)))
        return f"{due} groups that would be too old later" if due > 0 else None

    def _surplus(self, step: int, by: int) -> int:
        """By how many the new questions that are due by step `by` and under way now are more than
        the steps behind `step` can train until then; 0 or less: by none. Finished ones need not be
        counted: the oldest are trained first, and all that are due by then fit into these steps."""
        begun = self._new_begun.up_to(by - self._bound)
        return begun - sum(self._sizes.get(later, 0) for later in range(step + 1, by + 1))

    def trained(self, batch: Window) -> list[int]:
        moved, self._in_trainer = self._in_trainer, {}
        for window, visit, complete in moved.values():
            visit.trained = "all" if complete else "plain"
            self.visit_moved(window, visit, 0.0)
        for window in self._windows.values():
            hand_over(window, batch)
        settled = [index for index in sorted(self._windows) if self._settled(index, batch.index)]
        for index in settled:
            del self._windows[index], self._missing[index], self._sizes[index]
        return settled

    def _settled(self, index: int, step: int) -> bool:
        """Windows stay until their own step, which trains as many questions as they have."""
        visits = self._windows[index].visits
        return index <= step and all(visit.trained == "all" for visit in visits)


def whole(window: Window, missing: Mapping[int, set[str]]) -> bool:
    """Whether a window has all its graded groups."""
    return window.phase == "composed" and not missing[window.index]


def oldest_version(group: Group) -> int:
    """Of the tokens of a sampled group."""
    return min(group.the_samples.version_spans[:, 1].tolist(), default=NEVER)


def plain_part(visit: Visit) -> Visit:
    """The visit as long as nothing is known of it but its plain group."""
    return Visit(
        question=visit.question,
        origin=visit.origin,
        plain=visit.plain,
        epoch=visit.epoch,
        selected=visit.selected,
    )


def hand_over(window: Window, batch: Window) -> None:
    """What has been counted with a window is told of the step that has just been trained."""
    for counts, total in ((window.tasks, batch.tasks), (window.spent, batch.spent)):
        for name, count in counts.items():
            total[name] = total.get(name, 0) + count
        counts.clear()
