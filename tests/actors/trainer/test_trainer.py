"""The trainer actor: a real process over a real socket for what it does, a scripted line for how it
ends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from zppo.config.cluster import TransportConfig
from zppo.config.method import MethodConfig
from zppo.config.topology import (
    ActorsConfig,
    DataConfig,
    OptimizerConfig,
    StudentConfig,
    TeacherConfig,
    Topology,
    TrainerConfig,
)
from zppo.errors import EXIT_FATAL, EXIT_USER_ERROR, UserError
from zppo.records import checkpoint, run_directory
from zppo.training.batch import StalenessError
from zppo.training.state import build_trainer
from zppo_actors import runtime
from zppo_actors.process import ActorContext
from zppo_actors.trainer.actor import TrainerActor, starting_checkpoint
from zppo_actors.weights import shared_memory
from zppo_protocol.messages import (
    AnyMessage,
    CheckpointSaved,
    Credits,
    Goodbye,
    Heartbeat,
    Hello,
    PolicyPublished,
    Rejected,
    ReleasePolicy,
    SaveCheckpoint,
    Shutdown,
    StepTrained,
    TrainWindow,
    Welcome,
)
from zppo_protocol.samples import GroupSamples, TrainGroup
from zppo_protocol.sockets import Router
from zppo_protocol.values import Sampling

STUDENT = Path(__file__).parents[3] / "examples" / "quickstart" / "student"
PATIENCE_SECONDS = 600.0
pytestmark = pytest.mark.slow


def topology(*, micro_batch_tokens: int = 512) -> Topology:
    return Topology(
        data=DataConfig(train="train.jsonl"),
        student=StudentConfig(
            model=str(STUDENT), dtype="float32", sampling=Sampling(max_new_tokens=16)
        ),
        method=MethodConfig(updates_per_step=2, group_size=4),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        actors=ActorsConfig(
            trainer=TrainerConfig(micro_batch_tokens=micro_batch_tokens, threads=1)
        ),
        transport=TransportConfig(heartbeat_seconds=0.01),
    )


def window(step: int, *, groups: int = 3, version: int | None = None) -> TrainWindow:
    """Random groups of four rollouts with mixed rewards; the same for the same step."""
    random = np.random.default_rng(step)
    return TrainWindow(
        step=step,
        groups=[
            _group(f"{step}/{index}", random, step if version is None else version)
            for index in range(groups)
        ],
    )


def _group(name: str, random: np.random.Generator, version: int) -> TrainGroup:
    lengths = random.integers(1, 9, 4)
    total = int(lengths.sum())
    samples = GroupSamples(
        prompt_ids=random.integers(3, 40, 6).astype(np.int32),
        token_ids=random.integers(3, 40, total).astype(np.int32),
        log_probs=-random.uniform(1, 3, total).astype(np.float32),
        offsets=np.concatenate([[0], lengths.cumsum()]).astype(np.int32),
        version_spans=np.array([[total, version]], np.int32),
        texts=[],
        finish_reasons=["stop"] * 4,
    )
    rewards = np.array([1, 0, 0, 1], np.float32)
    return TrainGroup(
        group_id=name, question_id=name, kind="plain", samples=samples, rewards=rewards
    )


class Controller:
    """The other end of the line, in the test's own hands."""

    def __init__(self, router: Router, process: subprocess.Popen[bytes]) -> None:
        self.router = router
        self.process = process
        self.heartbeats: list[Heartbeat] = []

    def expect(self, kind: type) -> AnyMessage:
        """The next message that is no heartbeat; it must be of this kind."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            received = self.router.receive(0.2)
            if received is None:
                continue
            peer, message = received
            assert peer == "trainer"
            if isinstance(message, Heartbeat) and kind is not Heartbeat:
                self.heartbeats.append(message)
                continue
            assert isinstance(message, kind), f"expected {kind.__name__}, got {message}"
            return message
        raise AssertionError(f"no {kind.__name__} came; exit code {self.process.poll()}")

    def say(self, message: AnyMessage) -> None:
        assert self.router.send("trainer", message)

    def greet(self) -> PolicyPublished:
        """Answer the greeting and return the first publication."""
        hello = self.expect(Hello)
        assert isinstance(hello, Hello) and (hello.role, hello.capacity) == ("trainer", 1)
        self.say(Welcome(heartbeat_seconds=0.01))
        published = self.expect(PolicyPublished)
        self.expect(Credits)
        assert isinstance(published, PolicyPublished)
        return published

    def train(self, task: TrainWindow) -> tuple[PolicyPublished, StepTrained]:
        self.say(task)
        published, trained = self.expect(PolicyPublished), self.expect(StepTrained)
        self.expect(Credits)
        assert isinstance(published, PolicyPublished) and isinstance(trained, StepTrained)
        return published, trained

    def leave(self) -> int:
        self.say(Shutdown(reason="the run is over"))
        assert self.expect(Goodbye) == Goodbye()
        return self.process.wait(PATIENCE_SECONDS)


@contextmanager
def trainer_process(run: Path, base: Path, errors: Path = Path(os.devnull)) -> Iterator[Controller]:
    """A trainer process of this run, tied to us by its pipe; what it says goes to the file
    `errors`."""
    folder = Path(tempfile.mkdtemp(prefix="trainer-", dir=base))
    router = Router(runtime.issue_keys(folder, {"trainer": "trainer"}))
    reading, writing = os.pipe()
    names = (
        "--run",
        str(run),
        "--runtime",
        str(folder),
        "--actor",
        "trainer",
        "--incarnation",
        "0",
    )
    command = [sys.executable, "-m", "zppo_actors", "trainer", *names, "--parent-fd", str(reading)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with errors.open("w") as stderr:
        process = subprocess.Popen(command, pass_fds=[reading], env=environment, stderr=stderr)
    os.close(reading)
    try:
        yield Controller(router, process)
    finally:
        process.kill()
        process.wait()
        os.close(writing)
        router.close()


def test_windows_become_policies_and_a_checkpoint_continues_bit_for_bit(
    tmp_path: Path, runtime_base: Path
) -> None:
    run = tmp_path / "run"
    run_directory.create(run, topology())
    with trainer_process(run, runtime_base) as controller:
        first = controller.greet()
        assert first.manifest.version == 0
        _same_weights(shared_memory.open_policy(first.manifest), STUDENT)

        second, trained = controller.train(window(0))
        assert second.manifest.version == 1 and second.manifest.digest != first.manifest.digest
        assert trained.step == 0 and trained.group_ids == ["0/0", "0/1", "0/2"]
        assert trained.metrics["updates"] == 2 and trained.metrics["accuracy_plain"] == 0.5

        pages = Path(first.manifest.path).stat().st_ino
        controller.say(ReleasePolicy(version=0))
        third, _ = controller.train(window(1))
        assert Path(third.manifest.path).stat().st_ino == pages, "written over the released one"
        assert not Path(first.manifest.path).exists() and Path(second.manifest.path).exists()
        controller.say(SaveCheckpoint(step=2))
        assert controller.expect(CheckpointSaved) == CheckpointSaved(step=2)
        folder = checkpoint.commit(run, 2)
        _same_weights(shared_memory.open_policy(third.manifest), folder / checkpoint.MODEL)
        assert len(AutoTokenizer.from_pretrained(folder / checkpoint.MODEL)) > 0

        straight, _ = controller.train(window(2))
        assert controller.heartbeats[-1].progress > 0
        assert controller.leave() == 0

    assert checkpoint.find_latest(run).step == 2
    run_directory.renew(run, start_step=2)
    with trainer_process(run, runtime_base) as controller:
        again = controller.greet()
        assert (again.manifest.version, again.manifest.digest) == (2, third.manifest.digest)
        resumed, _ = controller.train(window(2))
        assert (resumed.manifest.version, resumed.manifest.digest) == (3, straight.manifest.digest)
        assert controller.leave() == 0


def test_a_checkpoint_holds_what_was_read_though_it_could_not_be_written_again(
    tmp_path: Path, runtime_base: Path
) -> None:
    """transformers reads a temperature without do_sample and refuses to write it; its own writing
    of a tokenizer is not the file that was read either."""
    student = tmp_path / "student"
    shutil.copytree(STUDENT, student)
    (student / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 1}')
    tokenizer = json.loads((student / "tokenizer_config.json").read_text())
    (student / "tokenizer_config.json").write_text(json.dumps({"a_users_note": "x"} | tokenizer))
    with pytest.raises(ValueError, match="do_sample"):
        AutoModelForCausalLM.from_pretrained(student).save_pretrained(tmp_path / "refused")
    settings = topology()
    settings = structs.replace(
        settings, student=structs.replace(settings.student, model=str(student))
    )
    run = tmp_path / "run"
    run_directory.create(run, settings)
    with trainer_process(run, runtime_base) as controller:
        controller.greet()
        controller.train(window(0))
        controller.say(SaveCheckpoint(step=1))
        assert controller.expect(CheckpointSaved) == CheckpointSaved(step=1)
        assert controller.leave() == 0
    folder = checkpoint.commit(run, 1) / checkpoint.MODEL
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (student / name).read_bytes()
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.temperature == 0.6
    assert not list(run.glob(".trial-*"))


def test_what_cannot_be_written_ends_the_run_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **more: object) -> None:
        raise ValueError("this config cannot be serialised\nbecause")

    monkeypatch.setattr(PreTrainedConfig, "save_pretrained", refuse)
    trainer, dealer = actor(tmp_path, Welcome(heartbeat_seconds=1.0))
    sentence = (
        f"student.model: {str(STUDENT)!r} can be loaded, but no checkpoint of it can be written "
        "(this config cannot be serialised)"
    )
    with pytest.raises(UserError) as caught:
        trainer.run()
    assert str(caught.value) == sentence
    assert dealer.sent[-1] == Goodbye(reason=sentence)
    assert not any(isinstance(message, PolicyPublished) for message in dealer.sent)


def _same_weights(published: dict[str, torch.Tensor], folder: Path) -> None:
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").state_dict()
    assert published.keys() <= saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in published.items())


def test_shutdown_ends_a_step_half_way(tmp_path: Path, runtime_base: Path) -> None:
    run = tmp_path / "run"
    run_directory.create(run, topology(micro_batch_tokens=1))
    with trainer_process(run, runtime_base) as controller:
        controller.greet()
        controller.say(window(0, groups=2000))
        while not (heartbeat := controller.expect(Heartbeat)).stats.get("running"):  # type: ignore[union-attr]
            pass
        assert isinstance(heartbeat, Heartbeat)
        assert controller.leave() == 0


class ScriptedDealer:
    """Gives out scripted messages, one a look; keeps what is sent."""

    def __init__(self, *script: AnyMessage) -> None:
        self.script = list(script)
        self.sent: list[AnyMessage] = []

    def receive(self, timeout_s: float) -> AnyMessage | None:
        if timeout_s == 0.0:
            return None
        return self.script.pop(0)

    def send(self, message: AnyMessage) -> None:
        self.sent.append(message)


def actor(
    tmp_path: Path, *script: AnyMessage, start_version: int = 0, settings: Topology | None = None
) -> tuple[TrainerActor, ScriptedDealer]:
    context = ActorContext(
        run_dir=tmp_path,
        runtime=tmp_path,
        actor="trainer",
        role="trainer",
        incarnation=0,
        topology=settings or topology(),
        run_id="0123",
        start_version=start_version,
    )
    dealer = ScriptedDealer(*script)
    return TrainerActor(context, dealer), dealer  # type: ignore[arg-type]


def test_a_refused_trainer_leaves_with_a_failure(tmp_path: Path) -> None:
    trainer, dealer = actor(tmp_path, Rejected(reason="another run"))
    assert trainer.run() == 1
    assert dealer.sent[-1] == Goodbye(
        reason="the controller refuses to work with this process: another run"
    )


def test_a_stale_window_stops_the_run_with_one_sentence(tmp_path: Path) -> None:
    trainer, dealer = actor(tmp_path, Welcome(heartbeat_seconds=60), window(5, version=2))
    trainer.version = 5
    with pytest.raises(StalenessError):
        trainer.run()
    reason = dealer.sent[-1]
    assert isinstance(reason, Goodbye)
    assert reason.reason == (
        "step 5: group '5/0' holds tokens of policy version 2, which is 3 versions old where "
        "max_staleness allows 1; the pacing of windows is broken"
    )
    assert not any(isinstance(message, StepTrained) for message in dealer.sent)
    published = [
        message.manifest.version for message in dealer.sent if isinstance(message, PolicyPublished)
    ]
    assert published == [5]


def test_a_stale_window_ends_the_process_so_that_nobody_retries_it(
    tmp_path: Path, runtime_base: Path
) -> None:
    run, errors = tmp_path / "run", tmp_path / "errors"
    run_directory.create(run, topology())
    with trainer_process(run, runtime_base, errors) as controller:
        controller.greet()
        controller.say(window(0, version=1))
        reason = controller.expect(Goodbye)
        assert reason == Goodbye(reason="step 0: group '0/0' holds tokens of the later version 1")
        assert controller.process.wait(PATIENCE_SECONDS) == EXIT_FATAL
    assert errors.read_text().splitlines()[-1] == reason.reason


def test_weights_that_an_update_makes_infinite_are_published_to_nobody(
    tmp_path: Path, runtime_base: Path
) -> None:
    """Loss and norm of the update are finite, so it is not skipped."""
    run, errors = tmp_path / "run", tmp_path / "errors"
    absurd = OptimizerConfig(learning_rate=1e10, weight_decay=1e30)
    run_directory.create(run, structs.replace(topology(), optimizer=absurd))
    with trainer_process(run, runtime_base, errors) as controller:
        first = controller.greet()
        controller.say(window(0))
        reason = controller.expect(Goodbye)
        assert reason == Goodbye(
            reason="step 0: after its updates tensor 'model.embed_tokens.weight' holds values that "
            "are not finite; lower optimizer.learning_rate (1e+10) or optimizer.weight_decay "
            "(1e+30), or raise optimizer.epsilon (1e-08)"
        )
        assert controller.process.wait(PATIENCE_SECONDS) == EXIT_USER_ERROR
        served = Path(first.manifest.path)
        assert [one.name for one in served.parent.glob("*policy*")] == [served.name]
        _same_weights(shared_memory.open_policy(first.manifest), STUDENT)
    assert errors.read_text().splitlines()[-1] == reason.reason


def test_weights_that_are_damaged_from_the_start_are_named_by_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the first looks at a model do not meet them."""
    damaged = build_trainer(topology(), time.perf_counter)
    with torch.no_grad():
        damaged.policy.model.model.norm.weight[5] = torch.inf
    found = "tensor 'model.norm.weight' holds values that are not finite"
    folder = checkpoint.final_folder(tmp_path, 3)
    folder.mkdir(parents=True)
    sentences = {
        0: f"student.model: {found} in {str(STUDENT)!r}; expected weights that are not damaged",
        3: f"{folder}: {found}; remove this checkpoint, and the one before it is resumed",
    }
    for version, sentence in sentences.items():
        trainer, dealer = actor(tmp_path, Welcome(heartbeat_seconds=60), start_version=version)
        monkeypatch.setattr(trainer, "_load", lambda: damaged)
        with pytest.raises(UserError) as caught:
            trainer.run()
        assert str(caught.value) == sentence
        assert dealer.sent[-1] == Goodbye(reason=sentence)
        assert not any(isinstance(message, PolicyPublished) for message in dealer.sent)


def test_orders_are_obeyed_in_turn(tmp_path: Path) -> None:
    script = (
        Welcome(heartbeat_seconds=60),
        SaveCheckpoint(step=0),
        window(0),
        Shutdown(reason="over"),
    )
    trainer, dealer = actor(tmp_path, *script)
    trainer.run()
    kinds = [
        type(message).__name__ for message in dealer.sent if not isinstance(message, Heartbeat)
    ]
    expected = [
        "Hello",
        "PolicyPublished",
        "Credits",
        "CheckpointSaved",
        "PolicyPublished",
        "StepTrained",
        "Credits",
    ]
    assert kinds == [*expected, "Goodbye"]
    saved = checkpoint.partial_folder(tmp_path, 0) / checkpoint.MODEL
    _same_weights(
        AutoModelForCausalLM.from_pretrained(STUDENT, dtype="float32").state_dict(), saved
    )


def distillation() -> Topology:
    teacher = TeacherConfig(model=str(STUDENT.parent / "teacher"), dtype="float32")
    words = MethodConfig(name="on_distill", group_size=4)
    return structs.replace(topology(), teacher=teacher, method=words)


@pytest.mark.parametrize("settings", [topology(), distillation()], ids=["grpo", "on_distill"])
def test_a_window_without_groups_is_a_step_and_publishes(
    tmp_path: Path, settings: Topology
) -> None:
    script = (
        Welcome(heartbeat_seconds=60),
        window(0, groups=0),
        window(1),
        Shutdown(reason="over"),
    )
    trainer, dealer = actor(tmp_path, *script, settings=settings)
    assert trainer.run() == 0
    first, second, third = (m.manifest for m in dealer.sent if isinstance(m, PolicyPublished))
    assert [manifest.version for manifest in (first, second, third)] == [0, 1, 2]
    assert first.digest == second.digest != third.digest
    nothing, trained = (message for message in dealer.sent if isinstance(message, StepTrained))
    assert (nothing.group_ids, nothing.metrics["updates"], nothing.metrics["tokens_trained"]) == (
        [],
        0,
        0,
    )
    assert trained.metrics["updates"] == settings_updates(settings)
    assert ("jsd" in trained.metrics) == (settings.teacher is not None)


def settings_updates(settings: Topology) -> int:
    """Distillation makes one update a step, whatever the topology says."""
    return 1 if settings.teacher is not None else settings.method.updates_per_step


@pytest.mark.parametrize(
    ("order", "sentence"),
    [
        (
            SaveCheckpoint(step=3),
            "a checkpoint of step 3 was asked for, but the weights are of step 0",
        ),
        (window(3), "a window of step 3 came, but the weights are of step 0"),
    ],
)
def test_an_order_out_of_turn_is_never_obeyed(
    tmp_path: Path, order: AnyMessage, sentence: str
) -> None:
    trainer, dealer = actor(tmp_path, Welcome(heartbeat_seconds=60), order)
    with pytest.raises(RuntimeError, match=sentence):
        trainer.run()
    assert not (tmp_path / "checkpoints").exists()
    assert sum(isinstance(message, PolicyPublished) for message in dealer.sent) == 1


def test_an_unexpected_message_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, dealer = actor(tmp_path)
    dealer.script = [Credits(count=1), Shutdown(reason="over")]
    assert trainer.run() == 0
    assert "ignored a Credits, which is not for this actor" in caplog.text


def test_a_missing_starting_checkpoint_is_named(tmp_path: Path) -> None:
    trainer, _ = actor(tmp_path, start_version=7)
    folder = checkpoint.final_folder(tmp_path, 7)
    with pytest.raises(
        UserError, match="the checkpoint that the run should continue from does not exist"
    ) as error:
        starting_checkpoint(trainer.context)
    assert str(folder) in str(error.value)


def test_a_rank_of_another_host_begins_where_the_first_one_says(tmp_path: Path) -> None:
    trainer, _ = actor(tmp_path / "here", start_version=7)
    there = tmp_path / "there"
    record = run_directory.create(there, trainer.context.topology)
    folder = checkpoint.final_folder(there, 7)
    sentence = (
        f"{folder}: the checkpoint that the run should continue from is not on this host; trainer "
        "ranks on several hosts need run.directory on a file system that they share, under one path"
    )
    for missing in (tmp_path / "nowhere", there):  # the second is a run, and another one
        with pytest.raises(UserError) as error:
            starting_checkpoint(trainer.context, missing)
        assert str(error.value) == sentence.replace(str(there), str(missing))
    folder.mkdir(parents=True)
    context = replace(trainer.context, run_id=record.run_id)
    assert starting_checkpoint(context, there) == folder
