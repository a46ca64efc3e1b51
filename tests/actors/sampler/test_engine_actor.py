"""Rollout and teacher actors: as real processes on a real socket, and their book-keeping around a
made-up engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from actor_helpers import WAIT_SECONDS, Line, Moody, Stage, start_actor
from engine_helpers import (
    completions,
    forced_log_probs,
    make_model,
    make_task,
    save,
    versions,
    words,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo.config.topology import (
    ActorConfig,
    ActorsConfig,
    DataConfig,
    ModelConfig,
    StudentConfig,
    TeacherConfig,
    Topology,
)
from zppo.errors import UserError
from zppo_actors.engines.base import EngineError
from zppo_actors.sampler.actor import CREDIT_SECONDS
from zppo_actors.weights import shared_memory
from zppo_protocol.messages import (
    AnyMessage,
    Credits,
    Forgotten,
    GenerateResult,
    GenerateTask,
    Goodbye,
    Heartbeat,
    Hello,
    LoadPolicy,
    PolicyLoaded,
    PolicyRefused,
    Rejected,
    Shutdown,
    TaskFailed,
    Welcome,
)
from zppo_protocol.samples import GroupSamples
from zppo_protocol.values import PolicyManifest


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Callable[[Topology], Stage]]:
    made: list[Stage] = []

    def make(topology: Topology) -> Stage:
        made.append(Stage(tmp_path, topology))
        return made[-1]

    yield make
    for each in made:
        each.close()


def simulated(tmp_path: Path, script: dict[str, Any], **engine_args: Any) -> Topology:
    path = tmp_path / "script.json"
    path.write_text(json.dumps(script))
    engine = ActorConfig(engine="simulated", engine_args={"script": str(path), **engine_args})
    model = ModelConfig(model="unused", dtype="float32")
    teacher = TeacherConfig(model="unused", dtype="float32")
    actors = ActorsConfig(rollout=engine, teacher=engine)
    return Topology(data=DataConfig(train="unused"), student=model, teacher=teacher, actors=actors)


def publish(stage: Stage, version: int, seed: int = 0) -> LoadPolicy:
    manifest = shared_memory.publish(make_model(seed=seed).state_dict(), version, stage.folder)
    return LoadPolicy(manifest=manifest)


@pytest.mark.slow
def test_rollout_opens_with_its_first_policy_and_gives_every_credit_back(
    stage: Callable[[Topology], Stage], tmp_path: Path
) -> None:
    on = stage(simulated(tmp_path, {"default": {"tokens": 4}}, max_sequences=10))
    on.start("rollout")
    hello = on.next(Hello)
    assert (hello.actor, hello.role, hello.incarnation, hello.capacity) == (
        "rollout-0",
        "rollout",
        1,
        10,
    )
    assert hello.run_id == on.record.run_id
    on.send(Welcome(heartbeat_seconds=0.05))
    on.next(Heartbeat)
    assert not on.seen(Credits)
    load = publish(on, version=3)
    on.send(load)
    loaded = on.next(PolicyLoaded)
    assert (loaded.version, loaded.digest) == (3, load.manifest.digest)
    on.credits(10)

    on.send(make_task("q", n=4, task_id="a"))
    result = on.next(GenerateResult)
    assert result.task_id == "a" and versions(result.samples) == [3] * 16
    on.credits(4)

    on.send(msgspec.structs.replace(make_task("q", n=2, task_id="b"), min_version=4))
    failed = on.next(TaskFailed)
    assert failed == TaskFailed(
        task_id="b", reason="needs policy version 4, loaded is 3", retryable=True
    )
    on.credits(2)

    on.send(Shutdown(reason="done"))
    assert on.next(Goodbye).reason == ""
    assert on.exit_code() == 0
    assert not on.seen(Credits)


@pytest.mark.slow
def test_teacher_opens_when_welcomed_and_reports_failures(
    stage: Callable[[Topology], Stage], tmp_path: Path
) -> None:
    script = {"questions": {"bad": {"fail": "no answer today"}, "stuck": {"hang": True}}}
    on = stage(simulated(tmp_path, script, max_sequences=8))
    on.start("teacher")
    assert on.next(Hello).role == "teacher"
    on.send(Welcome(heartbeat_seconds=0.05))
    on.credits(8)
    on.send(make_task("stuck", n=1, task_id="s"))
    on.send(make_task("stuck", n=2, task_id="s"))
    on.send(make_task("bad", n=4, task_id="f"))
    assert on.next(TaskFailed) == TaskFailed(task_id="f", reason="no answer today", retryable=True)
    on.credits(4)
    on.send(make_task("good", n=3, task_id="g"))
    assert versions(on.next(GenerateResult).samples) == [-1] * 24
    on.credits(3)
    while (beat := on.next(Heartbeat)).progress != 24 or beat.tasks != ["s", "s"]:
        pass
    assert beat.stats["running"] == 3.0
    on.send(Shutdown(reason="done"))
    assert on.exit_code() == 0


@pytest.mark.slow
def test_rejected_actor_leaves_with_exit_code_1(
    stage: Callable[[Topology], Stage], tmp_path: Path
) -> None:
    on = stage(simulated(tmp_path, {}))
    on.start("rollout")
    on.next(Hello)
    on.send(Rejected(reason="another run"))
    assert (
        on.next(Goodbye).reason == "the controller refuses to work with this process: another run"
    )
    assert on.exit_code() == 1


@pytest.mark.slow
def test_real_student_refuses_a_torn_policy_and_goes_on(
    stage: Callable[[Topology], Stage], tmp_path: Path
) -> None:
    folder = save(make_model(seed=0), tmp_path / "student")
    topology = Topology(
        data=DataConfig(train="unused"),
        student=StudentConfig(model=str(folder), dtype="float32"),
        actors=ActorsConfig(rollout=ActorConfig(engine_args={"max_sequences": 4}, threads=1)),
    )
    on = stage(topology)
    on.start("rollout")
    on.next(Hello)
    on.send(Welcome(heartbeat_seconds=5.0))
    on.send(publish(on, version=0, seed=1))
    on.next(PolicyLoaded)
    on.credits(4)

    torn = publish(on, version=1, seed=2)
    with open(torn.manifest.path, "r+b") as file:
        file.truncate(64)
    on.send(torn)
    refused = on.next(PolicyRefused)
    assert (
        refused.version == 1 and "the file has 64 bytes where the manifest needs" in refused.reason
    )

    on.send(make_task(words(9), n=4, task_id="a"))
    samples = on.next(GenerateResult).samples
    assert set(versions(samples)) == {0}
    assert abs(forced_log_probs(make_model(seed=1), samples) - samples.log_probs).max() < 1e-4
    assert len(completions(samples)) == 4
    on.credits(4)
    on.send(Shutdown(reason="done"))
    assert on.exit_code() == 0


@pytest.mark.slow
def test_user_error_is_one_sentence_and_exit_code_2(
    stage: Callable[[Topology], Stage], tmp_path: Path
) -> None:
    topology = msgspec.structs.replace(
        simulated(tmp_path, {}),
        actors=ActorsConfig(
            rollout=ActorConfig(engine="simulated", engine_args={"scrpt": "s.json"})
        ),
    )
    on = stage(topology)
    on.start("rollout")
    assert on.exit_code() == 2
    expected = (
        "actors.rollout.engine_args.scrpt: unknown engine argument (did you mean 'script'?)\n"
    )
    assert on.log() == expected


# ---- book-keeping around a made-up engine --------------------------------------------------------


async def serve(engine: Moody, line: Line, messages: list[AnyMessage], answers: int) -> int:
    """Run a teacher actor until it has given so many answers, then tell it to leave; returns its
    exit code."""
    actor = start_actor(engine, line, messages, heartbeat_seconds=1000.0)
    while not actor.done() and len(line.all(GenerateResult)) + len(line.all(TaskFailed)) < answers:
        await asyncio.sleep(0)
    await asyncio.sleep(2 * CREDIT_SECONDS)  # lets the last credits go out
    line.incoming.put_nowait(Shutdown(reason="done"))
    return await actor


PLANS = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(0, 4), max_size=5), st.booleans()), max_size=6
)


@settings(deadline=None, max_examples=60)
@given(plans=PLANS, twice=st.booleans())
def test_every_credit_comes_back_once_and_every_task_has_one_answer(
    plans: list[tuple[int, list[int], bool]], twice: bool
) -> None:
    engine = Moody({f"t{i}": (ends, fails) for i, (_, ends, fails) in enumerate(plans)})
    tasks: list[AnyMessage] = [
        make_task("q", n=n, task_id=f"t{i}") for i, (n, _, _) in enumerate(plans)
    ]
    tasks *= 2 if twice else 1

    async def work() -> Line:
        line = Line()
        assert await serve(engine, line, tasks, len(tasks)) == 0
        return line

    line = asyncio.run(work())
    assert all(credit.count > 0 for credit in line.all(Credits))
    cost = sum(n for n, _, _ in plans) * (2 if twice else 1)
    assert sum(credit.count for credit in line.all(Credits)) == engine.capacity + cost
    answers = [result.task_id for result in line.all(GenerateResult)] + [
        f.task_id for f in line.all(TaskFailed)
    ]
    assert sorted(answers) == sorted(
        task.task_id for task in tasks if isinstance(task, GenerateTask)
    )


def test_actor_leaves_when_its_engine_is_broken() -> None:
    engine = Moody({"t": ([], True)})
    engine.broken = "the device is gone"

    async def work() -> tuple[int, Line]:
        line = Line()
        return await serve(engine, line, [make_task("q", task_id="t")], 1), line

    code, line = asyncio.run(work())
    assert code == 1 and line.sent[-1] == Goodbye(reason="the device is gone")
    assert [failed.task_id for failed in line.all(TaskFailed)] == ["t"]


class Blind(Moody):
    """Finds with its first task that a model's folder lacks something."""

    async def generate(self, task: GenerateTask, finished: Callable[[int], None]) -> GroupSamples:
        raise UserError("teacher.model: it has no processor")


def test_a_mistake_of_the_user_that_a_task_brings_up_ends_the_actor() -> None:
    line = Line()
    tasks: list[AnyMessage] = [make_task("q", task_id=name) for name in "ab"]
    with pytest.raises(UserError) as refused:
        asyncio.run(serve(Blind({}), line, tasks, 1))
    assert str(refused.value) == "teacher.model: it has no processor"
    assert not line.all(TaskFailed), "no other try would mend it"


class Holding(Line):
    """Keeps the sender of an answer waiting until `reading` is set, as a full queue does."""

    def __init__(self) -> None:
        super().__init__()
        self.reading = asyncio.Event()

    async def send(self, message: AnyMessage) -> None:
        if isinstance(message, GenerateResult | TaskFailed):
            await self.reading.wait()
        await super().send(message)

    async def next_tasks(self) -> list[str]:
        """The tasks of the second heartbeat from now; the first may have been on its way
        already."""
        wanted = len(self.all(Heartbeat)) + 2
        while len(self.all(Heartbeat)) < wanted:
            await asyncio.sleep(0)
        return self.all(Heartbeat)[-1].tasks


class Stuck(Moody):
    """Never answers a task called `stuck`."""

    async def generate(self, task: GenerateTask, finished: Callable[[int], None]) -> GroupSamples:
        if task.task_id == "stuck":
            await asyncio.Event().wait()
        return await super().generate(task, finished)


def test_heartbeats_list_every_task_until_its_answer_is_sent() -> None:
    """Running, waiting for room, ended well or badly: until then the controller must not think that
    it is lost."""
    engine = Stuck({"good": ([2], False), "bad": ([], True)})
    tasks: list[AnyMessage] = [
        make_task("q", n=n, task_id=i) for i, n in (("stuck", 150), ("good", 2), ("bad", 1))
    ]

    async def work() -> Line:
        line = Holding()
        actor = start_actor(engine, line, tasks, heartbeat_seconds=0.01)
        await line.next_tasks()
        assert await line.next_tasks() == ["stuck", "good", "bad"]
        line.reading.set()
        while await line.next_tasks() != ["stuck"]:
            pass
        line.incoming.put_nowait(Shutdown(reason="done"))
        assert await actor == 0
        return line

    line = asyncio.run(work())
    answers = [message for message in line.sent if isinstance(message, GenerateResult | TaskFailed)]
    assert sorted(answer.task_id for answer in answers) == ["bad", "good"]
    assert line.all(Heartbeat)[-1].stats["waiting"] == 50.0


class Torn(Moody):
    """Breaks while it loads."""

    async def load_policy(self, manifest: PolicyManifest) -> str:
        self.broken = "half a policy"
        raise EngineError(self.broken, retryable=True)


def test_actor_leaves_when_a_load_broke_its_engine() -> None:
    """It must not say that the policy was refused, which means that the old one serves on."""

    async def work() -> tuple[int, Line]:
        line = Line()
        manifest = PolicyManifest(version=1, path="unused", digest="0" * 32, tensors=[])
        actor = start_actor(
            Torn({}), line, [LoadPolicy(manifest=manifest)], heartbeat_seconds=1000.0
        )
        return await asyncio.wait_for(actor, WAIT_SECONDS), line

    code, line = asyncio.run(work())
    assert code == 1 and line.sent[-1] == Goodbye(reason="half a policy")
    assert not line.all(PolicyRefused)


class Waiting(Moody):
    """Holds every task until it is let go."""

    def __init__(self, plans: dict[str, tuple[list[int], bool]]) -> None:
        super().__init__(plans)
        self.held = asyncio.Event()

    async def generate(self, task: GenerateTask, finished: Callable[[int], None]) -> GroupSamples:
        await self.held.wait()
        return await super().generate(task, finished)


def test_who_was_forgotten_greets_again_and_grants_the_room_it_has() -> None:
    async def work() -> None:
        engine, line = Waiting({"t": ([1, 2], False)}), Line()

        async def until(condition: Callable[[], bool]) -> None:
            async with asyncio.timeout(WAIT_SECONDS):
                while not condition():
                    await asyncio.sleep(0.001)

        def granted() -> int:
            return sum(credit.count for credit in line.all(Credits))

        actor = start_actor(
            engine, line, [make_task("q", n=3, task_id="t")], heartbeat_seconds=1000.0
        )
        await until(lambda: granted() == 100)
        for message in (Forgotten(), Forgotten(), Welcome(heartbeat_seconds=1000.0)):
            line.incoming.put_nowait(message)
        await until(lambda: granted() == 100 + 97)
        assert len(line.all(Hello)) == 2, "the second word of one forgetting asks for nothing"
        engine.held.set()
        await until(lambda: granted() == 100 + 100 and len(line.all(GenerateResult)) == 1)
        line.incoming.put_nowait(Shutdown(reason="done"))
        assert await actor == 0

    asyncio.run(work())
