"""The data of the question browser: hard questions with all their visits, small enough to be
carried in the page.

A run may hold more text than a page can carry. Whole questions are taken, those with the richest
history first and each fate in turn, until the size is reached; what was left out is said. Very long
texts are cut with a note. Only two passes over the rollout store are made, the first over a few
short columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate, chain, zip_longest
from typing import Any

import msgspec
from msgspec import Struct, field

from zppo.records.metrics import entry_name
from zppo.records.rollouts import read_step, step_files
from zppo.report.load import RunData
from zppo.report.thumbnails import Shown, Thumbnails

MAX_QUESTIONS = 400
MAX_BYTES = 6_000_000
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
    run: RunData, max_questions: int = MAX_QUESTIONS, max_bytes: int = MAX_BYTES
) -> BrowserData:
    """The questions that were hard at some visit, as many as fit."""
    tallies = _tally(run)
    hard = [question_id for question_id, tally in tallies.items() if tally.hard]
    fates = question_fates(run.fates)
    chosen = _choose(hard, tallies, fates)[:max_questions]
    views, media = _collect(run, chosen, fates, max_bytes)
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
    run: RunData, chosen: list[str], fates: Mapping[str, tuple[str, str]], max_bytes: int
) -> tuple[list[QuestionView], dict[str, str]]:
    """The questions, in the order of `chosen`, and the references to the pictures of those that
    have some. Those that cannot fit any more are dropped on the way: a long run has far more text
    of them than a page."""
    views: dict[str, QuestionView] = {}
    media: dict[str, str] = {}
    texts: Counter[str] = Counter()
    for path in step_files(run.run_dir / "rollouts"):
        for row in read_step(path, question_ids=chosen):
            _add_row(views, row, fates)
            texts[row["question_id"]] += len(cut(row["response"]))
            if row.get("media"):  # files of earlier versions lack the column
                media[row["question_id"]] = row["media"]
        before = accumulate(texts[name] for name in chosen)
        chosen = [name for name, size in zip(chosen, before, strict=True) if size <= max_bytes]
        views = {name: view for name in chosen if (view := views.get(name)) is not None}
    for view in views.values():
        for visit in view.visits:
            visit.groups.sort(
                key=lambda group: GROUP_ORDER.index(group.kind) if group.kind in GROUP_ORDER else 9
            )
    return [views[name] for name in chosen], media


def _add_row(
    views: dict[str, QuestionView], row: Mapping[str, Any], fates: Mapping[str, tuple[str, str]]
) -> None:
    """Rows come in step order and, within a step, group by group; those of a visit that are trained
    in a later step than its plain group join it."""
    name = row["question_id"]
    if name not in views:
        fate, entry = fates.get(name, ("never admitted", None))
        views[name] = QuestionView(
            id=name, text=cut(row["question"]), gold=cut(row["gold"]), fate=fate, entry=entry
        )
    visits = views[name].visits
    visit = next((one for one in reversed(visits) if one.window == row["window"]), None)
    if visit is None:
        if row["kind"] != "plain":
            return  # somebody removed the file that its plain group was in
        visit = _visit(row)
        visits.append(visit)
    groups = visit.groups
    if not groups or groups[-1].kind != row["kind"]:
        groups.append(
            GroupView(
                kind=row["kind"],
                step=row["step"],
                prompt=cut(row["prompt"]),
                candidates=_candidates(row["candidates"]),
            )
        )
    groups[-1].rollouts.append(_rollout(row))


def _visit(row: Mapping[str, Any]) -> VisitView:
    accuracy = round(row["question_accuracy"], 4)
    return VisitView(
        window=row["window"],
        step=row["step"],
        origin=row["origin"],
        outcome=row["outcome"],
        accuracy=accuracy,
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
    size = 0
    for view in views:
        size += len(msgspec.json.encode(view))
        if size > max_bytes:
            return
        yield view
