"""The candidate audit: what the student does with the candidates that a prompt shows it.

Two questions are asked of every kind of group. Does it still carry a signal? Only a group with
right and wrong replies has advantages. And is a reply a verdict on the candidates, or a habit? A
student that always takes the first candidate is right half of the time and learns nothing. The
paper's own audit (Tables 16 and 17) has the shares of replies that repeat a candidate; mixed
groups, the slot that was picked and agreement are ours.

An answer repeats a candidate if both are written alike, spaces apart; no grader is asked. A *pick*
is a reply that repeats exactly one of two candidates, one right and one wrong. Replies whose reward
failed are left out of everything, and a group of them alone is neither mixed nor unanimous.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean
from typing import NamedTuple

from zppo.algorithm.window import PLAIN, Candidate, Group, Reformulation, Visit, Window
from zppo_protocol.values import Grade

Shares = dict[str, float]

AUDIT_METRICS: dict[str, str] = {
    "audit/<kind>/mixed": "Groups whose replies earn different rewards (right and wrong ones), the "
    "only ones with a gradient; plain too.",
    "audit/<kind>/unanimous": "Groups whose replies all end in the same answer; plain too.",
    "audit/<kind>/right_repeats": "Right replies whose answer is written as a right candidate's.",
    "audit/<kind>/wrong_repeats": "Wrong replies whose answer is written as a wrong candidate's.",
    "audit/<kind>/listed_repeats": "Replies that repeat a listed wrong answer (prompts of wrong "
    "candidates only, one at least with an answer).",
    "audit/<kind>/picked_first": "Picks of the first of two candidates; a pick repeats exactly "
    "one of them.",
    "audit/<kind>/picked_first_right_first": "The same where the first candidate is the right one.",
    "audit/<kind>/picked_first_right_second": "The same where the second one is.",
    "audit/<kind>/picked_first_short": "The same for questions no longer than the mean of these "
    "prompts.",
    "audit/<kind>/picked_first_long": "The same for longer questions.",
    "audit/<kind>/accuracy_right_first": "Share of correct replies where the first of two "
    "candidates is the right one.",
    "audit/<kind>/accuracy_right_second": "Share of correct replies where the second one is.",
}
"""Name -> meaning; all are shares."""


class Pick(NamedTuple):
    """One reply that picked one of two candidates. `longer`: whether its question is longer than
    the mean of the window's two-candidate prompts."""

    first: bool
    right_first: bool
    longer: bool


def audit(window: Window) -> Shares:
    """The `audit/` metrics of a trained window; what has nothing to be measured on has no key."""
    shown: dict[str, list[tuple[Visit, Reformulation]]] = {}
    for visit in window.visits:
        for reformulation in visit.reformulations:
            if reformulation.group is not None and reformulation.group.done:
                shown.setdefault(reformulation.kind, []).append((visit, reformulation))
    shares = _outcomes(PLAIN, [visit.plain for visit in window.plain_visits if visit.plain.done])
    for kind, pairs in shown.items():
        groups = [_graded(reformulation) for _, reformulation in pairs]
        shares |= _outcomes(kind, groups)
        shares |= _repeats(kind, [reformulation for _, reformulation in pairs])
        shares |= _slots(kind, [pair for pair in pairs if _is_pair(pair[1])])
    return shares


def mixed(group: Group) -> bool:
    """Whether a graded group has replies of different reward, so that some have an advantage."""
    return len({grade.reward for grade in _judged(group)}) > 1


def unanimous(group: Group) -> bool:
    """Whether all replies of a graded group end in the same answer, and there is one."""
    answers = {_written(grade.answer) for grade in _judged(group)}
    return len(answers) == 1 and None not in answers


def _outcomes(kind: str, groups: Sequence[Group]) -> Shares:
    return {
        **_share(f"audit/{kind}/mixed", map(mixed, groups)),
        **_share(f"audit/{kind}/unanimous", map(unanimous, groups)),
    }


def _repeats(kind: str, reformulations: Sequence[Reformulation]) -> Shares:
    right: list[bool] = []
    wrong: list[bool] = []
    for reformulation in reformulations:
        right_answers = _answers(c for c in reformulation.candidates if c.correct)
        wrong_answers = _answers(c for c in reformulation.candidates if not c.correct)
        for answer, correct in _replies(_graded(reformulation)):
            if correct and right_answers:
                right.append(answer in right_answers)
            if not correct and wrong_answers:
                wrong.append(answer in wrong_answers)
    return {
        **_share(f"audit/{kind}/right_repeats", right),
        **_share(f"audit/{kind}/wrong_repeats", wrong),
        **_listed(kind, reformulations),
    }


def _listed(kind: str, reformulations: Sequence[Reformulation]) -> Shares:
    """Replies, right or wrong, that repeat an answer which the prompt calls wrong. A prompt whose
    candidates have no answer lists none, so there is nothing to repeat."""
    negative = [r for r in reformulations if not any(c.correct for c in r.candidates)]
    return _share(
        f"audit/{kind}/listed_repeats",
        (
            answer in listed
            for reformulation in negative
            if (listed := _answers(reformulation.candidates))
            for answer, _ in _replies(_graded(reformulation))
        ),
    )


def _slots(kind: str, pairs: Sequence[tuple[Visit, Reformulation]]) -> Shares:
    """Which slot was picked, and accuracy by the slot of the right candidate."""
    picks = _picks(pairs)
    accuracies: dict[bool, list[float]] = {True: [], False: []}
    for _, reformulation in pairs:
        group = _graded(reformulation)
        accuracies[reformulation.candidates[0].correct] += map(float, group.correctness())
    name = f"audit/{kind}/picked_first"
    return {
        **_share(f"audit/{kind}/accuracy_right_first", accuracies[True]),
        **_share(f"audit/{kind}/accuracy_right_second", accuracies[False]),
        **_share(name, (p.first for p in picks)),
        **_share(f"{name}_right_first", (p.first for p in picks if p.right_first)),
        **_share(f"{name}_right_second", (p.first for p in picks if not p.right_first)),
        **_share(f"{name}_short", (p.first for p in picks if not p.longer)),
        **_share(f"{name}_long", (p.first for p in picks if p.longer)),
    }


def _picks(pairs: Sequence[tuple[Visit, Reformulation]]) -> list[Pick]:
    lengths = [visit.plain.the_samples.prompt_ids.size for visit, _ in pairs]
    # The mean parts questions of two lengths cleanly, whatever their numbers; a median would not.
    middle = fmean(lengths) if lengths else 0.0
    picks = []
    for (_, reformulation), length in zip(pairs, lengths, strict=True):
        slots = [_written(candidate.answer) for candidate in reformulation.candidates]
        for answer, _ in _replies(_graded(reformulation)):
            if answer is not None and slots.count(answer) == 1:
                right_first = reformulation.candidates[0].correct
                picks.append(Pick(answer == slots[0], right_first, length > middle))
    return picks


def _is_pair(reformulation: Reformulation) -> bool:
    return sorted(candidate.correct for candidate in reformulation.candidates) == [False, True]


def _graded(reformulation: Reformulation) -> Group:
    assert reformulation.group is not None, "the audit looks at groups that were sampled"
    return reformulation.group


def _replies(group: Group) -> Iterator[tuple[str | None, bool]]:
    """(answer, whether it is right) of each reply."""
    for grade in _judged(group):
        yield _written(grade.answer), group.is_correct(grade)


def _judged(group: Group) -> list[Grade]:
    """The grades that the audit counts: a reply whose reward failed is no reply to it."""
    return [grade for grade in group.grades or () if not grade.failed]


def _answers(candidates: Iterable[Candidate]) -> set[str]:
    return {answer for c in candidates if (answer := _written(c.answer)) is not None}


def _written(answer: str | None) -> str | None:
    return None if answer is None else "".join(answer.split())


def _share(name: str, values: Iterable[float]) -> Shares:
    """Mean under its name; no key where there is nothing to average."""
    known = [float(value) for value in values]
    return {name: fmean(known)} if known else {}
