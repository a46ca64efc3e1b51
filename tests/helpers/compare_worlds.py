"""Made-up comparisons for the tests: small run directories, written by the project's own
writers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from zppo.algorithm.methods import get_method
from zppo.algorithm.steps import Fate
from zppo.comparison.record import Pair, Record, neutral, of_pair, run_folder, write_record
from zppo.config.method import MethodConfig
from zppo.config.sinks import SinksConfig
from zppo.config.topology import (
    DataConfig,
    RunConfig,
    SchedulerConfig,
    StudentConfig,
    Topology,
)
from zppo.records import checkpoint, run_directory
from zppo.records.flops import Sizes
from zppo.scheduling.heldout import EvaluationResult
from zppo_actors.controller.journal import Journal
from zppo_actors.controller.sinks import MetricSinks

SIZES = Sizes(student=100, teacher=1000)
QUESTIONS = 40
ENTRIES = (0.0, 0.125, 0.25, 0.375)


def topology(steps: int = 10) -> Topology:
    return Topology(
        data=DataConfig(train="train.jsonl", heldout="heldout.jsonl"),
        student=StudentConfig(model="student"),
        run=RunConfig(steps=steps),
        method=MethodConfig(name="grpo"),
        scheduler=SchedulerConfig(new_questions=16, rho_replay=0.5, buffer_capacity=60),
        sinks=SinksConfig(tensorboard=False, rollouts=False),
    )


def record(
    methods: Sequence[str], seeds: Sequence[int], steps: int = 10, **others: object
) -> Record:
    return Record(
        source="world.yaml",
        overrides=[],
        topology=neutral(topology(steps)),
        corpus="corpus",
        steps=steps,
        sizes=SIZES,
        methods=list(methods),
        seeds=list(seeds),
        baseline=methods[0],
        **others,  # type: ignore[arg-type]
    )


class MadeUpRun:
    """One run in `out`. `gain` is what each step adds to held-out accuracy, which begins at 0.3."""

    def __init__(self, out: Path, pair: Pair, gain: float = 0.02, steps: int = 10) -> None:
        self.directory, self.pair, self.gain, self.total = run_folder(out, pair), pair, gain, steps
        self.rng = random.Random(f"{pair.name}")
        self.method = get_method(pair.method)
        shared = of_pair(topology(steps), pair, out)
        run_directory.create(self.directory, shared)
        self.seconds, self.size, self.names = 0.0, 0, 0
        self.sinks = MetricSinks(self.directory, shared.sinks, clock=lambda: self.seconds)

    def write(
        self, steps: int | None = None, verdict: str | None = None, every: int = 5
    ) -> MadeUpRun:
        """`steps` trained steps, all of them unless fewer are given, an evaluation each `every`,
        and a last word."""
        steps = self.total if steps is None else steps
        self.evaluate(0)
        for step in range(steps):
            self.step(step)
            if (step + 1) % every == 0 or step + 1 == self.total:
                self.evaluate(step + 1)
        self.sinks.close()
        journal = Journal(self.directory)
        for step in range(steps):
            journal.record_trained(step, [(step, f"{step}/q", "q", "bcq", "replay")], [step])
        done = f"finished: {steps} of {self.total} steps" if steps == self.total else "interrupted"
        journal.record_event(1.0, "controller", "run_ended", verdict or done)
        journal.close()
        return self

    def checkpoint(self, step: int) -> None:
        checkpoint.write_file(checkpoint.begin(self.directory, step) / "weights", b"1234")
        checkpoint.commit(self.directory, step)

    def evaluate(self, step: int) -> None:
        accuracy = 0.3 + self.gain * step + 0.002 * self.pair.seed
        right = round(accuracy * QUESTIONS)
        self.sinks.write_heldout(
            EvaluationResult(
                step=step,
                newest_version=step,
                accuracy=accuracy,
                low=accuracy - 0.05,
                high=accuracy + 0.05,
                questions=QUESTIONS,
                samples=QUESTIONS,
                by_question={f"q{i}": float(i < right) for i in range(QUESTIONS)},
            )
        )

    def step(self, step: int) -> None:
        self.seconds += 60.0
        teaches = self.method.teacher_draws != "none"
        kinds = {r.kind: 4 for r in self.method.reformulations}
        groups = 16 + (8 if self.method.replay and step > 1 else 0) + sum(kinds.values())
        written, read = 100 * groups, 10 * groups
        fates = self.fates(step) if self.method.replay else []
        self.size += sum(
            {"admitted": 1, "graduated": -1, "evicted": -1}[fate.fate] for fate in fates
        )
        scored = self.method.needs_scores
        line = {
            "accuracy/new": 0.3 + self.gain * step + 0.04 * self.rng.random(),
            "accuracy/plain": 0.3,
            "window/new": 16,
            "window/replayed": 8 if self.method.replay and step > 1 else 0,
            "window/hard": 10 - step % 3,
            "tokens/generated": written,
            "compute/student_read": read,
            "compute/student_written": written,
            "compute/teacher_draws_read": 50 if teaches else 0,
            "compute/teacher_draws_written": 400 if teaches else 0,
            "compute/teacher_other_read": 300 if kinds else 0,
            "compute/teacher_other_written": 90 if kinds else 0,
            "compute/teacher_scored": read + written if scored else 0,
            "compute/proximal": 0 if scored else read + written,
            "compute/trained": read + written,
            "train/tokens_trained": written,
            "train/entropy": 0.8 * 0.97**step + 0.02 * self.rng.random(),
            "train/loss": 0.02 * self.rng.random() - 0.01,
            "buffer/size": self.size,
            **{f"window/{kind}": count for kind, count in kinds.items()},
            **{f"accuracy/{kind}": 0.1 + 0.001 * step + 0.05 * self.rng.random() for kind in kinds},
        }
        if not scored:
            line["train/positive_advantage_share"] = 0.2 + 0.05 * self.rng.random()
        if self.method.replay:
            line |= {f"buffer/by_entry_accuracy/{entry:g}": self.size // 4 for entry in ENTRIES}
        self.sinks.write(step, line)
        self.sinks.write_fate(step, fates)

    def fates(self, step: int) -> list[Fate]:
        """Four questions come in, one of each entry accuracy; the easier ones graduate,
        sometimes."""
        come = [self.fate("admitted", entry) for entry in ENTRIES]
        gone = [
            self.fate("graduated", entry)
            for entry in ENTRIES
            if step > 2 and self.rng.random() < entry + self.gain
        ]
        return [*come, *gone]

    def fate(self, fate: str, entry: float) -> Fate:
        self.names += 1
        return Fate(question_id=f"q{self.names}", fate=fate, entry_accuracy=entry, visits=1)  # type: ignore[arg-type]


def write_comparison(
    out: Path, methods: dict[str, float], seeds: Sequence[int], steps: int = 10, **others: object
) -> Record:
    """A whole comparison: every method with its gain a step, every run finished."""
    comparison = record(list(methods), seeds, steps, **others)
    out.mkdir(parents=True)
    for pair in comparison.pairs():
        MadeUpRun(out, pair, methods[pair.method], steps).write()
    write_record(out, comparison)
    return comparison
