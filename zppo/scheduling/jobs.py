"""From what a window needs to the job that a worker can do: task ids, pools, priorities, sampling,
seeds."""

from __future__ import annotations

import hashlib
from typing import Literal, TypeAlias

from msgspec import Struct

from zppo.algorithm.composition import Composition, gathered
from zppo.algorithm.window import EVALUATE, PLAIN, TEACHER, Candidate, Group, Visit, Window
from zppo.config.topology import JUDGE, JUDGE_SAMPLING, ModelConfig, Topology
from zppo.data.question import Question
from zppo.plan.processes import teacher_pool, teachers
from zppo.prompting.chat_template import for_template, when_writing
from zppo.prompting.prompts import PromptSet
from zppo.scheduling.dispatch import Job
from zppo_protocol.messages import GenerateTask, GradeTask, ScoreTask
from zppo_protocol.values import Prompt, Sampling

Stage: TypeAlias = Literal["sample", "grade", "judge", "compress", "write_hint", "score"]
ROLLOUT_POOL, TEACHER_POOL, GRADER_POOL = "rollout", teacher_pool(0), "grader"
EARLY_KINDS = (PLAIN, TEACHER, EVALUATE)
"""Within a window the later stages go first: they are nearest to completing it. These kinds come
after all others."""
EVALUATION_ORDER = -1
"""Evaluations go before all windows, so that they see the policy they ask for."""


class Target(Struct, kw_only=True):
    """Where the result of a job belongs: a group to sample or grade, one `response` of it to judge,
    a candidate to prepare, or a composed group to score. Evaluation groups belong to no window."""

    stage: Stage
    question: Question
    group: Group | None = None
    window: Window | None = None
    visit: Visit | None = None
    candidate: Candidate | None = None
    composition: Composition | None = None
    response: int = 0

    @property
    def task_id(self) -> str:
        """The id of the target's job: what is wanted, and of whom. Asking twice shows before a job
        is made."""
        if self.candidate is not None:
            source = f"{self.candidate.source}-{self.candidate.index}"
            return f"{self.window_index}/{self.question.id}/{self.stage}/{source}"
        if self.composition is not None:
            return f"{self.composition.id}/{self.stage}"
        suffix = {"grade": "/grade", "judge": f"/judge-{self.response}"}.get(self.stage, "")
        return f"{self.the_group.id}{suffix}"

    @property
    def window_index(self) -> int:
        return self.window.index if self.window is not None else EVALUATION_ORDER

    @property
    def the_group(self) -> Group:
        assert self.group is not None, f"a {self.stage} job has a group"
        return self.group


class JobFactory:
    """Turns targets into jobs, by the settings of the topology."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._student = topology.student.sampling
        self._teacher = topology.teacher
        self._when_writing = (
            when_writing(topology.teacher, topology.actors.teacher.engine)
            if topology.teacher
            else {}
        )

    @property
    def teacher_compresses(self) -> bool:
        """Whether candidates are compressed by the teacher; by rule otherwise."""
        return self._teacher is not None and self._teacher.compression == "teacher"

    @property
    def scores_remotely(self) -> bool:
        """Whether teacher actors give the teacher's distribution; the trainer has its own copy
        otherwise."""
        return self._teacher is not None and self._teacher.scoring == "remote"

    @property
    def compression_limits(self) -> tuple[int, int]:
        """(maximal lines, maximal tokens) of a prepared candidate; one shared cap for right and
        wrong ones."""
        if self._teacher is None:
            return 5, 512
        return (
            self._teacher.compression_max_lines,
            self._teacher.compression_sampling.max_new_tokens,
        )

    def job(self, target: Target, min_version: int, prompts: PromptSet) -> Job:
        """The job for a target, under the id that the target gives it."""
        window = target.window_index
        if target.stage == "grade":
            return self._grade(target, window)
        if target.stage == "judge":
            return self._judge(target, window, prompts)
        if target.candidate is not None:
            return self._prepare(target, target.candidate, window, prompts)
        if target.composition is not None:
            return self._score(target, target.composition, window)
        return self._sample(target, window, min_version)

    def _sample(self, target: Target, window: int, min_version: int) -> Job:
        group = target.the_group
        teacher = group.kind == TEACHER
        model = teachers(self._topology)[group.teacher].model if teacher else self._topology.student
        n, sampling = self._decoding(group, model)
        prompt = for_template(group.prompt, model.chat_template_kwargs)
        message = self._generate(
            group.id, group.kind, prompt, n, sampling, -1 if teacher else min_version
        )
        order = (window, _stage_order(group.kind))
        pool = teacher_pool(group.teacher) if teacher else ROLLOUT_POOL
        return Job(
            id=group.id,
            pool=pool,
            order=order,
            cost=n,
            message=message,
            min_version=message.min_version,
        )

    def _grade(self, target: Target, window: int) -> Job:
        group = target.the_group
        assert group.samples is not None, "a group is graded after it is sampled"
        question = target.question
        name = target.task_id
        message = GradeTask(
            task_id=name,
            gold=question.answer,
            responses=group.samples.texts,
            grader=question.grader,
        )
        order = (window, _stage_order(group.kind))
        return Job(id=name, pool=GRADER_POOL, order=order, cost=1, message=message)

    def _judge(self, target: Target, window: int, prompts: PromptSet) -> Job:
        group, question = target.the_group, target.question
        assert group.samples is not None, "a group is judged after it is sampled"
        name = target.task_id
        prompt = prompts.judge(question.text, question.answer, group.samples.texts[target.response])
        message = self._generate(
            name, JUDGE, for_template(prompt, self._when_writing), 1, JUDGE_SAMPLING, -1
        )
        order = (window, _stage_order(group.kind))
        return Job(id=name, pool=TEACHER_POOL, order=order, cost=1, message=message)

    def _prepare(
        self, target: Target, candidate: Candidate, window: int, prompts: PromptSet
    ) -> Job:
        assert self._teacher is not None
        lines, tokens = self.compression_limits
        name, ask = (
            target.task_id,
            prompts.write_hint if target.stage == "write_hint" else prompts.compress,
        )
        prompt = for_template(
            ask(target.question.text, candidate.text, tokens, lines), self._when_writing
        )
        message = self._generate(
            name, target.stage, prompt, 1, self._teacher.compression_sampling, -1
        )
        return Job(
            id=name,
            pool=TEACHER_POOL,
            order=(window, _stage_order(target.stage)),
            cost=1,
            message=message,
        )

    def _score(self, target: Target, composition: Composition, window: int) -> Job:
        assert self._teacher is not None and target.visit is not None
        name, samples = target.task_id, gathered(target.visit, composition)
        message = ScoreTask(
            task_id=name,
            prompt_ids=samples.prompt_ids,
            token_ids=samples.token_ids,
            offsets=samples.offsets,
            top_k=self._teacher.score_top_k,
            temperature=self._student.temperature or 1.0,
        )
        order = (window, _stage_order(target.stage))
        return Job(id=name, pool=TEACHER_POOL, order=order, cost=message.n, message=message)

    def _decoding(self, group: Group, model: ModelConfig) -> tuple[int, Sampling]:
        """(completions, sampling) of a group that `model` samples: G_T from a teacher, G_S from the
        student."""
        topology = self._topology
        if group.kind == EVALUATE:
            return topology.evaluation.samples, topology.evaluation.sampling or model.sampling
        size = (
            topology.method.teacher_group_size
            if group.kind == TEACHER
            else topology.method.group_size
        )
        return size, model.sampling

    def _generate(
        self, task_id: str, kind: str, prompt: Prompt, n: int, sampling: Sampling, min_version: int
    ) -> GenerateTask:
        seed = hashlib.blake2b(
            f"{self._topology.run.seed}/{task_id}".encode(), digest_size=7
        ).digest()
        return GenerateTask(
            task_id=task_id,
            kind=kind,
            prompt=prompt,
            n=n,
            sampling=sampling,
            seed=int.from_bytes(seed, "big"),
            min_version=min_version,
        )


def _stage_order(kind: str) -> int:
    return int(kind in EARLY_KINDS)
