"""What one window needs next, as a function of what it has.

    plain → (teacher, for each hard question as soon as it is known) → caps → compress → BCQ/NCQ → ready

Each result is stored where it belongs and the visit is advanced: everything that has become possible is asked for, once
each. Nothing else is remembered, so a restored window asks again for exactly what it misses.
"""

from __future__ import annotations

from collections.abc import Callable

from zppo.algorithm import Recipe, add_reformulations, wants_teacher
from zppo.compression import accept, by_rule
from zppo.grading import JUDGE, judged, quick_grade
from zppo.jobs import JobFactory, Stage, Target
from zppo.prompts import PromptSet
from zppo.questions import Question
from zppo.window import TEACHER, Candidate, Group, Reformulation, Visit, Window
from zppo_protocol.messages import Grade, Prompt


class CannotGoOn(RuntimeError):
    """A group that the window cannot do without cannot be had."""


class Stages:
    """`ask` takes a target that is needed; asking twice for the same one must do nothing."""

    def __init__(self, recipe: Recipe, prompts: PromptSet, jobs: JobFactory, ask: Callable[[Target], None]) -> None:
        self._recipe, self._prompts, self._jobs, self._ask = recipe, prompts, jobs, ask

    def group(self, index: int, question: Question, kind: str, prompt: Prompt | None = None) -> Group:
        """A group of `kind` that asks `prompt`, or the plain question; its id is unique in the run."""
        prompt = prompt if prompt is not None else self._prompts.plain(question)
        return Group(id=f"{index}/{question.id}/{kind}", kind=kind, prompt=prompt)

    # ---- what is needed --------------------------------------------------------------------------------------------

    def advance(self, window: Window, visit: Visit) -> None:
        """Ask for whatever this visit needs next."""
        self.advance_group(visit.plain, visit.question, window, visit)
        if not visit.plain.done:
            return
        if visit.teacher is None and wants_teacher(visit, self._recipe):
            visit.teacher = self.group(window.index, visit.question, TEACHER, visit.plain.prompt)
        if visit.teacher is not None:
            self.advance_group(visit.teacher, visit.question, window, visit)
        for reformulation in visit.reformulations:
            self._advance_reformulation(window, visit, reformulation)

    def advance_group(
        self, group: Group, question: Question, window: Window | None = None, visit: Visit | None = None
    ) -> None:
        """Sample, then grade. A group without a window belongs to an evaluation."""
        if group.done:
            return
        if group.samples is not None and question.grader == JUDGE:
            self._advance_judgement(group, question, window, visit)
            return
        stage: Stage = "sample" if group.samples is None else "grade"
        self._ask(Target(stage=stage, question=question, window=window, visit=visit, group=group))

    def decide_caps(self, window: Window) -> None:
        """Every plain and teacher group is graded: choose the reformulations and ask for what they need."""
        add_reformulations(window, self._recipe)
        for visit in window.visits:
            if visit.reformulations:
                self.advance(window, visit)

    def _advance_reformulation(self, window: Window, visit: Visit, reformulation: Reformulation) -> None:
        if reformulation.group is None:
            for candidate in reformulation.candidates:
                if candidate.compressed is None:
                    self._compress(window, visit, candidate)
            if any(candidate.compressed is None for candidate in reformulation.candidates):
                return
            reformulator = next(r for r in self._recipe.method.reformulations if r.kind == reformulation.kind)
            prompt = reformulator.prompt(visit, reformulation.candidates, self._prompts)
            reformulation.group = self.group(window.index, visit.question, reformulation.kind, prompt)
        self.advance_group(reformulation.group, visit.question, window, visit)

    def _compress(self, window: Window, visit: Visit, candidate: Candidate) -> None:
        target = Target(stage="compress", question=visit.question, window=window, visit=visit, candidate=candidate)
        if self._jobs.teacher_compresses:
            self._ask(target)
        else:
            self.compressed(target, None)

    def _advance_judgement(self, group: Group, question: Question, window: Window | None, visit: Visit | None) -> None:
        """Ask the judge about every response that the quick comparison leaves open (paper, Reward)."""
        assert group.samples is not None
        for index, text in enumerate(group.samples.texts):
            if index not in group.verdicts:
                quick = quick_grade(text, question.answer, JUDGE)
                if quick is not None:
                    group.verdicts[index] = quick
                else:
                    self._ask(
                        Target(
                            stage="judge", question=question, window=window, visit=visit, group=group, response=index
                        )
                    )
        if len(group.verdicts) == len(group.samples.texts):
            group.grades = [group.verdicts[index] for index in range(len(group.verdicts))]

    # ---- what has come ---------------------------------------------------------------------------------------------

    def compressed(self, target: Target, reply: str | None) -> None:
        """Store a compressed text for every place in the visit that shows the same response. None: by rule."""
        assert target.candidate is not None and target.visit is not None
        text, limits = target.candidate.text, self._jobs.compression_limits
        compressed = accept(reply, text, *limits) if reply is not None else by_rule(text, *limits)
        for reformulation in target.visit.reformulations:
            for candidate in reformulation.candidates:
                if (candidate.source, candidate.index) == (target.candidate.source, target.candidate.index):
                    candidate.compressed = compressed

    def judged(self, target: Target, reply: str) -> None:
        """Store the judge's verdict on one response."""
        group = target.the_group
        assert group.samples is not None
        group.verdicts[target.response] = judged(reply, group.samples.texts[target.response])

    def give_up(self, task_id: str, target: Target, reason: str) -> None:
        """Go on without a result: the teacher and the rewritten prompts can be done without, the rest cannot.

        Raises CannotGoOn.
        """
        if target.stage == "compress":
            self.compressed(target, None)
        elif target.stage == "judge":
            target.the_group.verdicts[target.response] = Grade(reward=0.0, note=f"the judge failed: {reason}"[:500])
        elif target.visit is not None and target.group is target.visit.teacher:
            target.the_group.grades = []
        elif target.visit is not None and target.group is not target.visit.plain:
            target.visit.reformulations = [r for r in target.visit.reformulations if r.group is not target.group]
        else:
            raise CannotGoOn(f"task {task_id} cannot be done: {reason}")
