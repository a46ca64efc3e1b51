"""What one window needs next, as a function of what it has.

    plain, teacher (as soon as the method may ask it) → selected → caps → prepare → BCQ/NCQ/… →
    composed → scored

Each result is stored where it belongs, and its visit is advanced: what has become possible is made.
`missing` says what is to be had next; the scheduler asks for what it has not asked for yet. When
nothing of a window is missing, `proceed` takes its next decision. Nothing else is remembered, so a
restored window misses exactly what it had not got.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from msgspec import structs

from zppo.algorithm.reformulations import Preparation, Reformulator
from zppo.algorithm.steps import (
    Recipe,
    add_reformulations,
    asks_next_teacher,
    compose,
    counted,
    first_teacher,
    select,
    wants_teacher,
)
from zppo.algorithm.window import (
    PLAIN,
    TEACHER,
    WRITE_HINT,
    Candidate,
    Group,
    Reformulation,
    Visit,
    Window,
    Writer,
)
from zppo.config.rewards import REWARD_AND_TEACHER, RUBRIC, Part, chosen, rule_of
from zppo.config.topology import JUDGE
from zppo.data.question import Question
from zppo.grading import judged, parse_answer, quick_grade, scored, together
from zppo.prompting import compression, hints
from zppo.prompting.prompts import PromptSet, without_strangers
from zppo.scheduling.events import Answer, Graded, Sampled, Scored
from zppo.scheduling.jobs import JobFactory
from zppo.scheduling.targets import (
    GradeTarget,
    GroupTarget,
    JudgeTarget,
    Place,
    PrepareTarget,
    SampleTarget,
    ScoreTarget,
    Target,
)
from zppo_protocol.places import without_places
from zppo_protocol.samples import GroupSamples
from zppo_protocol.values import Grade, Prompt


def asks_teacher(question: Question) -> bool:
    """Whether the teacher gives the grades of a question, or a part of them."""
    return rule_of(question.grader)[0] in (JUDGE, REWARD_AND_TEACHER)


class CannotGoOn(RuntimeError):
    """A group that the window cannot do without cannot be had."""


class Stages:
    """Decides (`proceed`, `advance`, what has come) and says what is missing; it asks nobody."""

    def __init__(self, recipe: Recipe, prompts: PromptSet, jobs: JobFactory) -> None:
        self._recipe, self._prompts, self._jobs = recipe, prompts, jobs

    def group(
        self, index: int, question: Question, kind: str, prompt: Prompt | None = None
    ) -> Group:
        """A group of `kind` that asks `prompt`, or the plain question; its id is unique in the
        run."""
        prompt = prompt if prompt is not None else self._prompts.plain(question)
        return Group(
            id=f"{index}/{question.id}/{kind}",
            kind=kind,
            prompt=prompt,
            correct_reward=self._recipe.correct_reward,
        )

    def window(
        self, index: int, new: Iterable[tuple[Question, int]], replayed: Iterable[Question]
    ) -> Window:
        """X = X_new, each with its pass over the corpus, ∪ X_replay, of which nothing is sampled
        yet."""
        visits = [
            Visit(
                question=question,
                origin="new",
                epoch=epoch,
                plain=self.group(index, question, PLAIN),
            )
            for question, epoch in new
        ]
        visits += [
            Visit(question=q, origin="replay", plain=self.group(index, q, PLAIN)) for q in replayed
        ]
        return Window(index=index, visits=visits)

    # ---- what has become possible ----------------------------------------------------------------

    def proceed(self, window: Window) -> Iterator[Target]:
        """Nothing of the window is missing: take its next decision, and all that follows from
        it; what is missing now. The visits that it does not concern stand where they stood."""
        concerned: list[Visit] = []
        match window.phase:
            case "plain":
                select(window, self._recipe)
                window.phase = "selected"
                concerned = [visit for visit in window.visits if visit.selected]
            case "selected":
                add_reformulations(window, self._recipe)
                window.phase = "reformulated"
                concerned = [visit for visit in window.visits if visit.reformulations]
            case "reformulated":
                window.phase = "composed"
        for visit in concerned:
            self.advance_visit(window, visit)
        return self._missing(window, concerned)

    def advance(self, window: Window) -> None:
        """`advance_visit` for all visits."""
        for visit in window.visits:
            self.advance_visit(window, visit)

    def advance_visit(self, window: Window, visit: Visit) -> None:
        """Make what the results so far allow: grades out of verdicts, teacher groups, rewritten
        prompts."""
        self.advance_group(visit.plain, visit.question)
        self._advance_teacher(window, visit)
        for reformulation in visit.reformulations:
            self._advance_reformulation(window, visit, reformulation)

    def advance_group(self, group: Group, question: Question) -> None:
        """Grade what the teacher is asked about, as far as the quick comparison decides it (paper,
        Reward) or the teacher has spoken, and the grading workers too where they have a part."""
        if group.done or group.samples is None or not asks_teacher(question):
            return
        part = self._part_of_teacher
        if part is None or part.use == JUDGE:
            for index, text in enumerate(group.samples.texts):
                if index not in group.verdicts:
                    quick = quick_grade(text, question.answer, JUDGE)
                    if quick is not None:
                        group.verdicts[index] = quick
        if len(group.verdicts) < len(group.samples.texts):
            return
        grades = [group.verdicts[index] for index in range(len(group.verdicts))]
        if part is not None:
            if group.local is None:
                return
            parts = chosen(self._recipe.reward, rule_of(question.grader)[1])
            grades = [
                together(parts, local, part, verdict)
                for local, verdict in zip(group.local, grades, strict=True)
            ]
        group.grades, group.local = counted(group, grades, self._recipe), None

    @property
    def _part_of_teacher(self) -> Part | None:
        """The part of the reward that the teacher gives."""
        return next((part for part in self._recipe.reward if part.of_teacher), None)

    def _advance_teacher(self, window: Window, visit: Visit) -> None:
        """A teacher where the method wants one; the next one while the last had no correct
        response (a cascade)."""
        if visit.teacher is None:
            if wants_teacher(visit, self._recipe):
                first = first_teacher(window, visit, self._recipe)
                visit.teacher = self._teacher_group(window, visit, first)
            return
        self.advance_group(visit.teacher, visit.question)
        if visit.teacher.done and asks_next_teacher(visit, self._recipe):
            visit.failed_teachers.append(visit.teacher)
            visit.teacher = self._teacher_group(window, visit, visit.teacher.teacher + 1)

    def _teacher_group(self, window: Window, visit: Visit, teacher: int) -> Group:
        group = self.group(window.index, visit.question, TEACHER, visit.plain.prompt)
        return (
            structs.replace(group, id=f"{group.id}-{teacher + 1}", teacher=teacher)
            if teacher
            else group
        )

    def _advance_reformulation(
        self, window: Window, visit: Visit, reformulation: Reformulation
    ) -> None:
        """Prepare its candidates, unless the teacher is to do it; build its prompt once they all
        are prepared."""
        if reformulation.group is not None:
            self.advance_group(reformulation.group, visit.question)
            return
        reformulator = self._reformulator(reformulation)
        for candidate in reformulation.candidates:
            if candidate.shown is None and reformulator.preparation == "none":
                candidate.shown = candidate.text
            elif candidate.shown is None and not self._jobs.teacher_compresses:
                self._show(visit, candidate, reformulator.preparation, None)
        if all(candidate.shown is not None for candidate in reformulation.candidates):
            for candidate in reformulation.candidates:
                candidate.shown = without_places(candidate.shown or "")
            prompt = reformulator.prompt(visit, reformulation.candidates, self._prompts)
            prompt = without_strangers(prompt, visit.question)
            reformulation.group = self.group(
                window.index, visit.question, reformulation.kind, prompt
            )

    def _reformulator(self, reformulation: Reformulation) -> Reformulator:
        return next(r for r in self._recipe.method.reformulations if r.kind == reformulation.kind)

    # ---- what is missing -------------------------------------------------------------------------

    def missing(self, window: Window) -> Iterator[Target]:
        """All that the window still has to be given before it can proceed; changes nothing."""
        return self._missing(window, window.visits)

    def _missing(self, window: Window, visits: Iterable[Visit]) -> Iterator[Target]:
        """The part of `missing` that is of these visits, and the scores."""
        for visit in visits:
            yield from self.missing_of_visit(Place(window, visit))
        if (
            window.phase == "composed"
            and self._recipe.method.needs_scores
            and self._jobs.scores_remotely
        ):
            yield from self._missing_scores(window)

    def missing_of_visit(self, place: Place) -> Iterator[Target]:
        """The part of `missing` that is one visit's, but for scores: only a whole window is
        composed."""
        visit = place.visit
        yield from missing_of_group(visit.plain, visit.question, place)
        if visit.teacher is not None:
            yield from missing_of_group(visit.teacher, visit.question, place)
        for reformulation in visit.reformulations:
            if reformulation.group is not None:
                yield from missing_of_group(reformulation.group, visit.question, place)
                continue
            preparation = self._reformulator(reformulation).preparation
            for candidate in reformulation.candidates:
                if candidate.shown is None:
                    yield PrepareTarget(place=place, candidate=candidate, preparation=preparation)

    def _missing_scores(self, window: Window) -> Iterator[Target]:
        for visit, composition in compose(window, self._recipe):
            tokens = sum(
                int(np.diff(group.the_samples.offsets)[index])
                for group, index in composition.members
            )
            if tokens and composition.id not in visit.scores:
                yield ScoreTarget(place=Place(window, visit), composition=composition)

    # ---- what has come ---------------------------------------------------------------------------

    def received(self, target: Target, answer: Answer) -> None:
        """Store what a worker answered where it belongs; the scheduler has checked that it is an
        answer to this target's job."""
        match target, answer:
            case SampleTarget(), Sampled():
                target.group.samples = answer.samples
            case GradeTarget(), Graded() if asks_teacher(target.question):
                target.group.local = answer.grades
            case GradeTarget(), Graded():
                target.group.grades = counted(target.group, answer.grades, self._recipe)
            case ScoreTarget(), Scored():
                target.place.visit.scores[target.composition.id] = answer.scores
            case JudgeTarget(), Sampled():
                self._judged(target, answer.samples)
            case PrepareTarget(), Sampled():
                self._prepared(target, answer.samples)
            case _:
                raise AssertionError(f"{type(answer).__name__} for {target.task_id}")

    def _judged(self, target: JudgeTarget, reply: GroupSamples) -> None:
        if target.place is not None:
            target.place.window.spend(reply)
        text, part = target.group.the_samples.texts[target.response], self._part_of_teacher
        grade = scored if part is not None and part.use == RUBRIC else judged
        target.group.verdicts[target.response] = grade(reply.texts[0], text)

    def _prepared(self, target: PrepareTarget, reply: GroupSamples) -> None:
        target.place.window.spend(reply)
        # A reply that was cut off may be a thought that had not come to its end.
        text = reply.texts[0] if reply.finish_reasons[0] != "length" else None
        self._show(target.place.visit, target.candidate, target.preparation, text)

    def _show(
        self, visit: Visit, candidate: Candidate, preparation: Preparation, reply: str | None
    ) -> None:
        """Store the text to show of a candidate, in every place of the visit that shows the same
        response.

        `reply` None: by rule, because the teacher does not write, could not, or did not come to an
        end.
        """
        limits = self._jobs.compression_limits
        words = None if reply is None else self._usable(reply, preparation, candidate.text)
        by_rule = hints.by_rule if preparation == WRITE_HINT else compression.by_rule
        shown = by_rule(candidate.text, *limits) if words is None else words
        writer: Writer = (
            ("rule" if words is None else "teacher") if self._jobs.teacher_compresses else None
        )
        response = (candidate.source, candidate.index)
        for reformulation in visit.reformulations:
            if self._reformulator(reformulation).preparation == preparation:
                for twin in reformulation.candidates:
                    if (twin.source, twin.index) == response:
                        twin.shown, twin.writer = shown, writer

    def _usable(self, reply: str, preparation: Preparation, text: str) -> str | None:
        lines, tokens = self._jobs.compression_limits
        if preparation == WRITE_HINT:
            return hints.written(reply, text, lines, tokens)
        return compression.written(reply, text, lines)

    def give_up(self, target: Target, reason: str) -> None:
        """Go on without a result: the teacher and the rewritten prompts can be done without, the
        rest cannot.

        Raises CannotGoOn.
        """
        match target:
            case PrepareTarget():
                self._show(target.place.visit, target.candidate, target.preparation, None)
            case JudgeTarget():
                answer = parse_answer(target.group.the_samples.texts[target.response])
                note = f"the judge failed: {reason}"[:500]
                failed = rule_of(target.question.grader)[0] == REWARD_AND_TEACHER
                grade = Grade(
                    reward=0.0, answer=answer, note=note, failed=failed, undecided=not failed
                )
                target.group.verdicts[target.response] = grade
            case GroupTarget(group=group, place=Place(visit=visit)) if group is visit.teacher:
                group.grades = []
            case GroupTarget(group=group, place=Place(visit=visit)) if group is not visit.plain:
                visit.reformulations = [r for r in visit.reformulations if r.group is not group]
            case _:
                raise CannotGoOn(f"task {target.task_id} cannot be done: {reason}")


def missing_of_group(
    group: Group, question: Question, place: Place | None = None
) -> Iterator[Target]:
    """Its samples, then its grades, or the verdicts that only the judge can give. A group without a
    place belongs to an evaluation."""
    if group.done:
        return
    if group.samples is None:
        yield SampleTarget(group=group, question=question, place=place)
        return
    if question.grader != JUDGE and group.local is None:
        yield GradeTarget(group=group, question=question, place=place)
    if asks_teacher(question):
        for response in range(len(group.samples.texts)):
            if response not in group.verdicts:
                yield JudgeTarget(group=group, question=question, place=place, response=response)
