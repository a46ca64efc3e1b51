"""The controller with a scripted router: who is let in, what is ignored, how runs end."""

from __future__ import annotations

import contextlib
import itertools
import json
import sqlite3
import time
from collections import deque
from pathlib import Path
from typing import Any

import msgspec
import pytest
from worlds import samples, topology

from zppo.config.topology import Topology
from zppo.data.question import digest
from zppo.errors import UserError
from zppo.plan.memory import Models
from zppo.plan.model_folder import ModelFacts
from zppo.plan.processes import processes
from zppo.prompting.prompts import PromptSet
from zppo.records import checkpoint, run_directory
from zppo.records.summary import summarise
from zppo_actors.controller import controller as controller_module
from zppo_actors.controller import restore
from zppo_actors.controller.controller import Controller
from zppo_actors.own_time import OwnTime
from zppo_actors.process import ActorContext
from zppo_protocol import messages
from zppo_protocol.errors import ProtocolError
from zppo_protocol.messages import AnyMessage
from zppo_protocol.samples import GroupSamples
from zppo_protocol.values import Grade, PolicyManifest, Prompt, Sampling


class ScriptedRouter:
    """Hands out what the test queued; a plain list of what was sent. `play` may answer each
    message."""

    def __init__(self) -> None:
        self.inbox: deque[tuple[str, AnyMessage]] = deque()
        self.sent: list[tuple[str, AnyMessage]] = []
        self.gone: set[str] = set()
        self.too_large: type | None = None
        self.roles: dict[str, str] = {}
        self.renewed: set[str] = set()
        self.refused, self.refusal = 0, ""

    def receive(self, timeout_s: float) -> tuple[str, AnyMessage] | None:
        if not self.inbox and timeout_s > 0.0:
            time.sleep(0.001)  # lets the file thread work, as the real socket's wait does
        return self.inbox.popleft() if self.inbox else None

    def send(self, peer: str, message: AnyMessage) -> bool:
        if self.too_large is not None and isinstance(message, self.too_large):
            raise ProtocolError("payload of 9 bytes, the limit is 8")
        self.sent.append((peer, message))
        return peer not in self.gone

    def to(self, peer: str, kind: type) -> list[Any]:
        return [
            message for name, message in self.sent if name == peer and isinstance(message, kind)
        ]


class Stage:
    """A controller, its router, and actors that greet and do their work at once."""

    def __init__(self, folder: Path, settings: Topology, start: int = 0) -> None:
        if not folder.exists():
            run_directory.create(folder, settings)
        self.context = ActorContext(
            run_dir=folder, runtime=folder, actor="controller", role="controller", incarnation=0,
            topology=settings, run_id="run", start_version=start,
        )  # fmt: skip
        self.router = ScriptedRouter()
        table = processes(settings, available_cores=1)
        self.router.roles = {entry.name: entry.role for entry in table} | {
            "supervisor": "supervisor"
        }
        self.controller = Controller(self.context, self.router)  # type: ignore[arg-type]
        self.answered = 0
        self.measured: dict[str, float] = {"loss": 0.5}

    def say(self, peer: str, message: AnyMessage) -> None:
        self.router.inbox.append((peer, message))

    def greet(self, peer: str, role: Any, **changes: Any) -> None:
        fields: dict[str, Any] = {
            "protocol_version": messages.PROTOCOL_VERSION, "run_id": "run", "actor": peer,
            "role": role, "incarnation": 0, "pid": 1, "capacity": 8, **changes,
        }  # fmt: skip
        self.say(peer, messages.Hello(**fields))

    def turn(self, now: float = 0.0) -> None:
        self.controller._receive()
        self.controller._act(now)

    def everybody(self) -> None:
        start = self.context.start_version
        for name in ("supervisor", "trainer", "rollout-0", "grader-0"):
            self.greet(name, name.split("-")[0])
        self.say("grader-0", messages.Credits(count=8))
        self.say("trainer", messages.PolicyPublished(manifest=manifest(start)))
        self.say("trainer", messages.Credits(count=1))

    def work(self) -> None:
        """Answer everything that was sent since the last call."""
        new, self.answered = self.router.sent[self.answered :], len(self.router.sent)
        for name, message in new:
            match message:
                case messages.LoadPolicy():
                    version = message.manifest.version
                    self.say(
                        name,
                        messages.PolicyLoaded(version=version, digest=f"d{version}", seconds=0.0),
                    )
                    if version == self.context.start_version:
                        self.say(name, messages.Credits(count=8))
                case messages.GenerateTask():
                    answer = samples(message, [message.min_version] * 2)
                    self.say(name, messages.GenerateResult(task_id=message.task_id, samples=answer))
                    self.say(name, messages.Credits(count=message.n))
                case messages.GradeTask():
                    grades = [Grade(reward=float(i == 0)) for i in range(len(message.responses))]
                    self.say(name, messages.GradeResult(task_id=message.task_id, grades=grades))
                    self.say(name, messages.Credits(count=1))
                case messages.TrainWindow():
                    self.train(message)
                case messages.SaveCheckpoint():
                    folder = checkpoint.begin(self.context.run_dir, message.step)
                    checkpoint.write_file(folder / "share", b"weights")
                    self.say(name, messages.CheckpointSaved(step=message.step))
                case messages.Shutdown():
                    self.say(name, messages.Goodbye())

    def train(self, window: messages.TrainWindow) -> None:
        self.say("trainer", messages.PolicyPublished(manifest=manifest(window.step + 1)))
        ids = [group.group_id for group in window.groups]
        self.say(
            "trainer",
            messages.StepTrained(
                step=window.step, group_ids=ids, metrics=self.measured, seconds=1.0
            ),
        )
        self.say("trainer", messages.Credits(count=1))

    def run(self) -> messages.RunEnded:
        """Let everybody work until the run has ended, then let the controller leave."""
        for _ in range(20_000):
            if self.controller.verdict is not None:
                break
            self.turn()
            self.work()
        assert self.controller.verdict is not None, self.controller._waiting()
        self.controller._leave(self.controller.verdict)
        (ended,) = self.router.to("supervisor", messages.RunEnded)
        return ended


def manifest(version: int) -> PolicyManifest:
    return PolicyManifest(version=version, path=f"/p{version}", tensors=[], digest=f"d{version}")


FACTS = ModelFacts(
    parameters=1, context=64, hidden=8, layers=1, kv_heads=1, head_dim=8, vocabulary=2**31
)


@pytest.fixture(autouse=True)
def scripted_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripted engines have no model folders; their token ids are of any size."""
    models = Models(by_pool={"rollout": FACTS})
    monkeypatch.setattr(restore, "inspect_models", lambda *_: models)


@pytest.fixture(autouse=True)
def short_farewell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most actors here do not say Goodbye; the controller need not wait long for it."""
    monkeypatch.setattr(controller_module, "LEAVE_SECONDS", 0.05)


@pytest.fixture
def settings(tmp_path: Path) -> Topology:
    data = tmp_path / "train.jsonl"
    data.write_text(
        "".join(
            json.dumps({"id": f"q{i}", "question": f"{i}?", "answer": str(i)}) + "\n"
            for i in range(6)
        )
    )
    (tmp_path / "student").mkdir()
    (tmp_path / "student/config.json").write_text("{}")
    return topology(
        data={"train": str(data)},
        student={"model": str(tmp_path / "student")},
        teacher={"model": "teacher"},
        method={"name": "grpo_replay", "group_size": 2},
        scheduler={"new_questions": 2, "max_staleness": 1},
        actors={"rollout": {"count": 1}},
        checkpoints={"every": 2, "keep": 1},
        sinks={"tensorboard": False},
    )


@pytest.fixture
def stage(tmp_path: Path, settings: Topology) -> Stage:
    return Stage(tmp_path / "run", settings)


def test_a_run_from_hello_to_the_last_word(stage: Stage) -> None:
    stage.everybody()
    ended = stage.run()
    assert (ended.verdict, ended.exit_code) == ("finished: 3 of 3 steps", 0)
    assert checkpoint.find_latest(stage.context.run_dir).step == 3
    assert checkpoint.list_steps(stage.context.run_dir) == [3]
    assert stage.controller.recorder.totals["questions_new"] == 6
    assert [m.version for m in stage.router.to("trainer", messages.ReleasePolicy)] == [0, 1, 2]


SINKS = """
import threading

class Raises:
    def open(self, run): ...
    def step(self, step, metrics): raise OSError("the server is away")
    def event(self, event): ...
    def close(self): ...

class Hangs(Raises):
    def open(self, run): threading.Event().wait()
"""


def test_sinks_that_raise_or_hang_cost_themselves_and_not_the_run(
    tmp_path: Path, settings: Topology
) -> None:
    (tmp_path / "mine.py").write_text(SINKS)
    own = [{"use": f"{tmp_path}/mine.py:{name}"} for name in ("Raises", "Hangs")]
    sinks = {"tensorboard": False, "use": own, "close_seconds": 5.0}
    changed = msgspec.convert({**msgspec.to_builtins(settings), "sinks": sinks}, Topology)
    stage = Stage(tmp_path / "run", changed)
    stage.everybody()
    ended = stage.run()
    assert (ended.verdict, ended.exit_code) == ("finished: 3 of 3 steps", 0)
    with contextlib.closing(sqlite3.connect(tmp_path / "run/journal.sqlite")) as journal:
        query = "SELECT event, detail FROM events WHERE event LIKE 'sink%' ORDER BY event"
        said = list(journal.execute(query))
    assert said == [
        (
            "sink_failed",
            "sinks.own-mine.Raises: OSError: the server is away; the run goes on without it",
        ),
        (
            "sink_left",
            "sinks.own-mine.Hangs: it did not close in 5 s (sinks.close_seconds) and had "
            + said[1][1].partition("and had ")[2],
        ),
    ]


@pytest.mark.parametrize("limit", [1, 3, 4, 5])
def test_a_budget_that_is_spent_ends_the_run_and_nothing_that_was_paid_for_is_asked_again(
    tmp_path: Path, settings: Topology, limit: int
) -> None:
    """Each question is hard and costs three requests: a draw, and two compressions."""
    changes = {
        "method": {
            "name": "zppo",
            "group_size": 2,
            "teacher_group_size": 2,
            "hard_threshold": 0.75,
        },
        "scheduler": {"new_questions": 1, "rho_replay": 0.0, "rho_aug": 1.0, "max_staleness": 1},
    }

    def stage_of(start: int, budget: int | None) -> Stage:
        teacher = {"model": "teacher", "budget": {"requests": budget}}
        raw = {**msgspec.to_builtins(settings), **changes, "teacher": teacher}
        return Stage(tmp_path / "run", msgspec.convert(raw, Topology), start)

    def attempt(start: int, budget: int | None) -> tuple[messages.RunEnded, list[str]]:
        stage = stage_of(start, budget)
        stage.everybody()
        stage.greet("teacher-0", "teacher")
        stage.say("teacher-0", messages.Credits(count=8))
        ended = stage.run()
        return ended, [task.task_id for task in stage.router.to("teacher-0", messages.GenerateTask)]

    ended, asked = attempt(0, 3 + limit)
    assert len(asked) == 3 + limit and ended.exit_code == 1
    steps = (3 + limit) // 3
    assert ended.verdict == (
        f"the teacher's budget is spent: {3 + limit} requests of {3 + limit} "
        f"(teacher.budget.requests; raise it to go on): {steps} of 6 steps are trained and saved"
    )
    ended, more = attempt(steps, None)
    assert (ended.verdict, ended.exit_code) == ("finished: 6 of 6 steps", 0)
    assert len(set(asked + more)) == len(asked + more) == 18
    assert summarise(tmp_path / "run")["teacher_requests"] == {"draw": 6, "compress": 12}
    # A journal that is lost takes the count from the last step.
    (tmp_path / "run/journal.sqlite").unlink()
    counted = stage_of(6, None).controller.scheduler.budget.spent
    assert {kind: spent.requests for kind, spent in counted.items()} == {"draw": 6, "compress": 12}


@pytest.mark.parametrize(
    ("peer", "changes", "reason"),
    [
        ("rollout-0", {"role": "trainer"}, "this run has no trainer called rollout-0"),
        ("rollout-9", {"role": "rollout"}, "this run has no rollout called rollout-9"),
        (
            "rollout-0",
            {"role": "rollout", "actor": "trainer"},
            "it calls itself trainer on the connection of rollout-0",
        ),
        (
            "rollout-0",
            {"role": "rollout", "run_id": "old"},
            "it belongs to run old, this is run run",
        ),
        (
            "rollout-0",
            {"role": "rollout", "protocol_version": 9},
            f"it speaks protocol version 9, this run speaks {messages.PROTOCOL_VERSION}",
        ),
    ],
)
def test_who_is_not_let_in(stage: Stage, peer: str, changes: dict[str, Any], reason: str) -> None:
    stage.greet(peer, changes.pop("role"), **changes)
    stage.turn()
    assert [m.reason for m in stage.router.to(peer, messages.Rejected)] == [reason]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_whose_directory_is_taken_away_does_not_finish(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    folder, train, receive = stage.context.run_dir, stage.train, stage.router.receive

    def train_and_remove(window: messages.TrainWindow) -> None:
        train(window)
        if window.step == 1:
            folder.rename(folder.with_name("elsewhere"))
            if replaced:
                folder.mkdir()

    def work_and_receive(timeout_s: float) -> tuple[str, AnyMessage] | None:
        stage.work()
        return receive(timeout_s)

    monkeypatch.setattr(stage, "train", train_and_remove)
    monkeypatch.setattr(stage.router, "receive", work_and_receive)
    stage.everybody()
    assert stage.controller.run() == 1
    (ended,) = stage.router.to("supervisor", messages.RunEnded)
    assert (ended.verdict, ended.exit_code) == (
        f"run.directory: {str(folder)!r} was removed or replaced while the run went on, so what it "
        "recorded since then is lost; begin the run again, and leave its directory in its place",
        1,
    )


def test_records_that_cannot_be_written_are_one_sentence(stage: Stage) -> None:
    ended = stage.controller.recorder.trouble(OSError(28, "No space left on device"))
    assert (ended.verdict, ended.exit_code) == (
        f"the records in {str(stage.context.run_dir)!r} cannot be written ([Errno 28] No space left "
        "on device); expected a disk with room there, then zppo launch --resume",
        1,
    )


def test_an_old_incarnation_is_not_let_in(stage: Stage) -> None:
    stage.greet("rollout-0", "rollout", incarnation=2)
    stage.greet("rollout-0", "rollout", incarnation=1)
    stage.turn()
    (rejected,) = stage.router.to("rollout-0", messages.Rejected)
    assert rejected.reason == "incarnation 1 came after incarnation 2"


def test_nobody_speaks_before_hello(stage: Stage) -> None:
    stage.say("rollout-0", messages.Credits(count=8))
    stage.turn()
    assert stage.router.to("rollout-0", messages.Forgotten) == [messages.Forgotten()]
    stage.greet("rollout-0", "rollout")
    stage.turn()
    assert len(stage.router.to("rollout-0", messages.Welcome)) == 1


def test_refused_connections_are_shown_ever_more_rarely(stage: Stage) -> None:
    for count in range(1, 9):
        stage.router.refused, stage.router.refusal = count, "it shows no key"
        stage.turn(now=stage.controller._next_status)
    lines = [line for line in stage.controller.recorder.events if "refused connection" in line]
    assert [line.split("controller: ")[1] for line in lines] == [
        f"refused connection: {count} so far; the last one: it shows no key"
        for count in (1, 2, 4, 8)
    ]


def test_what_a_role_may_not_say_changes_nothing(stage: Stage) -> None:
    stage.greet("rollout-0", "rollout")
    stage.say("rollout-0", messages.PolicyPublished(manifest=manifest(7)))
    stage.say("rollout-0", messages.StepTrained(step=0, group_ids=[], metrics={}, seconds=0.0))
    stage.say("rollout-0", messages.StopRequested(reason="mine"))
    stage.say("rollout-0", messages.GenerateResult(task_id="none", samples=a_sample()))
    stage.say("rollout-0", messages.Credits(count=2**53))
    stage.turn()
    assert stage.controller.scheduler.published == 0 and not stage.controller.scheduler.stopping
    assert stage.controller.scheduler.dispatcher.credits("rollout-0") == 0


def a_sample() -> GroupSamples:
    task = messages.GenerateTask(
        task_id="none",
        kind="plain",
        prompt=Prompt(messages=[]),
        n=1,
        sampling=Sampling(max_new_tokens=2),
        seed=0,
    )
    return samples(task, [0, 0])


def test_stopped_before_the_first_step_it_ends_at_once(stage: Stage) -> None:
    stage.everybody()
    stage.say("supervisor", messages.StopRequested(reason="interrupted"))
    ended = stage.run()
    assert (ended.verdict, ended.exit_code) == (
        "interrupted: 0 of 3 steps are trained and saved",
        130,
    )
    assert checkpoint.list_steps(stage.context.run_dir) == []


def test_stopped_in_the_middle_it_saves_and_the_next_life_goes_on(
    stage: Stage, settings: Topology
) -> None:
    stage.everybody()
    while not stage.router.to("trainer", messages.TrainWindow):
        stage.turn()
        stage.work()
    stage.say("supervisor", messages.StopRequested(reason="interrupted"))
    ended = stage.run()
    assert (ended.verdict, ended.exit_code) == (
        "interrupted: 1 of 3 steps are trained and saved",
        130,
    )
    again = Stage(stage.context.run_dir, settings, start=1)
    again.everybody()
    assert again.run().verdict == "finished: 3 of 3 steps"
    assert again.controller.recorder.totals["questions_new"] == 6


def test_a_model_that_is_swapped_between_two_lives_is_noticed(
    stage: Stage, settings: Topology, tmp_path: Path
) -> None:
    stage.everybody()
    assert stage.run().exit_code == 0
    (tmp_path / "student/config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(UserError, match=r"^student\.model: the files of '.*' have changed since"):
        Stage(stage.context.run_dir, settings, start=3)


@pytest.mark.parametrize("edited", ["plain.j2", "parts/ask.txt"])
def test_templates_that_are_edited_between_two_lives_are_noticed(
    settings: Topology, tmp_path: Path, edited: str
) -> None:
    prompts = tmp_path / "prompts"
    (prompts / "parts").mkdir(parents=True)
    (prompts / "plain.j2").write_text('{{ question }} {% include "parts/ask.txt" %}')
    (prompts / "parts/ask.txt").write_text("Think.")
    data = msgspec.structs.replace(settings.data, templates=str(prompts))
    own = msgspec.structs.replace(settings, data=data)
    found = {"data.heldout": digest([]), "data.templates": PromptSet(prompts).digest}
    run_directory.create(tmp_path / "run", own, contents=found)
    Stage(tmp_path / "run", own)
    (prompts / edited).write_text("{{ question }} Now!")
    with pytest.raises(UserError, match=r"^data\.templates: '.*' has changed since the run began;"):
        Stage(tmp_path / "run", own)


def test_an_evaluation_of_an_earlier_life_is_kept_and_not_made_again(
    settings: Topology, tmp_path: Path
) -> None:
    """The first life dies in its first step, with its evaluation of the untrained policy done."""
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text('{"id": "h0", "question": "h?", "answer": "1"}\n')
    data = msgspec.structs.replace(settings.data, heldout=str(heldout))
    measured = msgspec.structs.replace(settings, data=data)
    first = Stage(tmp_path / "run", measured)
    first.everybody()
    while not first.router.to("trainer", messages.TrainWindow):
        first.turn()
        first.work()
    lines = (tmp_path / "run/heldout.jsonl").read_text()
    assert json.loads(lines)["step"] == 0
    second = Stage(tmp_path / "run", measured)
    second.everybody()
    assert second.run().verdict == "finished: 3 of 3 steps"
    kinds = [m.kind for m in second.router.to("rollout-0", messages.GenerateTask)]
    assert kinds.count("evaluate") == 1, "only the one after the last step"
    after = (tmp_path / "run/heldout.jsonl").read_text()
    assert after.startswith(lines) and [json.loads(x)["step"] for x in after.splitlines()] == [0, 3]


def test_only_those_that_load_may_move_without_a_word(stage: Stage) -> None:
    """The supervisor looks at every process, the controller's own among them."""
    controller = stage.controller
    assert not controller._moving(["controller"], 1.0)
    assert controller._moving(["controller", "rollout-0"], 2.0)
    assert controller._moving(["trainer"], 3.0)
    stage.everybody()
    stage.turn()
    assert not controller._moving(["controller", "rollout-0"], 4.0)


def test_a_rank_that_spins_does_not_move_the_run(settings: Topology, tmp_path: Path) -> None:
    """It never greets, and uses the processor while it waits for the others."""
    trainer = msgspec.structs.replace(settings.actors.trainer, ranks=2)
    actors = msgspec.structs.replace(settings.actors, trainer=trainer)
    stage = Stage(tmp_path / "run", msgspec.structs.replace(settings, actors=actors))
    assert stage.controller._moving(["trainer-1"], 1.0)
    stage.everybody()
    stage.turn()
    assert not stage.controller._moving(["trainer", "trainer-1"], 2.0)


@pytest.mark.parametrize("on_advice", ["warn", "stop"])
def test_a_run_that_learns_nothing_does_not_just_finish(
    tmp_path: Path, settings: Topology, on_advice: str
) -> None:
    one = msgspec.structs.replace(settings.scheduler, new_questions=1)
    run = msgspec.structs.replace(settings.run, on_advice=on_advice)  # type: ignore[arg-type]
    stage = Stage(tmp_path / "run", msgspec.structs.replace(settings, scheduler=one, run=run))
    stage.measured["updates"] = 0.0
    stage.everybody()
    ended = stage.run()
    if on_advice == "warn":
        assert (ended.verdict, ended.exit_code) == (
            "finished: 6 of 6 steps, but with severe advice: no_gradient (zppo doctor)",
            0,
        )
        return
    assert ended.exit_code == 1
    assert ended.verdict == (
        "severe no_gradient: no optimizer update was made in the last 5 steps; the student does "
        "not change; look at the other advice, data.train and method.group_size: 5 of 6 steps are "
        "trained and saved"
    )
    assert checkpoint.list_steps(stage.context.run_dir)[-1] == 5
    (status,) = stage.router.to("supervisor", messages.Status)[-1:]
    assert [line.split(":")[0] for line in status.advice] == ["severe no_gradient"]
    assert status.counters["updates"] == 0


def test_versions_that_go_backwards_end_the_run(stage: Stage) -> None:
    stage.everybody()
    stage.say("trainer", messages.PolicyPublished(manifest=manifest(0)))
    assert stage.controller.run() == 1
    (ended,) = stage.router.to("supervisor", messages.RunEnded)
    assert ended.verdict == "policy version 0 was published after version 0"


def test_a_window_too_large_to_send_names_the_setting(stage: Stage) -> None:
    stage.router.too_large = messages.TrainWindow
    stage.everybody()
    with pytest.raises(
        controller_module.RunFailure,
        match=r"payload of 9 bytes, the limit is 8; raise transport\.max",
    ):
        for _ in range(100):
            stage.turn()
            stage.work()


def test_the_watchdog_names_the_stuck_edge(stage: Stage) -> None:
    stage.everybody()
    while not stage.router.to("trainer", messages.TrainWindow):
        stage.turn()
        stage.work()
    stage.controller._next_status = 0.0
    with pytest.raises(
        controller_module.RunFailure, match="nothing moved for 600 s: step 0 is in the trainer"
    ):
        stage.controller._act(stage.controller._last_progress + 601.0)


def test_a_controller_that_was_stopped_for_a_night_goes_on(stage: Stage) -> None:
    """Nobody is taken for stuck and nothing for still, before what waits has been heard; a standstill
    of all others is noticed as ever."""
    clock = [1e6]
    controller = stage.controller
    controller._time = OwnTime(lambda: clock[0])
    controller._last_progress = controller._time.now()
    stage.everybody()
    for _ in range(10):
        controller.turn()
        stage.work()
        clock[0] += 30_000.0
    assert stage.router.to("supervisor", messages.RestartActor) == []
    with pytest.raises(controller_module.RunFailure, match="nothing moved for 600 s"):
        for _ in range(10_000):
            clock[0] += 1.0
            controller.turn()


def test_the_watchdog_names_a_save_that_never_ends(stage: Stage) -> None:
    stage.everybody()
    for turn in itertools.count():
        assert turn < 1000
        stage.turn()
        if stage.controller.checkpointer.waiting_for is not None:
            break
        stage.work()
    assert stage.controller._waiting()[0] == "the checkpoint of step 2 waits for the trainer"


def test_an_unreachable_peer_does_not_keep_the_last_word_back(stage: Stage) -> None:
    stage.everybody()
    stage.turn()
    stage.router.gone.add("rollout-0")
    stage.controller.verdict = messages.RunEnded(verdict="over", exit_code=1)
    stage.work()
    stage.controller.peers.forget("grader-0")
    stage.controller.peers.forget("rollout-0")
    stage.say("trainer", messages.Goodbye())
    assert stage.controller._leave(stage.controller.verdict) == 1
    assert [m.verdict for m in stage.router.to("supervisor", messages.RunEnded)] == ["over"]


def test_a_task_that_an_actor_has_lost_brings_a_new_incarnation(stage: Stage) -> None:
    stage.everybody()
    while not stage.router.to("rollout-0", messages.GenerateTask):
        stage.turn()
        if not stage.router.to("rollout-0", messages.GenerateTask):
            stage.work()
    late = stage.controller._last_progress + 400.0
    heartbeat = messages.Heartbeat(progress=5, tasks=[])
    stage.controller._handle("rollout-0", heartbeat, late)
    (asked,) = stage.router.to("supervisor", messages.RestartActor)
    assert asked.actor == "rollout-0" and "it lost 4 of its tasks, first 0/q" in asked.reason


def forged(task: messages.GenerateTask) -> messages.GenerateResult:
    """An answer of a policy version that was never published."""
    return messages.GenerateResult(task_id=task.task_id, samples=samples(task, [9, 9]))


def test_a_forged_answer_costs_its_sender_the_lease_and_not_the_run(stage: Stage) -> None:
    stage.everybody()
    while not stage.router.to("rollout-0", messages.GenerateTask):
        stage.turn()
        if not stage.router.to("rollout-0", messages.GenerateTask):
            stage.work()
    task = stage.router.to("rollout-0", messages.GenerateTask)[0]
    stage.say("rollout-0", forged(task))
    stage.turn()
    assert stage.run().verdict == "finished: 3 of 3 steps"
    assert stage.controller.recorder.totals["answers_refused"] == 1
    (line,) = [line for line in stage.controller.recorder.events if "refused answer" in line]
    assert line.endswith(
        f"rollout-0: refused answer: {task.task_id}: it sent tokens of policy version 9; "
        "expected 0 to 0"
    )
    assert not stage.router.to("supervisor", messages.RestartActor)


def test_an_actor_that_keeps_sending_such_answers_is_replaced(stage: Stage) -> None:
    stage.everybody()
    answered = 0
    while not stage.router.to("supervisor", messages.RestartActor):
        stage.turn()
        tasks = stage.router.to("rollout-0", messages.GenerateTask)
        if not tasks:
            stage.work()
        for task in tasks[answered:]:
            stage.say("rollout-0", forged(task))
            stage.say("rollout-0", messages.Credits(count=task.n))
        answered = len(tasks)
    (asked,) = stage.router.to("supervisor", messages.RestartActor)
    assert (asked.actor, asked.reason) == (
        "rollout-0",
        "it sent 3 answers that cannot be right",
    )
    assert stage.controller.recorder.totals["answers_refused"] == 3


def test_an_actor_that_loaded_other_bytes_is_restarted(stage: Stage) -> None:
    stage.everybody()
    stage.turn()
    stage.say("rollout-0", messages.PolicyLoaded(version=0, digest="other", seconds=0.0))
    stage.turn()
    (asked,) = stage.router.to("supervisor", messages.RestartActor)
    assert asked.reason == "it loaded other weights than version 0"


def test_only_real_work_keeps_the_watchdog_quiet(stage: Stage) -> None:
    """A peer that talks without working must not hide that the run stands still."""
    stage.everybody()
    stage.turn()
    handle, now = stage.controller._handle, 0.0
    beat = messages.Heartbeat(progress=3, tasks=[])
    assert handle("rollout-0", beat, now) and not handle("rollout-0", beat, now)
    assert not handle("stranger", beat, now)
    assert not handle("rollout-0", messages.Credits(count=1), now)
    assert not handle("grader-0", messages.GradeResult(task_id="unknown", grades=[]), now)
    assert not handle("rollout-0", messages.GradeResult(task_id="not its word", grades=[]), now)
    while not (sent := stage.router.to("rollout-0", messages.GenerateTask)):
        stage.turn()
        stage.work()
    answer = messages.GenerateResult(
        task_id=sent[0].task_id, samples=samples(sent[0], [sent[0].min_version] * 2)
    )
    assert handle("rollout-0", answer, now) and not handle("rollout-0", answer, now)


# ---- weights over hosts --------------------------------------------------------------------------

HOSTS = {f"node-{i}": {"address": f"10.0.0.{i + 1}"} for i in range(2)}
SOURCE = messages.WeightSource(host="10.0.0.1", port=1, certificate="pem", token="t" * 64)


@pytest.fixture
def two_hosts(tmp_path: Path, settings: Topology) -> Stage:
    raw: dict[str, Any] = msgspec.to_builtins(settings)
    raw["cluster"] = {"hosts": HOSTS}
    raw["actors"]["rollout"] |= {"count": 2, "hosts": list(HOSTS)}
    stage = Stage(tmp_path / "run", msgspec.convert(raw, Topology))
    stage.everybody()
    for name in ("weights-0", "rollout-1"):
        stage.greet(name, name.split("-")[0])
    stage.turn()
    return stage


def told(stage: Stage, peer: str) -> list[int]:
    """Versions that a peer was told to load."""
    return [message.manifest.version for message in stage.router.to(peer, messages.LoadPolicy)]


def load(stage: Stage, peer: str, version: int) -> None:
    stage.say(peer, messages.PolicyLoaded(version=version, digest=f"d{version}", seconds=0.1))
    stage.turn()


def publish(stage: Stage, version: int) -> None:
    stage.say("trainer", messages.PolicyPublished(manifest=manifest(version)))
    stage.turn()


def released(stage: Stage, peer: str) -> list[int]:
    return [message.version for message in stage.router.to(peer, messages.ReleasePolicy)]


def test_an_engine_hears_of_weights_when_its_host_has_them(two_hosts: Stage) -> None:
    stage = two_hosts
    assert told(stage, "rollout-0") == [0] and told(stage, "rollout-1") == []
    stage.say("weights-0", SOURCE)
    stage.greet("weights-1", "weights")
    stage.turn()
    assert stage.router.to("weights-1", messages.WeightSource) == [SOURCE]
    assert told(stage, "weights-1") == [0] and told(stage, "weights-0") == []
    load(stage, "weights-1", 0)
    assert told(stage, "rollout-1") == [0]

    for version in (1, 2):
        publish(stage, version)
        load(stage, "rollout-0", version - 1)
    assert told(stage, "weights-1") == [0, 1], "one at a time"
    assert told(stage, "rollout-1") == [0] and released(stage, "trainer") == [0]
    load(stage, "weights-1", 1)
    assert told(stage, "weights-1") == [0, 1, 2] and released(stage, "weights-1") == []
    load(stage, "rollout-1", 0)
    assert told(stage, "rollout-1") == [0, 1] and released(stage, "weights-1") == [0]


def test_a_new_server_is_told_to_who_carries_and_a_new_carrier_begins_anew(
    two_hosts: Stage,
) -> None:
    stage = two_hosts
    stage.greet("weights-1", "weights")
    stage.say("weights-0", SOURCE)
    stage.turn()
    load(stage, "weights-1", 0)
    other = messages.WeightSource(host="10.0.0.1", port=2, certificate="other", token="u" * 64)
    stage.greet("weights-0", "weights", incarnation=1)
    stage.say("weights-0", other)
    stage.greet("weights-1", "weights", incarnation=1)
    stage.turn()
    stage.turn()
    assert stage.router.to("weights-1", messages.WeightSource)[-1] == other
    assert told(stage, "weights-1") == [0, 0]


def test_another_host_does_not_say_where_weights_are(two_hosts: Stage) -> None:
    """Who has that host's key could let all others fetch what he likes."""
    stage = two_hosts
    stage.greet("weights-1", "weights")
    stage.say("weights-1", SOURCE)
    stage.turn()
    assert stage.controller.source is None
    assert stage.router.to("weights-1", messages.WeightSource) == []


def test_who_carries_and_is_silent_is_started_anew(two_hosts: Stage) -> None:
    stage = two_hosts
    stage.greet("weights-1", "weights")
    stage.turn()
    line = "weights-1 brings policy version 0 to its host"
    assert line in stage.controller._waiting()
    now, lease = time.monotonic(), stage.context.topology.scheduler.lease_seconds
    stage.controller._watch(now)
    assert stage.router.to("supervisor", messages.RestartActor) == []
    stage.controller._moved["weights-0"] = now + lease
    stage.controller._watch_trainer = lambda now: None  # type: ignore[method-assign]
    stage.controller._last_progress = now + lease
    stage.controller._watch(now + lease + 60)
    [asked] = stage.router.to("supervisor", messages.RestartActor)
    assert (asked.actor, asked.reason) == ("weights-1", "it said and did nothing for 300 s")
    assert line not in stage.controller._waiting()


def test_who_comes_over_a_new_connection_begins_anew_after_what_it_had_to_say(
    two_hosts: Stage,
) -> None:
    """A version that it was told of, or its credits, may have been lost with the old one."""
    stage = two_hosts
    beat = messages.Heartbeat(progress=0, tasks=[])
    stage.router.renewed |= {"rollout-0", "trainer", "supervisor"}
    load(stage, "rollout-0", 0)
    stage.say("trainer", beat)
    stage.turn()
    assert stage.controller.scheduler.dispatcher.workers["rollout-0"].version == 0
    stage.say("rollout-0", beat)
    stage.turn()
    assert [name for name, m in stage.router.sent if isinstance(m, messages.Forgotten)] == [
        "rollout-0"
    ]
    assert "rollout-0" not in stage.controller.scheduler.dispatcher.workers
    stage.greet("rollout-0", "rollout")
    stage.say("rollout-0", beat)
    stage.turn()
    assert told(stage, "rollout-0") == [0, 0]
    for _ in range(2):  # it had not finished the first time
        load(stage, "rollout-0", 0)
    assert stage.router.to("supervisor", messages.RestartActor) == []


def test_who_cannot_bring_weights_is_started_anew(two_hosts: Stage) -> None:
    stage = two_hosts
    stage.greet("weights-1", "weights")
    stage.turn()
    stage.say("weights-1", messages.PolicyRefused(version=0, reason="no room"))
    stage.turn()
    [asked] = stage.router.to("supervisor", messages.RestartActor)
    # The run may end with these words.
    assert (asked.actor, asked.reason) == ("weights-1", "it refused policy version 0: no room")
    # Nothing that carries weights is a worker: the scheduler has never heard of it.
    assert "weights-1" not in stage.controller.scheduler.dispatcher.workers
