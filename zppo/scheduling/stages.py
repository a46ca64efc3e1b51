"""What one window needs next, as a function of what it has.

    plain, teacher (as soon as the method may ask it) → selected → caps → prepare → BCQ/NCQ/… →
    composed → scored

Each result is stored where it belongs and the visit is advanced: everything that has become
possible is asked for, once each. When nothing of a window is missing, `proceed` takes its next
decision. Nothing else is remembered, so a restored window asks again for exactly what it misses.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from msgspec import structs

from zppo.algorithm.reformulations import Preparation, Reformulator
from zppo.algorithm.steps import (
    Recipe,
    add_reformulations,
    asks_next_teacher,
    compose,
    first_teacher,
    select,
    wants_teacher,
)
from zppo.algorithm.window import TEACHER, Candidate, Group, Reformulation, Visit, Window, Writer
from zppo.config.topology import JUDGE
from zppo.data.question import Question
from zppo.grading import judged, parse_answer, quick_grade
from zppo.prompting import compression, hints
from zppo.prompting.prompts import PromptSet
from zppo.scheduling.jobs import JobFactory, Stage, Target
from zppo_protocol.samples import TokenScores
from zppo_protocol.values import Grade, Prompt


class CannotGoOn(RuntimeError):
    """A group that the window cannot do without cannot be had."""


class Stages:
    """`ask` takes a target that is needed; asking twice for the same one must do nothing."""

    def __init__(
        self, recipe: Recipe, prompts: PromptSet, jobs: JobFactory, ask: Callable[[Target], None]
    ) -> None:
        self._recipe, self._prompts, self._jobs, self._ask = recipe, prompts, jobs, ask

    def group(
        self, index: int, question: Question, kind: str, prompt: Prompt | None = None
    ) -> Group:
        """A group of `kind` that asks `prompt`, or the plain question; its id is unique in the
        run."""
        prompt = prompt if prompt is not None else self._prompts.plain(question)
        return Group(id=f"{index}/{question.id}/{kind}", kind=kind, prompt=prompt)

    # ---- what is needed --------------------------------------------------------------------------

    def advance(self, window: Window, visit: Visit) -> None:
        """Ask for whatever this visit needs next."""
        self.advance_group(visit.plain, visit.question, window, visit)
        self._advance_teacher(window, visit)
        for reformulation in visit.reformulations:
            self._advance_reformulation(window, visit, reformulation)

    def _advance_teacher(self, window: Window, visit: Visit) -> None:
        """Ask a teacher where the method wants one; the next one while the last had no correct
        response (a cascade)."""
        if visit.teacher is None:
            if not wants_teacher(visit, self._recipe):
                return
            first = first_teacher(window, visit, self._recipe)
            visit.teacher = self._teacher_group(window, visit, first)
        elif visit.teacher.done and asks_next_teacher(visit, self._recipe):
            visit.failed_teachers.append(visit.teacher)
            visit.teacher = self._teacher_group(window, visit, visit.teacher.teacher + 1)
        self.advance_group(visit.teacher, visit.question, window, visit)

    def _teacher_group(self, window: Window, visit: Visit, teacher: int) -> Group:
        group = self.group(window.index, visit.question, TEACHER, visit.plain.prompt)
        return (
            structs.replace(group, id=f"{group.id}-{teacher + 1}", teacher=teacher)
            if teacher
            else group
        )

    def advance_group(
        self,
        group: Group,
        question: Question,
        window: Window | None = None,
        visit: Visit | None = None,
    ) -> None:
        """Sample, then grade. A group without a window belongs to an evaluation."""
        if group.done:
            return
        if group.samples is not None and question.grader == JUDGE:
            self._advance_judgement(group, question, window, visit)
            return
        stage: Stage = "sample" if group.samples is None else "grade"
        self._ask(Target(stage=stage, question=question, window=window, visit=visit, group=group))

    def proceed(self, window: Window) -> None:
        """Nothing of the window is missing: take its next decision and ask for what follows from
        it."""
        match window.phase:
            case "plain":
                select(window, self._recipe)
                window.phase = "selected"
            case "selected":
                add_reformulations(window, self._recipe)
                window.phase = "reformulated"
            case "reformulated":
                window.phase = "composed"
        self.resume(window)

    def resume(self, window: Window) -> None:
        """Ask for everything that the window misses in its phase."""
        for visit in window.visits:
            self.advance(window, visit)
        if (
            window.phase == "composed"
            and self._recipe.method.needs_scores
            and self._jobs.scores_remotely
        ):
            self._score(window)

    def _score(self, window: Window) -> None:
        for visit, composition in compose(window, self._recipe):
            tokens = sum(
                int(np.diff(group.the_samples.offsets)[index])
                for group, index in composition.members
            )
            if tokens and composition.id not in visit.scores:
                question = visit.question
                target = Target(
                    stage="score",
                    question=question,
                    window=window,
                    visit=visit,
                    composition=composition,
                )
                self._ask(target)

    def _advance_reformulation(
        self, window: Window, visit: Visit, reformulation: Reformulation
    ) -> None:
        if reformulation.group is None:
            reformulator = self._reformulator(reformulation)
            for candidate in reformulation.candidates:
                if candidate.shown is None:
                    self._prepare(window, visit, candidate, reformulator.preparation)
            if any(candidate.shown is None for candidate in reformulation.candidates):
                return
            prompt = reformulator.prompt(visit, reformulation.candidates, self._prompts)
            reformulation.group = self.group(
                window.index, visit.question, reformulation.kind, prompt
            )
        self.advance_group(reformulation.group, visit.question, window, visit)

    def _reformulator(self, reformulation: Reformulation) -> Reformulator:
        return next(r for r in self._recipe.method.reformulations if r.kind == reformulation.kind)

    def _prepare(
        self, window: Window, visit: Visit, candidate: Candidate, preparation: Preparation
    ) -> None:
        if preparation == "none":
            candidate.shown = candidate.text
            return
        question = visit.question
        target = Target(
            stage=preparation, question=question, window=window, visit=visit, candidate=candidate
        )
        if self._jobs.teacher_compresses:
            self._ask(target)
        else:
            self.prepared(target, None)

    def _advance_judgement(
        self, group: Group, question: Question, window: Window | None, visit: Visit | None
    ) -> None:
        """Ask the judge about every response that the quick comparison leaves open (paper,
        Reward)."""
        assert group.samples is not None
        for index, text in enumerate(group.samples.texts):
            if index not in group.verdicts:
                quick = quick_grade(text, question.answer, JUDGE)
                if quick is not None:
                    group.verdicts[index] = quick
                else:
                    self._ask(
                        Target(
                            stage="judge",
                            question=question,
                            window=window,
                            visit=visit,
                            group=group,
                            response=index,
                        )
                    )
        if len(group.verdicts) == len(group.samples.texts):
            group.grades = [group.verdicts[index] for index in range(len(group.verdicts))]

    # ---- what has come ---------------------------------------------------------------------------

    def prepared(self, target: Target, reply: str | None) -> None:
        """Store the text to show of a candidate, in every place of the visit that shows the same
        response.

        None: by rule, because the teacher does not write, could not, or did not come to an end.
        """
        assert target.candidate is not None and target.visit is not None
        text, limits = target.candidate.text, self._jobs.compression_limits
        words = None if reply is None else self._usable(reply, target, text)
        by_rule = hints.by_rule if target.stage == "write_hint" else compression.by_rule
        shown = by_rule(text, *limits) if words is None else words
        writer: Writer = (
            ("rule" if words is None else "teacher") if self._jobs.teacher_compresses else None
        )
        for reformulation in target.visit.reformulations:
            if self._reformulator(reformulation).preparation == target.stage:
                for candidate in reformulation.candidates:
                    if (candidate.source, candidate.index) == (
                        target.candidate.source,
                        target.candidate.index,
                    ):
                        candidate.shown = shown
                        candidate.writer = writer

    def _usable(self, reply: str, target: Target, text: str) -> str | None:
        lines, tokens = self._jobs.compression_limits
        if target.stage == "write_hint":
            return hints.written(reply, text, lines, tokens)
        return compression.written(reply, text, lines)

    def scored(self, target: Target, scores: TokenScores) -> None:
        """Store the teacher's scores of a composed group."""
        assert target.composition is not None and target.visit is not None
        target.visit.scores[target.composition.id] = scores

    def judged(self, target: Target, reply: str) -> None:
        """Store the judge's verdict on one response."""
        group = target.the_group
        assert group.samples is not None
        group.verdicts[target.response] = judged(reply, group.samples.texts[target.response])

    def give_up(self, task_id: str, target: Target, reason: str) -> None:
        """Go on without a result: the teacher and the rewritten prompts can be done without, the
        rest cannot.

        Raises CannotGoOn.
        """
        if target.candidate is not None:
            self.prepared(target, None)
        elif target.stage == "judge":
            answer = parse_answer(target.the_group.the_samples.texts[target.response])
            note = f"the judge failed: {reason}"[:500]
            target.the_group.verdicts[target.response] = Grade(reward=0.0, answer=answer, note=note)
        elif (
            target.visit is not None
            and target.group is not None
            and target.group is target.visit.teacher
        ):
            target.the_group.grades = []
        elif (
            target.visit is not None
            and target.group is not None
            and target.group is not target.visit.plain
        ):
            target.visit.reformulations = [
                r for r in target.visit.reformulations if r.group is not target.group
            ]
        else:
            raise CannotGoOn(f"task {task_id} cannot be done: {reason}")
