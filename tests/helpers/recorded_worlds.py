"""A simulated world that leaves what a real run leaves: a timeline, `metrics.jsonl` and rollouts,
of speeds and questions that are known."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec
import pyarrow
from pyarrow import parquet

from zppo.algorithm.window import TEACHER
from zppo.config.topology import Topology
from zppo.records.rollouts import step_path
from zppo.records.run_directory import create
from zppo.records.timeline import MICRO, TIMELINE, Life, Room, Span, encoded
from zppo.scheduling.dispatch import Job
from zppo.simulation import World
from zppo.simulation.machines import Engine, Held
from zppo.simulation.simulate import Simulation
from zppo_protocol.messages import GenerateTask, GradeTask, TrainWindow

SPANS = {"teacher": "draw", "compress": "compress", "evaluate": "evaluate"}


class Recording(Simulation):
    """A simulation that takes notes."""

    def __init__(self, world: World, steps: int, seed: int = 0) -> None:
        self.spans: dict[str, list[Span]] = defaultdict(list)
        self.rows: dict[int, list[dict[str, Any]]] = defaultdict(list)
        self.lines: list[dict[str, Any]] = []
        self._began: dict[str, float] = {}
        self._seen: set[str] = set()
        self._written = 0
        super().__init__(world, steps, seed)

    def write(self, folder: Path, topology: Topology) -> Path:
        """The directory of the run that has been simulated."""
        create(folder, topology)
        (folder / TIMELINE).mkdir(exist_ok=True)
        for actor, spans in self.spans.items():
            life = Life("run", actor, 0, 1, "boot", 0.0, 1.0e9)
            engine = self.engines.get(actor)
            room = [Room(engine.speeds.slots)] if engine is not None else []
            lines = encoded([life, *room, *sorted(spans, key=lambda span: span.end)])
            (folder / TIMELINE / f"{actor}.jsonl").write_bytes(lines)
        lines = b"".join(msgspec.json.encode(line) + b"\n" for line in self.lines)
        (folder / "metrics.jsonl").write_bytes(lines)
        for step, rows in self.rows.items():
            table = pyarrow.Table.from_pylist(rows)
            parquet.write_table(table, step_path(folder / "rollouts", step))
        return folder

    def _note(self, actor: str, kind: str, begin: float, end: float, **more: Any) -> None:
        low, high = round(begin * MICRO), round(end * MICRO)
        self.spans[actor].append(Span(kind, low, high, busy=high - low, **more))

    def _assigned(self, worker: str, job: Job) -> None:
        self._began[job.id] = self.now
        if isinstance(job.message, GradeTask):
            end = self.now + self.world.speeds.grader.seconds
            self._note(worker, "grade", self.now, end)
        super()._assigned(worker, job)

    def _answered(self, engine: Engine, held: Held) -> None:
        task = held.job.message
        assert isinstance(task, GenerateTask)
        kind = SPANS.get(task.kind, "sample")
        begin = self._began[held.job.id]
        self._note(engine.name, kind, begin, self.now, what=task.task_id, size=task.n)
        if kind == "compress":
            self._written += sum(held.lengths)
        elif kind != "evaluate":
            self._store(task, held.lengths)
        super()._answered(engine, held)

    def _store(self, task: GenerateTask, lengths: list[int]) -> None:
        window, question, _ = task.task_id.split("/")
        origin = "replay" if question in self._seen else "new"
        if task.kind == "plain":
            self._seen.add(question)
        rewards = self.chance.rewards(task.task_id, task.n)
        for index, (length, reward) in enumerate(zip(lengths, rewards, strict=True)):
            self.rows[int(window)].append(
                {
                    "rollout": index,
                    "question_id": question,
                    "origin": origin,
                    "group_id": task.task_id,
                    "kind": TEACHER if task.kind.startswith(TEACHER) else task.kind,
                    "length": length,
                    "prompt_length": self.world.prompt_tokens,
                    "correct": reward >= 1.0,
                }
            )

    def _train(self, window: TrainWindow) -> None:
        self._began["train"] = self.now
        super()._train(window)

    def _trained(self, window: TrainWindow, seconds: float, waited: float, lead: int) -> None:
        begin = self._began["train"]
        if waited > 0.0:
            self._note("trainer", "wait", begin - waited, begin, step=window.step)
        self._note("trainer", "train", begin, begin + seconds, step=window.step)
        self._note("trainer", "publish", begin + seconds, self.now, step=window.step + 1)
        self._note("trainer", "wait", self.now, self.now, step=window.step + 1)
        super()._trained(window, seconds, waited, lead)
        step = self.steps[-1]
        self.lines.append(
            {
                "step": step.step,
                "time/step": step.seconds,
                "compute/trained": step.tokens + step.prompts,
                "compute/teacher_other_written": self._written,
            }
        )
        self._written = 0

    def _load(self, engine: Engine) -> None:
        end = self.now + engine.speeds.load_seconds
        self._note(engine.name, "load", self.now, end, step=self._published)
        super()._load(engine)
