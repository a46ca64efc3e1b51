"""Rewards: what a response earns, as a weighted sum of parts (`data.reward`).

A part is built in or the user's own, a function of (question, response, row). Everything about it
that can be known beforehand is checked here; what needs a process, time or a teacher is done where
those are: by the grading workers (`zppo_actors.grading`) and by the scheduler.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypeAlias

import msgspec
from msgspec import Meta, Struct, structs

from zppo import extensions
from zppo.config.base import Config, Positive, PositiveFloat
from zppo.config.explain import explain
from zppo.config.rewards import RUBRIC, Part, weighted
from zppo.config.topology import JUDGE
from zppo.errors import UserError, count_of, sendable
from zppo.grading.boxes import last_boxed, shown
from zppo.grading.graders import GRADERS, NO_BOX, get_grader
from zppo_protocol.values import MAX_REWARD, Grade

ONE = ("question", "response", "row")
ALL = ("questions", "responses", "rows")
"""Arguments of a reward for one response, and of one for all responses of a group at once."""
THEIRS = {
    **dict.fromkeys(("prompts", "completions", "completion_ids"), "TRL"),
    **dict.fromkeys(("data_source", "solution_str", "ground_truth", "extra_info"), "verl"),
}
"""Arguments by whose names other systems call a reward, and which."""
NO_ANSWER = "no answer found"
MAX_NOTE, MAX_ANSWER = 500, 100_000
"""Characters of a note and of an answer that are kept."""
MAX_PARTS, MAX_PART_NAME = 100, 100
"""Named numbers of one reward, and characters of a name: each becomes a metric."""


class Reward(Struct, frozen=True, kw_only=True):
    """What a reward may return in place of a number: the value, the final answer if it knows one,
    named numbers for the metrics, and a note for people."""

    value: float
    answer: str | None = None
    parts: dict[str, float] = {}
    note: str = ""


class RewardError(ValueError):
    """What a reward returned is none; the message says what was expected."""


# ---- those built in ------------------------------------------------------------------------------


class RuleArguments(Config, frozen=True, kw_only=True):
    """Of math, exact and choice: where the answer stands, if not in a box."""

    pattern: str | None = None
    """the last match of this regular expression is the answer, its first group if it has one"""
    extractor: str | None = None
    """or what this function (response) -> str or None returns"""


class NoArguments(Config, frozen=True, kw_only=True):
    pass


class RubricArguments(Config, frozen=True, kw_only=True):
    rubric: Annotated[str, Meta(min_length=1, max_length=20_000)]


class FormatArguments(Config, frozen=True, kw_only=True):
    pattern: str


class LengthArguments(Config, frozen=True, kw_only=True):
    """The reward is 0 up to `free` characters and falls to -1 at `limit` (DAPO's soft overlong
    punishment, arXiv:2503.14476, Eq. 13, in characters)."""

    free: Positive
    limit: Positive


class CodeArguments(Config, frozen=True, kw_only=True):
    tests: str = "tests"
    """column with the code that is run behind the response's; it must end without an error"""
    seconds: PositiveFloat = 2.0
    memory_mib: Positive = 1024


RULES = [name for name in GRADERS if name != JUDGE]
CODE = "code"
BY_GOLD = {*GRADERS, CODE}
"""Rewards built in whose 1 says that the answer is right."""
ARGUMENTS: dict[str, type[Config]] = {
    **dict.fromkeys(RULES, RuleArguments),
    JUDGE: NoArguments,
    RUBRIC: RubricArguments,
    "format": FormatArguments,
    "length": LengthArguments,
    CODE: CodeArguments,
}
"""Built-in rewards and what they take."""


def reward_names() -> list[str]:
    return list(ARGUMENTS)


Extractor: TypeAlias = Callable[[str], str | None]


def by_rule(use: str, response: str, gold: str, extractor: Extractor = last_boxed) -> Reward:
    """1 if the answer in the response is right by the grader `use`, else 0. May hang on hostile
    mathematics."""
    content = extractor(response)
    if content is None:
        return Reward(value=0.0, note=NO_BOX if extractor is last_boxed else NO_ANSWER)
    if not isinstance(content, str):
        raise RewardError(f"got {_shown(content)} from its extractor; expected text or None")
    rule = get_grader(use)
    quick = rule.quick(content, gold)
    verdict = rule.full(content, gold) if quick is None else quick
    return Reward(value=float(verdict), answer=shown(content))


def by_pattern(pattern: str) -> Extractor:
    """The last match, its first group if there is one."""
    compiled = re.compile(pattern, re.DOTALL)

    def extract(response: str) -> str | None:
        matches = list(compiled.finditer(response))
        return matches[-1].group(min(1, compiled.groups)) or None if matches else None

    return extract


def has_format(response: str, arguments: FormatArguments) -> Reward:
    """1 if the whole response matches the pattern, white space around it aside."""
    matches = re.fullmatch(arguments.pattern, response.strip(), re.DOTALL)
    return Reward(value=float(matches is not None))


def overlong(response: str, arguments: LengthArguments) -> Reward:
    """0 for short responses, -1 for long ones, linear between."""
    over = (len(response) - arguments.free) / (arguments.limit - arguments.free)
    return Reward(value=-min(1.0, max(0.0, over)))


# ---- those of users ------------------------------------------------------------------------------


class Form(NamedTuple):
    """How a reward of the user's is called: for `all` responses of a group at once, as a
    `coroutine`."""

    all: bool
    coroutine: bool


def form_of(reward: Any) -> Form:
    """By its signature: `(questions, responses, rows)` takes a whole group, and so does a function
    with the attribute `batch = True`."""
    names = _parameters(reward)[:3]
    call = getattr(reward, "__call__", reward)  # noqa: B004  (its code, not whether it has one)
    coroutine = inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(call)
    return Form(bool(getattr(reward, "batch", False)) or names == ALL, coroutine)


def load_reward(part: Part) -> extensions.Extension:
    """Import a reward of the user's and check how it can be called. Raises UserError."""
    setting = f"{part.setting}.use"
    found = extensions.load(setting, part.use, "reward", reward_names())
    expected = ALL if form_of(found.value).all else ONE
    _refuse_theirs(setting, part.use, found.value)
    extensions.check_call(setting, part.use, found.value, expected, part.args)
    return found


def _refuse_theirs(setting: str, use: str, reward: Any) -> None:
    """Three arguments fit three others, so only their names tell a reward written for another
    system, which would be given a row where it reads a gold answer. Raises UserError."""
    of = next((THEIRS[name] for name in _parameters(reward)[:3] if name in THEIRS), None)
    if of is not None:
        raise UserError(
            f"{setting}: {use!r} takes {inspect.signature(reward)}, as {of} calls it; expected a "
            f"function of ({', '.join(ONE)}) around it (docs/from_{of.lower()}.md)"
        )


def _parameters(reward: Any) -> tuple[str, ...]:
    """Names of what a function takes; none where nothing is known of it."""
    try:
        return tuple(inspect.signature(reward).parameters)
    except (TypeError, ValueError):
        return ()


def load_extractor(part: Part) -> extensions.Extension:
    """Import the `extractor` of a rule. Raises UserError."""
    setting, use = f"{part.setting}.args.extractor", part.args["extractor"]
    found = extensions.load(setting, use, "reward")
    extensions.check_call(setting, use, found.value, ("response",))
    return found


def read_result(value: object) -> Reward:
    """What a reward returned, as a Reward. Raises RewardError."""
    result = value if isinstance(value, Reward) else Reward(value=_number(value, "a reward"))
    many = isinstance(result.parts, dict)
    if not many or len(result.parts) > MAX_PARTS:
        what = f"{len(result.parts)} parts" if many else f"the parts {_shown(result.parts)}"
        raise RewardError(f"returned {what}; expected a dictionary of at most {MAX_PARTS}")
    parts = {_part_name(name): _number(n, f"the part {name!r}") for name, n in result.parts.items()}
    if not (result.answer is None or isinstance(result.answer, str)):
        raise RewardError(f"returned the answer {_shown(result.answer)}; expected text or None")
    return structs.replace(
        result,
        value=_number(result.value, "a reward"),
        answer=None if result.answer is None else sendable(result.answer[:MAX_ANSWER]),
        parts=parts,
        note=sendable(str(result.note)[:MAX_NOTE]),
    )


def read_results(values: object, count: int) -> list[Reward]:
    """What a reward of a whole group returned: a list, or an array of NumPy or Torch. Raises
    RewardError."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise RewardError(
            f"returned {_shown(values)}; expected a list of {count_of(count, 'reward')}"
        )
    if len(values) != count:
        raise RewardError(
            f"returned {count_of(len(values), 'reward')}; expected {count}, one per response"
        )
    return [read_result(value) for value in values]


def summed(
    parts: Sequence[Part], values: dict[str, float], answer: str | None, note: str = ""
) -> Grade:
    """The grade of a response from the values of all its parts. A sum that is no lawful reward,
    which takes weights as large as values, fails. One whose answer a part finds right is never
    shown as a wrong one, however little the rest lets it earn."""
    value = weighted(parts, values)
    if abs(value) > MAX_REWARD:
        note = f"the rewards add up to {value:g}; expected at most {MAX_REWARD:g}"
        return Grade(reward=0.0, answer=answer, note=note, failed=True)
    right = any(values.get(part.name) == 1.0 for part in parts if part.use in BY_GOLD)
    return Grade(reward=value, answer=answer, note=note, parts=values, undecided=right)


def together(parts: Sequence[Part], local: Grade, of_teacher: Part, verdict: Grade) -> Grade:
    """One grade of what the grading workers gave, in its parts, and of the teacher's part."""
    for one in (local, verdict):
        if one.failed:
            return one
    answer = local.answer if local.answer is not None else verdict.answer
    values = {**local.parts, of_teacher.name: verdict.reward}
    grade = summed(parts, values, answer, local.note or verdict.note)
    return structs.replace(grade, undecided=grade.undecided or verdict.undecided)


def _number(value: object, what: str) -> float:
    """A finite float; NumPy's and Torch's scalars count, because they say so themselves."""
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise RewardError(f"returned {_shown(value)} as {what}; expected a number")
    number = float(value)
    if not math.isfinite(number) or abs(number) > MAX_REWARD:
        raise RewardError(
            f"returned {number:g} as {what}; expected a finite number, at most {MAX_REWARD:g}"
        )
    return number


def _part_name(name: object) -> str:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_PART_NAME or not name.isprintable():
        raise RewardError(
            f"named a part {_shown(name)}; expected 1 to {MAX_PART_NAME} printable characters"
        )
    return name


def _shown(value: object) -> str:
    text = repr(value)
    return f"{text[:60]}…" if len(text) > 60 else text


# ---- checks --------------------------------------------------------------------------------------


def arguments_of(part: Part) -> Config:
    """The arguments of a built-in reward. Raises UserError."""
    struct, prefix = ARGUMENTS[part.use], f"{part.setting}.args"
    try:
        arguments = msgspec.convert(part.args, struct)
    except msgspec.ValidationError as error:
        raise UserError(explain(str(error), part.args, struct, prefix).sentence) from None
    pattern = part.args.get("pattern")
    if pattern is not None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"{prefix}.pattern is {pattern!r}; expected a regular expression ({error})"
            ) from None
    match arguments:
        case LengthArguments() if arguments.limit <= arguments.free:
            raise UserError(
                f"{prefix}.limit is {arguments.limit}; expected more than {arguments.free}, free"
            )
        case RuleArguments() if None not in (arguments.pattern, arguments.extractor):
            raise UserError(f"{prefix} has a pattern and an extractor; expected one of the two")
    return arguments


def check_parts(parts: Iterable[Part]) -> None:
    """Everything about rewards that can be known before a run. Imports code of the user's. Raises
    UserError."""
    of_teacher: Part | None = None
    for part in parts:
        if part.use not in ARGUMENTS:
            load_reward(part)
            continue
        arguments_of(part)
        if part.args.get("extractor") is not None:
            load_extractor(part)
        if part.of_teacher and of_teacher is not None:
            raise UserError(
                f"{part.setting}.use is {part.use!r} and {of_teacher.setting}.use is "
                f"{of_teacher.use!r}; expected one of them, because the teacher is asked once"
            )
        of_teacher = part if part.of_teacher else of_teacher


def bounds_of_sum(parts: Sequence[Part]) -> tuple[float, float] | None:
    """The least and the most that a response can earn; None where a reward of the user's decides
    it."""
    if not all(part.use in ARGUMENTS for part in parts):
        return None
    bounds = {part.name: (-1.0, 0.0) if part.use == "length" else (0.0, 1.0) for part in parts}
    worst = {part.name: bounds[part.name][part.weight <= 0.0] for part in parts}
    best = {part.name: bounds[part.name][part.weight > 0.0] for part in parts}
    return weighted(parts, worst), weighted(parts, best)


def needs_gold(parts: Iterable[Part]) -> bool:
    """Whether a question cannot do without a gold answer."""
    return any(part.use in GRADERS for part in parts)


def needs_row(parts: Iterable[Part]) -> bool:
    """Whether the other columns of a question's row are wanted."""
    return any(part.use not in ARGUMENTS or part.use == CODE for part in parts)


def named_values(parts: Mapping[str, float], prefix: str) -> dict[str, float]:
    """The parts that a reward named itself, under the reward's own name."""
    return {f"{prefix}/{name}": value for name, value in parts.items()}
