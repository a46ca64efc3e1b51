"""Groups per second of processor time in the controller: the real one, without sockets.

    python benches/controller.py [--steps 8] [--questions 384] [--tokens 1024] [--method grpo]
    [--single-credits] [--profile FILE]

The controller gets frames and makes frames as it would for its socket, scheduler, journal, metrics
and all; engines, graders and the trainer are scripted, and what their scripts take is not counted.
A group is sampled in one answer of `--group` responses of `--tokens` tokens, graded, and trained.
Once the rollout store is off and once it writes, on its thread, whose time counts; that pyarrow is
imported, once in a run, does not. Times are processor times of all threads.

Every turn the engines answer all that they have. The credits of a turn come in one message an
engine; with `--single-credits` they come one by one, as from sequences that end far apart.
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import json
import logging
import sys
import tempfile
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow.parquet  # noqa: F401  (not at the first file that is written)
from safetensors.numpy import save_file

from zppo.config.options import positive
from zppo.config.topology import Topology
from zppo.errors import Parser, run_command
from zppo.plan.processes import cores, processes
from zppo.records import checkpoint, run_directory
from zppo_actors.controller.collector import collect_less
from zppo_actors.controller.controller import Controller
from zppo_actors.process import ActorContext
from zppo_protocol import messages
from zppo_protocol.codec import decode, encode
from zppo_protocol.limits import Limits
from zppo_protocol.messages import AnyMessage
from zppo_protocol.samples import GroupSamples
from zppo_protocol.values import FROZEN, Grade, PolicyManifest

COUNTS = {"rollout": 4, "teacher": 2, "grader": 2}
CAPACITIES = {"rollout": 256, "teacher": 256, "grader": 64, "trainer": 1}
VOCABULARY = 150_000
FACTS = {
    "num_attention_heads": 4, "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": VOCABULARY,
    "num_key_value_heads": 4, "max_position_embeddings": 65_536, "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
}  # fmt: skip


class Wire:
    """In the place of the router: frames in, frames out."""

    def __init__(self) -> None:
        self.limits = Limits()
        self.inbox: deque[tuple[str, list[bytes]]] = deque()
        self.sent: list[tuple[str, list[bytes]]] = []
        self.received: Counter[str] = Counter()
        self.roles: dict[str, str] = {}
        self.renewed: set[str] = set()
        self.refused, self.refusal = 0, ""

    def receive(self, timeout_s: float) -> tuple[str, AnyMessage] | None:
        if not self.inbox:
            time.sleep(0.001 * (timeout_s > 0.0))  # lets the thread of files work
            return None
        peer, frames = self.inbox.popleft()
        message = decode(frames, self.limits)
        self.received[type(message).__name__] += 1
        return peer, message

    def send(self, peer: str, message: AnyMessage) -> bool:
        self.sent.append((peer, encode(message, self.limits)))
        return True


class Script:
    """The other processes of the run: they greet, and answer all that was sent."""

    def __init__(self, wire: Wire, run_dir: Path, tokens: int, single_credits: bool) -> None:
        self._wire, self._run_dir, self._tokens = wire, run_dir, tokens
        self._single = single_credits
        self._drawn: dict[tuple[int, int], GroupSamples] = {}
        self.seconds, self.groups = 0.0, 0

    def greet(self, settings: Topology) -> None:
        self._greet("supervisor", "supervisor", 0)
        for entry in processes(settings, cores()):
            if entry.role in CAPACITIES:
                self._greet(entry.name, entry.role, CAPACITIES[entry.role])
            if entry.role in ("teacher", "grader", "trainer"):  # engines open with a policy
                self._say(entry.name, messages.Credits(count=CAPACITIES[entry.role]))
        self._say("trainer", messages.PolicyPublished(manifest=manifest(0)))

    def _greet(self, name: str, role: Any, capacity: int) -> None:
        hello = {"actor": name, "role": role, "capacity": capacity, "incarnation": 0, "pid": 1}
        version = messages.PROTOCOL_VERSION
        self._say(name, messages.Hello(protocol_version=version, run_id="bench", **hello))

    def work(self) -> None:
        """Answer everything that was sent since the last call."""
        begin = time.thread_time()
        sent, self._wire.sent = self._wire.sent, []
        freed: Counter[str] = Counter()
        for name, frames in sent:
            self._answer(name, decode(frames), freed)
        for name, count in freed.items():
            for part in [1] * count if self._single else [count]:
                self._say(name, messages.Credits(count=part))
        self.seconds += time.thread_time() - begin

    def _answer(self, name: str, message: AnyMessage, freed: Counter[str]) -> None:
        match message:
            case messages.LoadPolicy():
                version = message.manifest.version
                digest = message.manifest.digest
                self._say(name, messages.PolicyLoaded(version, digest, seconds=0.0))
                freed[name] += CAPACITIES["rollout"] if version == 0 else 0
            case messages.GenerateTask():
                drawn = self._samples(message)
                self._say(name, messages.GenerateResult(message.task_id, drawn))
                freed[name] += message.n
            case messages.GradeTask():
                self.groups += 1
                grades = grades_of(message)
                self._say(name, messages.GradeResult(message.task_id, grades))
                freed[name] += 1
            case messages.TrainWindow():
                self._train(message)
            case messages.SaveCheckpoint():
                folder = checkpoint.begin(self._run_dir, message.step)
                checkpoint.write_file(folder / "share", b"weights")
                self._say(name, messages.CheckpointSaved(step=message.step))

    def _train(self, window: messages.TrainWindow) -> None:
        ids = [group.group_id for group in window.groups]
        done = {"step": window.step, "group_ids": ids, "metrics": {"loss": 0.5}, "seconds": 1.0}
        published = messages.PolicyPublished(manifest=manifest(window.step + 1))
        for message in (published, messages.StepTrained(**done), messages.Credits(count=1)):
            self._say("trainer", message)

    def _samples(self, task: messages.GenerateTask) -> GroupSamples:
        """Made up once for each policy version and number of responses."""
        key = (task.n, task.min_version)
        if key not in self._drawn:
            total, rng = task.n * self._tokens, np.random.default_rng(0)
            self._drawn[key] = GroupSamples(
                prompt_ids=rng.integers(0, VOCABULARY, 256, dtype=np.int32),
                token_ids=rng.integers(0, VOCABULARY, total, dtype=np.int32),
                log_probs=-rng.random(total, dtype=np.float32),
                offsets=np.arange(0, total + 1, self._tokens, dtype=np.int32),
                version_spans=np.array([[total, max(task.min_version, FROZEN)]], np.int32),
                texts=["abcd" * self._tokens] * task.n,
                finish_reasons=["stop"] * task.n,
            )
        return self._drawn[key]

    def _say(self, name: str, message: AnyMessage) -> None:
        self._wire.inbox.append((name, encode(message)))


def grades_of(task: messages.GradeTask) -> list[Grade]:
    """Each question has its own share of right responses, from none to all."""
    size = len(task.responses)
    right = zlib.crc32(task.task_id.encode()) % (size + 1)
    return [Grade(reward=float(i < right), answer="1") for i in range(size)]


def manifest(version: int) -> PolicyManifest:
    return PolicyManifest(version=version, path=f"/p{version}", tensors=[], digest=f"d{version}")


def settings_of(folder: Path, options: argparse.Namespace, rollouts: bool) -> Topology:
    """Writes the corpus and a student's folder, of which only facts are read."""
    rows = range(options.steps * options.questions)
    train, student = folder / "train.jsonl", folder / "student"
    train.write_text(
        "".join(json.dumps({"id": f"q{i}", "question": f"What is {i} + 1?", "answer": str(i + 1)})
                + "\n" for i in rows)
    )  # fmt: skip
    student.mkdir()
    (student / "config.json").write_text(json.dumps(FACTS))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (student / name).write_text('{"eos_token": "<end>"}')
    save_file({"weight": np.zeros((2, 2), np.float32)}, student / "model.safetensors")
    sampling = {"max_new_tokens": options.tokens}
    scripted = {"engine": "simulated"}
    raw = {
        "data": {"train": str(train)},
        "student": {"model": str(student), "sampling": sampling},
        "teacher": {"model": str(student), "sampling": sampling, "compression": "rule"},
        "method": {"name": options.method, "group_size": options.group},
        "scheduler": {"new_questions": options.questions, "max_staleness": 2},
        "actors": {
            "rollout": {"count": COUNTS["rollout"], **scripted},
            "teacher": {"count": COUNTS["teacher"], **scripted},
            "grader": {"count": COUNTS["grader"]},
        },
        "checkpoints": {"every": 1_000_000},
        "sinks": {"tensorboard": False, "rollouts": rollouts},
    }
    return msgspec.convert(raw, Topology)


class Found(NamedTuple):
    """Seconds of the controller alone for a group, those of the end of each step, of these in the
    scheduler, and the messages that it got, by type."""

    per_group: float
    step_ends: list[float]
    scheduled: list[float]
    received: Counter[str]


def seconds_per_group(options: argparse.Namespace, rollouts: bool) -> Found:
    with tempfile.TemporaryDirectory(prefix="zp-") as name:
        folder = Path(name)
        settings = settings_of(folder, options, rollouts)
        run_directory.create(folder / "run", settings)
        context = ActorContext(
            run_dir=folder / "run", runtime=folder, actor="controller", role="controller",
            incarnation=0, topology=settings, run_id="bench", start_version=0,
        )  # fmt: skip
        wire = Wire()
        table = processes(settings, cores())
        wire.roles = {entry.name: entry.role for entry in table} | {"supervisor": "supervisor"}
        controller = Controller(context, wire)  # type: ignore[arg-type]
        ends = [timed(owner, "_step_trained") for owner in (controller, controller.scheduler)]
        script = Script(wire, context.run_dir, options.tokens, options.single_credits)
        script.greet(settings)
        collect_less()
        begin = time.process_time()
        while controller.verdict is None:
            controller.turn()
            script.work()
        controller.background.close()
        seconds = time.process_time() - begin - script.seconds
        controller.recorder.close("measured")
        return Found(seconds / script.groups, *ends, wire.received)


def timed(owner: object, name: str) -> list[float]:
    """Processor seconds of each call of a method, in a list that grows."""
    seconds: list[float] = []
    method = getattr(owner, name)

    def timing(*arguments: Any) -> Any:
        begin = time.thread_time()
        try:
            return method(*arguments)
        finally:
            seconds.append(time.thread_time() - begin)

    setattr(owner, name, timing)
    return seconds


def milliseconds(seconds: list[float]) -> str:
    return " · ".join(f"{1e3 * one:.1f}" for one in seconds)


def profiled(work: Callable[[], Any], path: Path | None) -> Any:
    if path is None:
        return work()
    profile = cProfile.Profile()
    try:
        return profile.runcall(work)
    finally:
        profile.dump_stats(path)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=positive, default=8)
    parser.add_argument("--questions", type=positive, default=384, help="of a step")
    parser.add_argument("--group", type=positive, default=8, help="responses of a group")
    parser.add_argument("--tokens", type=positive, default=1024, help="of a response")
    parser.add_argument("--method", default="grpo")
    parser.add_argument("--single-credits", action="store_true")
    parser.add_argument("--profile", type=Path, help="where to write what cProfile found")
    options = parser.parse_args()
    # Advice is about the machines of a run; these engines answer at once, and so look idle.
    logging.getLogger("zppo.controller").setLevel(logging.ERROR)
    for rollouts in (False, True):
        work = functools.partial(seconds_per_group, options, rollouts)
        found = profiled(work, options.profile)
        what = "with the rollout store" if rollouts else "without the rollout store"
        print(
            f"{what}: {1 / found.per_group:,.0f} groups a second, {1e6 * found.per_group:.0f} µs a "
            f"group; the end of each step takes {milliseconds(found.step_ends)} ms, of these the "
            f"scheduler {milliseconds(found.scheduled)}"
        )
        if not rollouts:
            print(", ".join(f"{count:,} {name}" for name, count in found.received.most_common(6)))


if __name__ == "__main__":
    sys.exit(run_command(main))
