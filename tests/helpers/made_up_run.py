"""A run made up in memory and written through the real sinks, buffer and journal: what the report
tests read, and what is measured of large runs.

The pupil answers products modulo 23; each question has a skill that grows with every visit, so that
questions are admitted, come back, graduate, and (the buffer being small) are evicted.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path

import numpy as np

from zppo.algorithm.composition import student_groups
from zppo.algorithm.methods import get_method
from zppo.algorithm.replay_buffer import ReplayBuffer
from zppo.algorithm.steps import Recipe, refresh_buffer
from zppo.algorithm.window import Candidate, Group, Reformulation, Visit, Window
from zppo.config.method import MethodConfig
from zppo.config.sinks import SinksConfig
from zppo.config.topology import (
    DataConfig,
    RunConfig,
    SchedulerConfig,
    StudentConfig,
    Topology,
)
from zppo.data.question import Question
from zppo.records.metrics import buffer_metrics, trainer_metrics, window_metrics
from zppo.records.run_directory import create
from zppo.scheduling.events import Trained
from zppo.scheduling.heldout import EvaluationResult
from zppo_actors.controller.journal import Journal
from zppo_actors.controller.sinks import MetricSinks
from zppo_protocol.samples import GroupSamples
from zppo_protocol.values import ChatMessage, Grade, Prompt

WALL_START = 1_780_000_000.0


def prompt(text: str) -> Prompt:
    return Prompt(messages=[ChatMessage(role="user", content=text)])


def make_samples(rng: random.Random, texts: list[str], version: int) -> GroupSamples:
    lengths = [len(text.split()) + 1 for text in texts]
    total, early = sum(lengths), rng.randrange(1, sum(lengths))
    spans = (
        [[early, max(version - 1, 0)], [total - early, version]] if version >= 0 else [[total, 0]]
    )
    return GroupSamples(
        prompt_ids=np.arange(6, dtype=np.int32),
        token_ids=np.ones(total, np.int32),
        log_probs=np.full(total, -0.7, np.float32),
        offsets=np.cumsum([0, *lengths]).astype(np.int32),
        version_spans=np.array(spans, np.int32),
        texts=texts,
        finish_reasons=[rng.choice(["stop"] * 15 + ["length"]) for _ in texts],
    )


def make_group(
    rng: random.Random,
    name: str,
    kind: str,
    text: str,
    gold: int,
    chance: float,
    n: int,
    version: int,
) -> Group:
    answers = [
        gold if rng.random() < chance else (gold + rng.choice([2, 7])) % 23 for _ in range(n)
    ]
    texts = [
        f"{text.split()[0]} * 3 = {rng.randrange(23)} ; \\boxed{{ {answer} }}" for answer in answers
    ]
    grades = [Grade(reward=float(answer == gold), answer=str(answer)) for answer in answers]
    samples = make_samples(rng, texts, version)
    return Group(
        id=name,
        kind=kind,
        prompt=prompt(f"{text} ?\nanswer in \\boxed{{ }}"),
        samples=samples,
        grades=grades,
    )


def make_question(rng: random.Random, index: int) -> Question:
    factors = [rng.randrange(2, 23) for _ in range(3)]
    text = " * ".join(map(str, factors)) + " mod 23"
    return Question(id=f"q-{index:04d}", text=text, answer=str(math.prod(factors) % 23))


def candidates_of(group: Group, source: str, indices: list[int]) -> list[Candidate]:
    assert group.samples is not None and group.grades is not None
    return [
        Candidate(
            source=source,  # type: ignore[arg-type]
            index=i,
            text=group.samples.texts[i],
            answer=group.grades[i].answer,
            correct=group.grades[i].reward >= 1.0,
            shown=group.samples.texts[i],
        )
        for i in indices
    ]


def reformulate(rng: random.Random, visit: Visit, name: str, version: int) -> None:
    """Give a hard visit its teacher group and its BCQ and NCQ groups."""
    gold = int(visit.question.answer)
    visit.teacher = make_group(
        rng, f"{name}/teacher", "teacher", visit.question.text, gold, 0.9, 4, -1
    )
    wrong = visit.plain.indices(correct=False)
    right = visit.teacher.indices(correct=True)
    shown = {
        "bcq": candidates_of(visit.teacher, "teacher", right[:1])
        + candidates_of(visit.plain, "student", wrong[:1])
    }
    shown["ncq"] = candidates_of(visit.plain, "student", wrong)
    for kind, chance in (("bcq", 0.5), ("ncq", 0.06)):
        group = make_group(
            rng, f"{name}/{kind}", kind, visit.question.text, gold, chance, 8, version
        )
        body = "\n".join(f"<candidate> {c.shown} </candidate>" for c in shown[kind])
        group.prompt = prompt(f"{visit.question.text} ?\n{body}\nanswer in \\boxed{{ }}")
        visit.reformulations.append(Reformulation(kind=kind, candidates=shown[kind], group=group))


def make_window(
    rng: random.Random,
    index: int,
    drawn: list[tuple[Question, str]],
    skill: dict[str, float],
    hard_ones: int = 4,
) -> Window:
    version = max(index - rng.randrange(2), 0)
    window = Window(index=index, visits=[], phase="composed")
    for question, origin in drawn:
        chance = skill.setdefault(question.id, 0.01 if rng.random() < 0.55 else rng.random())
        skill[question.id] = min(1.0, chance + 0.2)
        name = f"{index}/{question.id}"
        plain = make_group(
            rng, f"{name}/plain", "plain", question.text, int(question.answer), chance, 8, version
        )
        visit = Visit(question=question, origin=origin, plain=plain)  # type: ignore[arg-type]
        window.visits.append(visit)
    hard = sorted(
        (visit for visit in window.visits if visit.accuracy < 0.5), key=lambda visit: visit.accuracy
    )
    window.hard_questions = len(hard)
    for visit in hard[:hard_ones]:
        reformulate(rng, visit, f"{index}/{visit.question.id}", version)
    return window


def trainer_numbers(rng: random.Random, step: int) -> dict[str, float]:
    return {
        "loss": 0.02 * rng.random() - 0.01,
        "entropy": 0.9 * 0.98**step,
        "positive_advantage_share": 0.2 + 0.1 * rng.random(),
        "grad_norm": 0.5 + 0.1 * rng.random(),
        "approximate_kl": 0.002 * rng.random(),
        "mismatch_kl": 0.0005 * rng.random(),
    }


def fake_topology(method: str = "zppo", **sections: object) -> Topology:
    return Topology(
        data=DataConfig(train="train.jsonl"),
        student=StudentConfig(model="student"),
        run=RunConfig(name="made-up"),
        method=MethodConfig(name=method),
        scheduler=SchedulerConfig(
            new_questions=16, rho_replay=0.5, buffer_capacity=100, max_staleness=2
        ),
        **sections,  # type: ignore[arg-type]
    )


class FakeRun:
    """Writes `steps` trained windows into `run_dir` as the controller would. `new`, `replayed` and
    `hard` are questions of a window: `hard` ones of it, at most, are reformulated."""

    new, replayed, hard = 16, 8, 4

    def __init__(self, run_dir: Path, method: str = "zppo", seed: int = 0) -> None:
        self.run_dir, self.rng = run_dir, random.Random(seed)
        self.topology = fake_topology(method, sinks=SinksConfig(tensorboard=False))
        create(run_dir, self.topology)
        self.recipe = Recipe.of(self.topology, get_method(method))
        self.buffer = ReplayBuffer(self.topology.scheduler.buffer_capacity)
        self.skill: dict[str, float] = {}
        self.seconds = 0.0

    def write(self, steps: int) -> Path:
        sinks = MetricSinks(self.run_dir, self.topology.sinks, clock=lambda: self.seconds)
        journal = Journal(self.run_dir)
        self.evaluate(sinks, 0, 0.38)
        for step in range(steps):
            self.seconds += 0.6 + 0.1 * self.rng.random()
            self.step(step, sinks, journal)
        if steps:
            self.evaluate(sinks, steps, 0.47)
            journal.record_event(WALL_START + self.seconds, "controller", "run_ended", "finished")
        sinks.close()
        journal.close()
        return self.run_dir

    def evaluate(self, sinks: MetricSinks, step: int, accuracy: float) -> None:
        low, high = accuracy - 0.03, accuracy + 0.03
        sinks.write_heldout(
            EvaluationResult(
                step=step,
                newest_version=step,
                accuracy=accuracy,
                low=low,
                high=high,
                questions=200,
                samples=800,
            )
        )

    def step(self, step: int, sinks: MetricSinks, journal: Journal) -> None:
        self.record(self.window(step), sinks, journal)

    def window(self, step: int) -> Window:
        """The window of a step, trained."""
        new = [make_question(self.rng, step * self.new + i) for i in range(self.new)]
        drawing = self.recipe.method.replay
        replayed = self.buffer.draw(self.replayed, self.rng) if drawing else []
        drawn = [(question, "new") for question in new]
        drawn += [(question, "replay") for question in replayed]
        window = make_window(self.rng, step, drawn, self.skill, self.hard)
        if not self.recipe.method.reformulations:
            for visit in window.visits:
                visit.teacher, visit.reformulations = None, []
        return window

    def record(self, window: Window, sinks: MetricSinks, journal: Journal) -> None:
        """All that is written of a step."""
        step = window.index
        with journal.together():
            for visit in window.visits:
                if visit.origin == "new":
                    journal.record_dispatched(visit.question.id, step)
        fates = refresh_buffer(self.buffer, window, self.recipe)
        rows = [
            (window.index, g.id, v.question.id, g.kind, v.origin)
            for v in window.visits
            for g in v.student_groups()
        ]
        journal.record_trained(step, rows, [window.index])
        entries = Counter(entry.entry_accuracy for entry in self.buffer.entries())
        waits = {
            "time/trainer_wait": 0.1 * self.rng.random(),
            "time/rollout_idle": 0.2 * self.rng.random(),
        }
        sinks.write(
            step,
            {
                **window_metrics(window, step),
                **buffer_metrics(len(self.buffer), self.buffer.capacity, entries, fates),
                **trainer_metrics(trainer_numbers(self.rng, step)),
                **waits,
            },
        )
        sinks.write_fate(step, fates)
        composed = [(v, group) for v in window.visits for group in student_groups(v, self.rng)]
        trained = Trained(window=window, composed=composed, tokens=0, fates=fates, settled=[step])
        sinks.write_rollouts(step, trained)
