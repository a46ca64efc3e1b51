"""The data of the question browser: hard questions with all their visits, small enough to be
carried in the page.

A run may hold more text than a page can carry. Questions are taken, those with the richest history
first and each fate in turn, until the size is reached, and at least one; what was left out is said.
Very long texts are cut with a note; of a question that would take too much of the page the later
visits are left out. Only two passes over the rollout store are made, the first over a few short
columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate, chain, islice, zip_longest
from typing import Any

import msgspec
from msgspec import Struct, field

from zppo.records.metrics import entry_name
from zppo.records.rollouts import read_step, step_files
from zppo.report.load import RunData
from zppo.report.thumbnails import Shown, Thumbnails

MAX_QUESTIONS = 400
MAX_BYTES = 6_000_000
MAX_OF_ONE = MAX_BYTES // 10
"""Characters of responses of one question after which no further visit is shown."""
MAX_TEXT = 8_000
"""Characters of one prompt or response."""

GROUP_ORDER = ("plain", "teacher", "bcq", "ncq")


class Rollout(Struct, kw_only=True):
    response: str
    answer: str | None
    reward: float
    right: bool | None
    """None where its reward could not be had."""
    length: int | None
    finish_reason: str
    note: str
    versions: list[int]
    """Lowest and highest sampling version; empty for the teacher."""


class GroupView(Struct, kw_only=True):
    kind: str
    step: int
    prompt: str
    candidates: list[dict[str, Any]]
    rollouts: list[Rollout] = field(default_factory=list)


class VisitView(Struct, kw_only=True):
    """`step` trained its plain group."""

    window: int
    step: int
    origin: str
    outcome: str
    accuracy: float
    groups: list[GroupView] = field(default_factory=list)


class QuestionView(Struct, kw_only=True):
    id: str
    text: str
    gold: str
    fate: str
    """`graduated`, `evicted`, `in the buffer`, or `never admitted`."""
    entry: str | None
    """Accuracy at its latest admission."""
    visits: list[VisitView] = field(default_factory=list)
    later: int = 0
    """Visits behind these that are left out."""
    pictures: list[Shown] = field(default_factory=list)


class BrowserData(Struct, kw_only=True):
    total: int
    """Hard questions of the run."""
    questions: list[QuestionView]
    copies: dict[str, str] = field(default_factory=dict)
    """The pictures of `questions`, by the names that these have for them."""


class _Tally(Struct):
    """What the first pass notes of a question."""

    hard: bool = False
    reformulated: int = 0
    visits: int = 0


def browser_data(
    run: RunData,
    max_questions: int = MAX_QUESTIONS,
    max_bytes: int = MAX_BYTES,
    max_of_one: int = MAX_OF_ONE,
) -> BrowserData:
    """The questions that were hard at some visit, as many as fit."""
    tallies = _tally(run)
    hard = [question_id for question_id, tally in tallies.items() if tally.hard]
    fates = question_fates(run.fates)
    chosen = _choose(hard, tallies, fates)[:max_questions]
    views, media = _collect(run, chosen, fates, (max_bytes, max_of_one))
    questions = list(_within(views, max_bytes))
    thumbnails = Thumbnails()
    for question in questions:
        question.pictures = thumbnails.shown(media.get(question.id))
    return BrowserData(total=len(hard), questions=questions, copies=thumbnails.copies)


def question_fates(fates: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Latest fate and entry accuracy of every question that ever entered the buffer."""
    names = {"admitted": "in the buffer"}
    return {
        line["question_id"]: (
            names.get(line["fate"], line["fate"]),
            entry_name(line["entry_accuracy"]),
        )
        for line in fates
    }


def embed(data: BrowserData) -> str:
    """JSON that is safe inside a `<script>` element: nothing in it can end the element or open a
    comment."""
    text = msgspec.json.encode(data).decode()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _tally(run: RunData) -> dict[str, _Tally]:
    threshold = run.setting("method", "hard_threshold", default=0.5)
    tallies: dict[str, _Tally] = {}
    for path in step_files(run.run_dir / "rollouts"):
        for row in read_step(path, ["question_id", "kind", "question_accuracy"], one_a_group=True):
            tally = tallies.setdefault(row["question_id"], _Tally())
            tally.hard = tally.hard or row["question_accuracy"] < threshold
            tally.visits += row["kind"] == "plain"
            tally.reformulated += row["kind"] not in ("plain", "teacher")
    return tallies


def _choose(
    hard: list[str], tallies: dict[str, _Tally], fates: Mapping[str, tuple[str, str]]
) -> list[str]:
    """The richest histories first, one of each fate in turn, so that no fate crowds out another."""
    ranked = sorted(hard, key=lambda i: (-tallies[i].reformulated, -tallies[i].visits, i))
    by_fate: dict[str, list[str]] = {}
    for question_id in ranked:
        by_fate.setdefault(fates.get(question_id, ("never admitted", ""))[0], []).append(
            question_id
        )
    rounds = zip_longest(*(by_fate[fate] for fate in sorted(by_fate)))
    return [question_id for question_id in chain.from_iterable(rounds) if question_id is not None]


def _collect(
    run: RunData,
    chosen: list[str],
    fates: Mapping[str, tuple[str, str]],
    most: tuple[int, int],
) -> tuple[list[QuestionView], dict[str, str]]:
    """The questions, in the order of `chosen`, and the references to the pictures of those that
    have some. `most`: characters of the responses of all questions, and of one.

    Those that cannot fit any more are dropped on the way: a long run has far more text of them
    than a page.
    """
    gathered = {name: _Gathered() for name in chosen}
    for path in step_files(run.run_dir / "rollouts"):
        for row in read_step(path, question_ids=list(gathered)):
            gathered[row["question_id"]].add(row, fates, most[1])
        before = accumulate(one.characters for one in gathered.values())
        fit = [size <= most[0] for size in before]
        gathered = {
            name: one for (name, one), fits in zip(gathered.items(), fit, strict=True) if fits
        } or dict(islice(gathered.items(), 1))
    found = {name: one for name, one in gathered.items() if one.view is not None}
    media = {name: one.media for name, one in found.items() if one.media}
    return [one.finished() for one in found.values()], media


class _Gathered(Struct):
    """What the second pass gathers of a question."""

    view: QuestionView | None = None
    media: str = ""
    characters: int = 0
    """Of its responses: less than what it takes in the page."""
    left_out: set[int] = field(default_factory=set)
    """Windows of the visits that are not shown."""

    def add(self, row: Mapping[str, Any], fates: Mapping[str, tuple[str, str]], most: int) -> None:
        """Rows come in step order and, within a step, group by group; those of a visit that are
        trained in a later step than its plain group join it."""
        if self.view is None:
            name = row["question_id"]
            fate, entry = fates.get(name, ("never admitted", None))
            self.view = QuestionView(
                id=name, text=cut(row["question"]), gold=cut(row["gold"]), fate=fate, entry=entry
            )
        self.media = row.get("media") or self.media  # files of earlier versions lack the column
        visit = self._visit_of(self.view.visits, row, most)
        if visit is None:
            return
        groups = visit.groups
        if not groups or groups[-1].kind != row["kind"]:
            groups.append(_group(row))
        groups[-1].rollouts.append(_rollout(row))
        self.characters += len(groups[-1].rollouts[-1].response)

    def _visit_of(
        self, visits: list[VisitView], row: Mapping[str, Any], most: int
    ) -> VisitView | None:
        """The visit that a row belongs to, or None where it is not shown."""
        known = next((one for one in reversed(visits) if one.window == row["window"]), None)
        if known is not None:
            return known
        if row["kind"] != "plain":
            return None  # of a visit that is left out, or whose plain group's file was removed
        if visits and self.characters > most:
            self.left_out.add(row["window"])
            return None
        visits.append(_visit(row))
        return visits[-1]

    def finished(self) -> QuestionView:
        assert self.view is not None
        self.view.later = len(self.left_out)
        for visit in self.view.visits:
            visit.groups.sort(
                key=lambda group: GROUP_ORDER.index(group.kind) if group.kind in GROUP_ORDER else 9
            )
        return self.view


def _visit(row: Mapping[str, Any]) -> VisitView:
    accuracy = round(row["question_accuracy"], 4)
    return VisitView(
        window=row["window"],
        step=row["step"],
        origin=row["origin"],
        outcome=row["outcome"],
        accuracy=accuracy,
    )


def _group(row: Mapping[str, Any]) -> GroupView:
    return GroupView(
        kind=row["kind"],
        step=row["step"],
        prompt=cut(row["prompt"]),
        candidates=_candidates(row["candidates"]),
    )


def _rollout(row: Mapping[str, Any]) -> Rollout:
    versions = [] if row["version_min"] is None else [row["version_min"], row["version_max"]]
    return Rollout(
        response=cut(row["response"]),
        answer=None if row["answer"] is None else cut(row["answer"]),
        reward=round(row["reward"], 4),
        # Files of earlier versions lack the column; there a right response earns 1.
        right=row.get("correct", row["reward"] >= 1.0),
        length=row["length"],
        finish_reason=row["finish_reason"],
        note=row["note"],
        versions=versions,
    )


def _candidates(encoded: str | None) -> list[dict[str, Any]]:
    """Where each candidate came from and what was shown of it; the uncompressed text is among the
    rollouts anyway."""
    if encoded is None:
        return []
    shown = ("source", "answer", "correct")
    return [
        {
            **{key: candidate[key] for key in shown},
            "text": cut(candidate["shown"] or candidate["text"]),
        }
        for candidate in msgspec.json.decode(encoded, type=list[dict[str, Any]])
    ]


def cut(text: str, limit: int = MAX_TEXT) -> str:
    """The text, or its beginning and a note on what is missing."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]} … [{len(text) - limit:,} more characters are in the rollout store]"


def _within(views: Iterable[QuestionView], max_bytes: int) -> Iterator[QuestionView]:
    """Those that fit, and at least the first."""
    size = 0
    for place, view in enumerate(views):
        size += len(msgspec.json.encode(view))
        if size > max_bytes and place:
            return
        yield view
