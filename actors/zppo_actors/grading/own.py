"""The rewards of `data.reward` as a grading worker gives them: loaded once, then asked for groups.

Invariant: every response gets one grade, whatever a reward does that leaves this process alive. A
reward that raises, or returns what is no reward, fails that response (one of a whole group, the
group), by name and with its reason. The code that is loaded is the code that the run began with.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from zppo.config.rewards import Part, RewardConfig, chosen, parts_of
from zppo.errors import UserError, words_of
from zppo.grading import parse_answer
from zppo.grading.boxes import last_boxed
from zppo.grading.rewards import (
    ARGUMENTS,
    MAX_NOTE,
    CodeArguments,
    FormatArguments,
    LengthArguments,
    Reward,
    RewardError,
    RuleArguments,
    arguments_of,
    by_pattern,
    by_rule,
    form_of,
    has_format,
    load_extractor,
    load_reward,
    named_values,
    overlong,
    read_result,
    read_results,
    summed,
)
from zppo_actors.grading.code import passes
from zppo_protocol.values import Grade


class OwnOrder(Struct, frozen=True, kw_only=True):
    """The rewards to load, and the identities of the user's code when the run began."""

    entries: list[RewardConfig]
    identities: dict[str, str] = {}


class Group(NamedTuple):
    """The responses to one question. `columns` are those of its row, as JSON."""

    question: str
    responses: Sequence[str]
    columns: str
    gold: str

    def row(self) -> dict[str, Any]:
        """All columns of the question, anew for each call, so that what a reward writes into them
        reaches no other response."""
        columns = msgspec.json.decode(self.columns) if self.columns else {}
        return {"question": self.question, "answer": self.gold, **columns}


Outcome = Reward | str
"""A reward, or why there is none."""
Asking = Callable[[Group], list[Outcome]]


class OwnRewards:
    """The parts of a reward that grading workers give; `whole` tells that one of them wants all
    responses of a group at once."""

    def __init__(self, parts: Sequence[Part], identities: dict[str, str]) -> None:
        self._parts = list(parts)
        self.whole = False
        self._asking = {
            part.name: self._asking_of(part, identities) for part in parts if not part.of_teacher
        }

    @classmethod
    def of(cls, order: str) -> OwnRewards:
        """Load what an `OwnOrder` names. Raises UserError."""
        read = msgspec.json.decode(order, type=OwnOrder)
        return cls(parts_of(read.entries), read.identities)

    def grades(
        self, question: str, responses: Sequence[str], row: str, gold: str, part: str = ""
    ) -> list[Grade]:
        """One grade for each response, by all parts or by the one that the row names. What a
        weighted sum would be without the teacher's part is no reward yet: it stands in `parts`
        alone."""
        counted = chosen(self._parts, part)
        group = Group(question, responses, row, gold)
        outcomes = [self._asking[one.name](group) for one in counted if not one.of_teacher]
        by_response = zip(*outcomes, strict=True) if outcomes else [()] * len(responses)
        return [
            _graded(counted, response, of_parts)
            for response, of_parts in zip(responses, by_response, strict=True)
        ]

    # ---- how each part is asked ------------------------------------------------------------------

    def _asking_of(self, part: Part, identities: dict[str, str]) -> Asking:
        if part.use not in ARGUMENTS:
            return self._own(part, identities)
        match arguments_of(part):
            case RuleArguments(pattern=str(pattern)):
                find = by_pattern(pattern)
                return _each(lambda text, group: by_rule(part.use, text, group.gold, find))
            case RuleArguments(extractor=str()):
                found = load_extractor(part)
                setting, use = f"{part.setting}.args.extractor", part.args["extractor"]
                _check_identity(setting, use, found.identity, identities)
                extract = found.value
                return _each(lambda text, group: by_rule(part.use, text, group.gold, extract))
            case RuleArguments():
                return _each(lambda text, group: by_rule(part.use, text, group.gold, last_boxed))
            case FormatArguments() as form:
                return _each(lambda text, group: has_format(text, form))
            case LengthArguments() as lengths:
                return _each(lambda text, group: overlong(text, lengths))
            case CodeArguments() as limits:
                return _each(lambda text, group: passes(text, group.row(), limits))
        raise AssertionError(part.use)

    def _own(self, part: Part, identities: dict[str, str]) -> Asking:
        found, args = load_reward(part), part.args
        _check_identity(f"{part.setting}.use", part.use, found.identity, identities)
        call, form = found.value, form_of(found.value)
        self.whole = self.whole or form.all or form.coroutine
        if form.all:
            return lambda group: _all(call, group, args, coroutine=form.coroutine)
        if form.coroutine:
            return lambda group: asyncio.run(_together(call, group, args))
        return _each(lambda text, group: call(group.question, text, group.row(), **args))


def _graded(parts: Sequence[Part], response: str, outcomes: Sequence[Outcome]) -> Grade:
    """The grade of a response from the outcomes of those parts that are not the teacher's."""
    local = [part for part in parts if not part.of_teacher]
    values: dict[str, float] = {}
    answer, notes, failures = None, [], []
    for part, outcome in zip(local, outcomes, strict=True):
        if isinstance(outcome, str):
            failures.append(f"the reward {part.use!r} {outcome}")
            continue
        values |= {part.name: outcome.value, **named_values(outcome.parts, part.name)}
        answer = answer if answer is not None else outcome.answer
        notes += [outcome.note] if outcome.note else []
    answer = answer if answer is not None else parse_answer(response)
    if failures:
        return Grade(reward=0.0, answer=answer, note=failures[0][:MAX_NOTE], failed=True)
    note = "; ".join(notes)[:MAX_NOTE]
    if len(local) < len(parts):
        return Grade(reward=0.0, answer=answer, note=note, parts=values)
    return summed(parts, values, answer, note)


def _check_identity(setting: str, use: str, identity: str, identities: dict[str, str]) -> None:
    if identities.get(use, identity) != identity:
        raise UserError(
            f"{setting}: the code of {use!r} has changed since the run began; put the old code "
            "back and resume, or begin a new run"
        )


def _each(reward: Callable[[str, Group], Any]) -> Asking:
    """Asks a reward for one response after the other."""

    def ask(group: Group) -> list[Outcome]:
        return [_outcome(partial(reward, text, group)) for text in group.responses]

    return ask


def _all(call: Any, group: Group, args: dict[str, Any], *, coroutine: bool) -> list[Outcome]:
    """Asks a reward for the whole group at once; if it fails, it fails for all."""
    count = len(group.responses)
    rows = [group.row() for _ in range(count)]
    try:
        values = call([group.question] * count, list(group.responses), rows, **args)
        return list(read_results(asyncio.run(values) if coroutine else values, count))
    except BaseException as error:
        return [_reason(error)] * count


async def _together(call: Any, group: Group, args: dict[str, Any]) -> list[Outcome]:
    """Asks a coroutine for all responses, which wait at the same time."""
    asked = [_settled(call(group.question, text, group.row(), **args)) for text in group.responses]
    return list(await asyncio.gather(*asked))


async def _settled(reward: Awaitable[Any]) -> Outcome:
    """One of several that wait; a SystemExit in it would end them all."""
    try:
        return read_result(await reward)
    except BaseException as error:
        return _reason(error)


def _outcome(ask: Callable[[], Any]) -> Outcome:
    try:
        return read_result(ask())
    except BaseException as error:  # even SystemExit: the rest of the group is graded all the same
        return _reason(error)


def _reason(error: BaseException) -> str:
    """In words that follow the name of the reward."""
    if isinstance(error, RewardError):
        return words_of(error)
    return f"raised {type(error).__name__}: {words_of(error)}"
