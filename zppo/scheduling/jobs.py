"""From what a window needs to the job that a worker can do: pools, costs, prompts, sampling,
seeds."""

from __future__ import annotations

from collections.abc import Callable

from zppo.algorithm.composition import asked_media, gathered
from zppo.algorithm.window import EVALUATE, TEACHER, WRITE_HINT, Group
from zppo.config.rewards import REWARD, REWARD_AND_TEACHER, RUBRIC, rule_of
from zppo.config.served import teacher_pool, teachers
from zppo.config.topology import JUDGE, JUDGE_SAMPLING, ModelConfig, Topology
from zppo.data.question import Question
from zppo.prompting.chat_template import for_template, when_writing
from zppo.prompting.prompts import PromptSet
from zppo.scheduling.dispatch import Job
from zppo.scheduling.targets import (
    GradeTarget,
    JudgeTarget,
    PrepareTarget,
    SampleTarget,
    ScoreTarget,
    Target,
)
from zppo_protocol.messages import GenerateTask, GradeTask, ScoreTask
from zppo_protocol.values import FROZEN, Prompt, Sampling, seed_of

ROLLOUT_POOL, TEACHER_POOL, GRADER_POOL = "rollout", teacher_pool(0), "grader"


class JobFactory:
    """Turns targets into jobs, by the settings of the topology. `redrawn` says how often the
    samples of a window have been thrown away."""

    def __init__(self, topology: Topology, redrawn: Callable[[int], int] = lambda _: 0) -> None:
        self._topology = topology
        self._redrawn = redrawn
        self._student = topology.student.sampling
        self._in_training = self._student.in_training
        self._teacher = topology.teacher
        self._rubric = next(
            (one.args["rubric"] for one in topology.data.reward if one.use == RUBRIC), None
        )
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
        """The job for a target, under its id and in its order; a policy that samples for it has at
        least `min_version`."""
        match target:
            case SampleTarget():
                return self._sample(target, min_version)
            case GradeTarget():
                return self._grade(target)
            case JudgeTarget():
                return self._judge(target, prompts)
            case PrepareTarget():
                return self._prepare(target, prompts)
            case ScoreTarget():
                return self._score(target)

    def _sample(self, target: SampleTarget, min_version: int) -> Job:
        group = target.group
        teacher = group.kind == TEACHER
        model = teachers(self._topology)[group.teacher].model if teacher else self._topology.student
        n, sampling = self._decoding(group, model)
        prompt = for_template(group.prompt, model.chat_template_kwargs)
        message = self._generate(
            target.task_id,
            group.kind,
            prompt,
            n,
            sampling,
            min_version=FROZEN if teacher else min_version,
            with_support=self._student.truncates and not teacher and group.kind != EVALUATE,
        )
        pool = teacher_pool(group.teacher) if teacher else ROLLOUT_POOL
        return _job(target, pool, n, message)

    def _grade(self, target: GradeTarget) -> Job:
        message = GradeTask(
            task_id=target.task_id,
            gold=target.question.answer,
            responses=target.group.the_samples.texts,
            grader=target.question.grader,
            **self._for_rewards(target.question),
        )
        return _job(target, GRADER_POOL, 1, message)

    def _for_rewards(self, question: Question) -> dict[str, str]:
        """What only rewards read, and no grader."""
        if rule_of(question.grader)[0] not in (REWARD, REWARD_AND_TEACHER):
            return {}
        return {"question": question.words, "row": question.row}

    def _judge(self, target: JudgeTarget, prompts: PromptSet) -> Job:
        question, response = target.question, target.group.the_samples.texts[target.response]
        if self._rubric is None:
            prompt = prompts.judge(question, response)
        else:
            prompt = prompts.rubric(question, response, self._rubric)
        return self._ask_teacher(target, JUDGE, prompt, JUDGE_SAMPLING)

    def _prepare(self, target: PrepareTarget, prompts: PromptSet) -> Job:
        assert self._teacher is not None
        lines, tokens = self.compression_limits
        write = prompts.write_hint if target.preparation == WRITE_HINT else prompts.compress
        prompt = write(target.place.visit.question, target.candidate.text, tokens, lines)
        return self._ask_teacher(
            target, target.preparation, prompt, self._teacher.compression_sampling
        )

    def _ask_teacher(
        self, target: JudgeTarget | PrepareTarget, kind: str, prompt: Prompt, sampling: Sampling
    ) -> Job:
        """One reply of the first teacher about one response."""
        prompt = for_template(prompt, self._when_writing)
        message = self._generate(target.task_id, kind, prompt, 1, sampling)
        return _job(target, TEACHER_POOL, 1, message)

    def _score(self, target: ScoreTarget) -> Job:
        assert self._teacher is not None
        samples = gathered(target.place.visit, target.composition)
        message = ScoreTask(
            task_id=target.task_id,
            prompt_ids=samples.prompt_ids,
            token_ids=samples.token_ids,
            offsets=samples.offsets,
            top_k=self._teacher.score_top_k,
            temperature=self._student.temperature or 1.0,
            media=asked_media(target.place.visit, target.composition),
            media_tokens=samples.media_tokens,
        )
        return _job(target, TEACHER_POOL, message.n, message)

    def _decoding(self, group: Group, model: ModelConfig) -> tuple[int, Sampling]:
        """(completions, sampling) of a group that `model` samples: G_T from a teacher, G_S from the
        student."""
        topology = self._topology
        if group.kind == EVALUATE:
            return topology.evaluation.samples, (
                topology.evaluation.sampling or self._student.as_asked
            )
        if group.kind == TEACHER:
            return topology.method.teacher_group_size, model.sampling
        return topology.method.group_size, self._in_training

    def _generate(
        self,
        task_id: str,
        kind: str,
        prompt: Prompt,
        n: int,
        sampling: Sampling,
        *,
        min_version: int = FROZEN,
        with_support: bool = False,
    ) -> GenerateTask:
        return GenerateTask(
            task_id=task_id,
            kind=kind,
            prompt=prompt,
            n=n,
            sampling=sampling,
            seed=seed_of(self._topology.run.seed, self._drawn(task_id, kind)),
            min_version=min_version,
            with_support=with_support,
        )

    def _drawn(self, task_id: str, kind: str) -> str:
        """Where the seed of a task is used; a window that is drawn again is another place."""
        window, _, _ = task_id.partition("/")
        again = 0 if kind == EVALUATE else self._redrawn(int(window))
        return f"{task_id}/redraw-{again}" if again else task_id


def _job(
    target: Target, pool: str, cost: int, message: GenerateTask | GradeTask | ScoreTask
) -> Job:
    min_version = message.min_version if isinstance(message, GenerateTask) else FROZEN
    return Job(
        id=target.task_id,
        pool=pool,
        order=target.order,
        cost=cost,
        message=message,
        min_version=min_version,
    )
