r"""An audit of a grader on the questions it will grade: completions whose truth is known by how
they are made.

A *right* completion boxes the gold answer of its question, in a sentence as models write them; a
grader that refuses it would refuse the best answer there is. A *hostile* completion gives no
answer, several, another question's, or all at once; a grader that takes it teaches a model to write
so. Neither depends on what any grader says.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from msgspec import Struct, field

from zppo.config.topology import REASONING_GYM, DataConfig
from zppo.data.question import Question
from zppo.errors import count_of, printable
from zppo.grading.boxes import BOX, last_boxed, tidy
from zppo.grading.graders import choice_letters, shown_gold
from zppo.grading.maths import gold_content
from zppo.grading.notation import without_signs
from zppo.grading.numbers import as_number
from zppo_protocol.values import TIMED_OUT

MAX_EXAMPLES = 3
"""Completions of a kind that a report shows."""
MAX_SHOWN = 160
"""Characters of a completion that are shown."""

RIGHT: dict[str, str] = {
    "a sentence": r"So the answer is \boxed{GOLD}.",
    "inline mathematics": r"Hence $\boxed{GOLD}$",
    "displayed": "We get\n\\[\n\\boxed{GOLD}\n\\]",
    "dollars inside": r"The answer is \boxed{$GOLD$}",
    "blanks inside": r"**Answer:** \boxed{ GOLD }",
    "a full stop inside": r"\boxed{GOLD.}",
    "after a first guess": r"At first I thought \boxed{OTHER}, but no: it is \boxed{GOLD}.",
}
"""Completions that are right: GOLD stands for the gold answer, OTHER for that of another
question."""
HOSTILE: dict[str, str] = {
    "nothing": "",
    "no box": r"The answer is GOLD.",
    "no box, marked": "I think so.\n#### GOLD",
    "an empty box": r"The answer is GOLD. \boxed{}",
    "a box never closed": r"The answer is \boxed{GOLD",
    "a box taken back": r"\boxed{GOLD} is my answer, or rather \boxed{",
    "several boxes, the last one wrong": r"\boxed{GOLD} or else \boxed{OTHER}",
    "another question's answer": r"The answer is \boxed{OTHER}.",
    "two answers": r"\boxed{GOLD \text{ or } OTHER}",
    "two answers, in a list": r"\boxed{GOLD, OTHER}",
    "all small numbers": rf"\boxed{{{', '.join(map(str, range(101)))}}}",
    "all letters": r"\boxed{A, B, C, D, E, F, G, H}",
    "the question": r"\boxed{QUESTION}",
    "the question and the answer": r"\boxed{QUESTION \text{ The answer is } GOLD}",
    "a refusal": r"\boxed{\text{I do not know}}",
    "a question mark": r"\boxed{?}",
    "the word": r"\boxed{answer}",
    "not the answer": r"\boxed{\text{not } GOLD}",
    "a neighbour": r"\boxed{NEXT}",
    "the opposite": r"\boxed{-(GOLD)}",
    "a tower": r"\boxed{9^{9^{9^{9}}}}",
}
"""Completions that are wrong; NEXT stands for the whole number after the gold answer."""
_NEEDS_NUMBER = {"a neighbour", "the opposite"}
_ONCE = {"a tower"}
"""Kinds that cost the whole time limit: one question is asked."""


class AuditOrder(Struct, frozen=True, kw_only=True):
    """What to audit: the questions as `data` reads them, at most `limit` of them."""

    data: DataConfig
    limit: int
    seed: int
    grader_seconds: float
    json: bool
    correct_reward: float = 1.0


class Case(Struct, frozen=True):
    """One completion to grade, and whether it is right."""

    kind: str
    question: Question
    response: str
    right: bool


class Verdict(Struct, frozen=True):
    """Whether a completion was taken for right; None where its reward could not be had."""

    right: bool | None
    note: str = ""


class Example(Struct, frozen=True):
    """A completion that was graded wrongly."""

    kind: str
    question: str
    gold: str
    response: str


class Audit(Struct):
    """What was found. Counts are by kind of completion."""

    source: str
    questions: int
    right: Counter[str] = field(default_factory=Counter)
    hostile: Counter[str] = field(default_factory=Counter)
    false_wrong: Counter[str] = field(default_factory=Counter)
    false_right: Counter[str] = field(default_factory=Counter)
    timed_out: int = 0
    failed: int = 0
    """Completions whose reward could not be had; they are in no other count."""
    failure: str = ""
    """Why the first of them failed."""
    examples: list[Example] = field(default_factory=list)

    def add(self, case: Case, verdict: Verdict) -> None:
        """Count one graded completion."""
        if verdict.right is None:
            self.failed += 1
            self.failure = self.failure or verdict.note
            return
        (self.right if case.right else self.hostile)[case.kind] += 1
        self.timed_out += verdict.note == TIMED_OUT
        if verdict.right == case.right:
            return
        mistakes = self.false_wrong if case.right else self.false_right
        mistakes[case.kind] += 1
        if mistakes[case.kind] <= MAX_EXAMPLES:
            gold = shown_gold(case.question.answer, case.question.grader)
            self.examples.append(
                Example(case.kind, case.question.id, gold[:MAX_SHOWN], case.response[:MAX_SHOWN])
            )

    @property
    def sound(self) -> bool:
        """Whether every completion was graded, and as it is."""
        return not self.false_right and not self.false_wrong and not self.failed


def cases(questions: Sequence[Question], seed: int) -> Iterator[Case]:
    """All completions of all questions, in the order of the questions."""
    rng = random.Random(seed)
    done: set[str] = set()
    for question in questions:
        gold = _gold(question)
        if gold is None:  # a task that any answer that fits solves has none to box
            continue
        words = _words(question, gold, questions, rng)
        yield from (Case(kind, question, text, True) for kind, text in _filled(RIGHT, words))
        for kind, text in _filled(HOSTILE, words):
            if kind not in done and _is_hostile(kind, text, question, gold):
                done |= {kind} & _ONCE
                yield Case(kind, question, text, False)


def _gold(question: Question) -> str | None:
    """The gold answer as a model would write it into a box; None if there is none."""
    if question.grader.startswith(f"{REASONING_GYM}:"):
        shown = shown_gold(question.answer, question.grader)
        return None if shown == "any that fits" else shown
    return gold_content(question.answer).strip()


def _words(
    question: Question, gold: str, questions: Sequence[Question], rng: random.Random
) -> dict[str, str]:
    """What the capital words of the completions stand for; a word that has no meaning here is
    absent."""
    words = {"GOLD": gold, "QUESTION": question.words}
    if question.grader.startswith(f"{REASONING_GYM}:"):
        return words  # another answer may be right too
    tries = (_gold(rng.choice(questions)) for _ in range(20))
    other = next((answer for answer in tries if answer is not None and _differ(answer, gold)), None)
    if other is not None:
        words["OTHER"] = other
    number = as_number(tidy(gold))
    if number is not None and number.denominator == 1 and number != 0:
        words["NEXT"] = str(int(number) + 1)
    return words


def _differ(one: str, other: str) -> bool:
    """Whether two gold answers differ for certain: as numbers, as choices, or two sentences as
    text."""
    one, other = tidy(one), tidy(other)
    for reading in (lambda text: as_number(without_signs(text)), choice_letters):
        first, second = reading(one), reading(other)
        if first and second:
            return bool(first != second)
    plain = one.isalpha() and other.isalpha()
    return plain and one.casefold() != other.casefold()


def _filled(forms: dict[str, str], words: dict[str, str]) -> Iterator[tuple[str, str]]:
    for kind, form in forms.items():
        needed = [word for word in ("GOLD", "OTHER", "QUESTION", "NEXT") if word in form]
        if all(word in words for word in needed) and (kind not in _NEEDS_NUMBER or "NEXT" in words):
            for word in needed:
                form = form.replace(word, words[word])
            yield kind, form


def _is_hostile(kind: str, text: str, question: Question, gold: str) -> bool:
    """Whether a completion is wrong for this question too: not by chance its answer, nor a question
    with a box."""
    if "QUESTION" in HOSTILE[kind] and (
        BOX.search(question.words) or gold in tidy(question.words)[:1]
    ):
        return False
    content = last_boxed(text)
    if content is None:
        return not BOX.search(gold)
    if kind == "all letters" and choice_letters(gold):
        return choice_letters(gold) != choice_letters(content)
    return tidy(content).casefold() != tidy(gold).casefold()


# ---- the report ----------------------------------------------------------------------------------


def report_text(audit: Audit) -> str:
    """The audit for people."""
    lines = [
        (
            f"{audit.source}: {count_of(audit.questions, 'question')}, "
            f"{count_of(audit.right.total() + audit.hostile.total(), 'completion')}"
        )
    ]
    for name, mistakes, made in _sides(audit):
        share = mistakes.total() / max(1, made.total())
        lines.append(f"  {name}: {mistakes.total()} of {made.total()} ({100 * share:.1f} %)")
        lines += [f"    {count} of {made[kind]}  {kind}" for kind, count in mistakes.most_common()]
    if audit.timed_out:
        lines.append(f"  timed out, so counted as wrong: {audit.timed_out}")
    if audit.failed:
        lines.append(f"  without a reward: {audit.failed}, the first because {audit.failure}")
    for example in audit.examples:
        lines += ["", f"  {example.kind}, question {example.question}", f"    gold: {example.gold}"]
        lines.append(f"    response: {' '.join(example.response.split()) or '(empty)'}")
    return printable("\n".join(lines) + "\n")


def report_values(audit: Audit) -> dict[str, object]:
    """The audit for programs."""
    values: dict[str, object] = {
        "source": audit.source,
        "questions": audit.questions,
        "timed_out": audit.timed_out,
        "failed": audit.failed,
    }
    for name, mistakes, made in _sides(audit):
        kinds = {
            kind: {"completions": count, "mistakes": mistakes[kind]}
            for kind, count in sorted(made.items())
        }
        rate = mistakes.total() / max(1, made.total())
        values[name.replace(" ", "_")] = {
            "rate": rate,
            "mistakes": mistakes.total(),
            "kinds": kinds,
        }
    return values | {"examples": audit.examples}


def _sides(audit: Audit) -> list[tuple[str, Counter[str], Counter[str]]]:
    return [
        ("false right", audit.false_right, audit.hostile),
        ("false wrong", audit.false_wrong, audit.right),
    ]


Grading = Callable[[Case], Verdict]


def run(source: str, questions: Sequence[Question], seed: int, grading: Grading) -> Audit:
    """Grade all completions and count."""
    audit = Audit(source, len(questions))
    for case in cases(questions, seed):
        audit.add(case, grading(case))
    return audit
