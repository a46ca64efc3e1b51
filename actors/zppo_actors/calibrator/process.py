"""The process of a calibration: loads the engines and the trainer of one topology, one after
another, and prints what it measured as JSON.

Started as `python -m zppo_actors calibrate ORDER` (JSON, `zppo.capacity.measuring`). Standard
output carries the result and nothing else. It writes into a folder that its parent gives it and
takes away.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from pathlib import Path
from statistics import fmean

import msgspec
import torch

from zppo.capacity.engine_curve import engines_of
from zppo.capacity.laws import accuracy_law, lengths_law, trainer_speed
from zppo.capacity.measuring import AT, MeasuredHere, Order
from zppo.capacity.settings import speed_settings
from zppo.config.served import ServedModel, served_student
from zppo.data.corpus import load_questions
from zppo.errors import UserError
from zppo.grading import quick_grade
from zppo.plan.processes import asked_teachers
from zppo.prompting.prompts import PromptSet
from zppo.simulation import (
    Accuracies,
    Calibration,
    Engines,
    Graders,
    Lengths,
    Speeds,
    TrainerSpeed,
)
from zppo.training.state import build_trainer
from zppo.training.trainer import Trainer
from zppo_actors import engines
from zppo_actors.calibrator.load import Answered, Loader
from zppo_actors.calibrator.training import Windows, trained
from zppo_actors.engines import Engine, EngineSpec
from zppo_actors.process import private_stdout
from zppo_actors.weights import NotFinite, shared_memory
from zppo_protocol.samples import GroupSamples
from zppo_protocol.values import PolicyManifest

MEASURED_SHARE = 0.7
"""Part of the time that is left after the first load which is measured in; the rest is for loading
what follows."""
QUESTIONS = 4096


def main(arguments: list[str]) -> int:
    """Carry out one order; returns the exit code. Raises UserError."""
    order = msgspec.json.decode(arguments[0], type=Order)
    logging.getLogger("zppo").setLevel(logging.ERROR)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    with private_stdout() as stdout:
        found = asyncio.run(Calibrator(order).measure())
        stdout.write(msgspec.json.encode(found).decode())
    return 0


class Calibrator:
    def __init__(self, order: Order) -> None:
        self._order, self._topology = order, order.topology
        self._end = time.perf_counter() + order.seconds
        data = self._topology.data
        corpus = load_questions(data.train, data, Path.cwd(), unpack=True)
        self._questions = corpus.questions[:QUESTIONS]
        self._prompts = PromptSet.of(data, self._topology.method.prefix_share)
        self._notes: list[str] = []
        self._parts = 2 + len(asked_teachers(self._topology))
        """that are not measured yet"""

    async def measure(self) -> MeasuredHere:
        """Student, trainer, the student's loading of what it publishes, then the teachers."""
        student, method = served_student(self._topology), self._topology.method
        engine = await self._started(student)
        answered, loader = await self._loaded(engine, student, method.group_size)
        law, accuracies = self._law(answered), self._accuracies(answered)
        prompt_tokens = round(fmean(one.read_tokens for one in answered.samples)) or 1
        trainer, load_seconds = await self._trainer(engine, law, accuracies, prompt_tokens)
        await engine.close()
        rollout = self._engines(engine, loader, load_seconds)
        asked, laws, rights = list[Engines](), dict[str, Lengths](), list[float]()
        for served in asked_teachers(self._topology):
            engine = await self._started(served)
            found, loader = await self._loaded(engine, served, method.teacher_group_size)
            await engine.close()
            asked.append(self._engines(engine, loader, 0.0))
            laws.setdefault("teacher", self._law(found))
            rights += self._rights(found)
        if rights:
            accuracies = msgspec.structs.replace(accuracies, teacher=round(fmean(rights), 6))
        calibration = Calibration(
            settings=speed_settings(self._topology),
            speeds=Speeds(
                rollout=rollout,
                teachers=tuple(asked),
                trainer=trainer,
                grader=self._grader(answered),
            ),
            lengths=law,
            lengths_of=laws,
            accuracies=accuracies,
            prompt_tokens=prompt_tokens,
        )
        return MeasuredHere(calibration=calibration, notes=self._notes)

    # ---- engines ---------------------------------------------------------------------------------

    async def _started(self, served: ServedModel) -> Engine:
        _at(f"loading {served.section}")
        torch.set_num_threads(self._order.threads[served.pool])
        return engines.create(EngineSpec(served=served, device=served.device(0)))

    async def _loaded(
        self, engine: Engine, served: ServedModel, group_size: int
    ) -> tuple[Answered, Loader]:
        _at(f"sampling from {served.section}")
        loader = Loader(engine, self._questions, self._prompts, group_size)
        student = self._topology.student.sampling
        sampling = student.as_asked if served.role == "rollout" else served.model.sampling
        answered = await loader.run(sampling, self._share())
        if answered.cut_off:
            longest = max(n for group in answered.lengths for n in group)
            self._notes.append(
                f"some responses of {served.section} were longer than the {longest} tokens that "
                "there was time for; give --calibrate more with --within, or read lengths off a "
                "run with --from-run"
            )
        return answered, loader

    @staticmethod
    def _engines(engine: Engine, loader: Loader, load_seconds: float) -> Engines:
        found = engines_of([loader.record], engine.capacity, load_seconds)
        assert found is not None, "every job of a loader has lengths"
        return found

    # ---- trainer ---------------------------------------------------------------------------------

    async def _trainer(
        self, engine: Engine, law: Lengths, accuracies: Accuracies, prompt_tokens: int
    ) -> tuple[TrainerSpeed, float]:
        """The trainer, and how long the student's engine took to load what it published."""
        _at("loading the trainer")
        torch.set_num_threads(self._order.threads["trainer"])
        trainer = build_trainer(self._topology, time.perf_counter)
        vocabulary = trainer.reach.vocabulary
        windows = Windows(self._topology, law.values, prompt_tokens, accuracies, vocabulary)
        _at("training")
        tokens, seconds = trained(trainer, windows, self._order.groups, self._share())
        _at("publishing")
        times, loads, folder = list[float](), list[float](), Path(self._order.folder)
        for version in (1, 2):
            begin = time.perf_counter()
            manifest = published(trainer, version, folder)
            times.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            await engine.load_policy(manifest)
            loads.append(time.perf_counter() - begin)
        return trainer_speed(tokens, seconds, times[-1]), loads[-1]

    # ---- questions -------------------------------------------------------------------------------

    @staticmethod
    def _law(answered: Answered) -> Lengths:
        pairs = [
            (question.id, n)
            for question, lengths in zip(answered.questions, answered.lengths, strict=True)
            for n in lengths
        ]
        return lengths_law([question for question, _ in pairs], [n for _, n in pairs])

    def _accuracies(self, answered: Answered) -> Accuracies:
        """As the quick rules of the grader say; what they cannot decide is left out."""
        graded = [rights for rights in self._graded(answered) if rights]
        if not graded:
            return Accuracies()
        return accuracy_law([sum(rights) for rights in graded], [len(r) for r in graded])

    def _rights(self, answered: Answered) -> list[float]:
        return [float(right) for rights in self._graded(answered) for right in rights]

    def _graded(self, answered: Answered) -> list[list[bool]]:
        if self._topology.data.reward:
            return []
        return [
            _right(question.answer, question.grader or self._topology.data.grader, samples)
            for question, samples in zip(answered.questions, answered.samples, strict=True)
        ]

    def _grader(self, answered: Answered) -> Graders:
        begin = time.perf_counter()
        self._graded(answered)
        seconds = (time.perf_counter() - begin) / max(1, len(answered.samples))
        return Graders(seconds=round(seconds, 6))

    def _share(self) -> float:
        """Seconds for the next part that is measured."""
        left = max(0.0, self._end - time.perf_counter()) * MEASURED_SHARE
        self._parts -= 1
        return left / (self._parts + 1)


def published(trainer: Trainer, version: int, folder: Path) -> PolicyManifest:
    """Raises UserError if training has left weights that are not finite."""
    try:
        return shared_memory.publish(trainer.policy.model.state_dict(), version, folder)
    except NotFinite as error:
        raise UserError(f"--calibrate: {trainer.optimizer.overflow(error)}") from error


def _right(gold: str, grader: str, samples: GroupSamples) -> list[bool]:
    grades = [quick_grade(text, gold, grader) for text in samples.texts]
    return [grade.reward >= 1.0 for grade in grades if grade is not None]


def _at(what: str) -> None:
    """Say what is being done, for the sentence of a calibration that does not come to an end."""
    print(f"{AT}{what}", file=sys.stderr, flush=True)
